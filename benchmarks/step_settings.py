"""The settings of the training step that benchmarks time, on the embedded ledger task.

Imports nothing of `expo` but its configuration, so that `benchmarks.compare` can use it with the code of any commit.
"""

from pathlib import Path

import torch

from expo.config import RunConfig

QUESTIONS, GROUP_SIZE, MAX_NEW_TOKENS = 32, 8, 32
MICRO_BATCH_TOKENS = 2048  # of one forward and backward pass, padding included
LR, BETAS, BETA, CLIP = 2e-4, (0.9, 0.99), 0.02, 0.2


def step_config(folder: Path, steps: int, questions: int = QUESTIONS) -> RunConfig:
    """The configuration of a run of `steps` GRPO steps, each on `questions` questions."""
    return RunConfig.model_validate(
        {
            "run": {"dir": folder, "steps": steps, "checkpoint_every": 0, "threads": torch.get_num_threads()},
            "model": {"path": "ledger"},
            "data": {"train": "ledger:train", "prompt": "plain", "chat_template": False, "max_prompt_tokens": 32},
            "rollout": {
                "questions_per_step": questions,
                "group_size": GROUP_SIZE,
                "max_new_tokens": MAX_NEW_TOKENS,
                "batch_size": QUESTIONS * GROUP_SIZE,
            },
            "curriculum": {"kind": "uniform"},
            "kl": {"beta": BETA, "rho": "constant"},
            "objective": {"clip_low": CLIP, "clip_high": CLIP, "dual_clip": None, "aggregation": "sequence"},
            "policy": {"dtype": "float32", "micro_batch_tokens": MICRO_BATCH_TOKENS, "updates_per_step": 1},
            "optimizer": {"lr": LR, "betas": BETAS, "weight_decay": 0.0, "warmup_steps": 0},
        }
    )
