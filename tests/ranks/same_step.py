"""Run by torchrun: three optimizer steps, split in every combination; rank 0 writes the parameters of each.

torchrun ... same_step.py MODEL_FOLDER... OUT
"""

import itertools
import sys

import torch

from expo.config import load_config
from expo.learner.policy import DeepSpeedPolicy
from expo.runtime.distributed import Ranks, join_ranks, leave_ranks
from expo.runtime.endings import run_and_exit
from expo.types import Sample

STAGES, PACKING, AGGREGATIONS = (0, 1, 2, 3), (False, True), ("token", "sequence", "constant")
# prompt and reply tokens
LENGTHS = [(9, 14), (4, 7), (6, 1), (3, 25), (5, 5), (8, 12), (4, 3), (7, 9), (9, 20), (2, 11), (5, 17), (3, 6)]


def samples(vocab_size: int) -> list[Sample]:
    """Samples of different lengths with advantages of both signs, one left out; equal on every rank."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for row, (prompt, reply) in enumerate(LENGTHS):
        ids = torch.randint(3, vocab_size, (prompt + reply,), generator=generator).tolist()
        advantage = float(torch.randn((), generator=generator)) if row else 0.0
        found.append(Sample(ids[:prompt], ids[prompt:], [-1.0] * reply, advantage, is_left_out=row == 4))
    return found


def parameters_after_three_steps(
    path: str, stage: int, packing: bool, aggregation: str, budget: int, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """All parameters in one row; the last loss, gradient norm and mismatch metrics; and the number of micro-batches of
    this rank in a step.
    """
    overrides = {
        "model.path": path,
        "policy.zero_stage": stage,
        "policy.packing": packing,
        "policy.micro_batch_tokens": budget,
        "policy.updates_per_step": 1,
        "objective.aggregation": aggregation,
        "data.max_prompt_tokens": 10,
        "rollout.max_new_tokens": 30,
        "optimizer.lr": 1e-4,
        "optimizer.warmup_steps": 0,
    }
    policy = DeepSpeedPolicy(load_config(None, list(overrides.items())), ranks)
    for _ in range(3):
        (mini_batch,) = policy.prepare(samples(19))
        metrics = policy.update(mini_batch, torch.tensor(0.02))
    row = torch.cat([value.flatten() for _, value in policy.named_weights()])
    figures = [metrics["loss"], metrics["grad_norm"], *policy.mismatch().values()]
    return row, torch.tensor(figures), len(mini_batch.micro_batches)


def main() -> int:
    *paths, out = sys.argv[1:]
    ranks, found = join_ranks("cpu", 120), {}
    for path, stage, packing, aggregation in itertools.product(paths, STAGES, PACKING, AGGREGATIONS):
        found[path, stage, packing, aggregation] = parameters_after_three_steps(
            path, stage, packing, aggregation, 40, ranks
        )
    if ranks.is_rank0:
        torch.save(found, out)
    leave_ranks()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
