"""The embedded ledger task, trained by this project's trainer and by TRL's GRPOTrainer, as nearly alike as both allow.

The same weights, questions, verifier and numbers: 32 questions a step with 8 replies of at most 32 tokens at
temperature 1, transformers generation, one AdamW step in float32, clip 0.2, k3 with beta = 0.02 against the starting
weights, a mean per sequence, advantages over the group's standard deviation. Questions are drawn uniformly and beta is
constant: GRPO, since TRL has no curriculum and no accuracy-conditioned KL.
"""

import io
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import expo.train
from expo.config import ModelSection, RunConfig
from expo.data import PROMPTS, load_questions
from expo.learner.model import check_model_path
from expo.rewards.verifier import Verifier
from expo.run.setup import RunBookkeeping, open_run
from expo.runtime.logging_filters import errors_only
from expo.types import Sample

QUESTIONS, GROUP_SIZE, MAX_NEW_TOKENS = 32, 8, 32
MICRO_BATCH, MICRO_BATCH_TOKENS = 64, 2048  # of one forward-backward pass: TRL counts replies, we tokens with padding
LR, BETAS, BETA, CLIP = 2e-4, (0.9, 0.99), 0.02, 0.2

Step = dict[str, float]  # seconds by phase, and "step" for the whole


def our_config(folder: Path, steps: int, questions: int = QUESTIONS) -> RunConfig:
    """The run's configuration."""
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


@dataclass(frozen=True)
class FirstUpdate:
    """What the first update of a run came to: its gradient's norm, and how far it moved each weight."""

    grad_norm: float
    moved: dict[str, Tensor]

    def distance(self, other: "FirstUpdate") -> float:
        """How far the two moves lie apart, as a share of the other's length; 1 or more where nothing is shared."""
        assert set(self.moved) == set(other.moved)
        apart = sum(float((moved - other.moved[name]).square().sum()) for name, moved in self.moved.items())
        return (apart / sum(float(moved.square().sum()) for moved in other.moved.values())) ** 0.5


def our_first_update(folder: Path, samples: list[Sample]) -> FirstUpdate:
    """Our update on given replies and advantages, from the starting weights."""
    with open_run(our_config(folder, 1), False) as run:
        policy = run.learner.policy
        before = _copied(policy.named_weights())
        (mini_batch,) = policy.prepare(samples)
        metrics = policy.update(mini_batch, torch.tensor(BETA))
        return FirstUpdate(metrics["grad_norm"], _moved(before, _copied(policy.named_weights())))


def trl_first_update(folder: Path, questions: int) -> tuple[list[Sample], FirstUpdate]:
    """The replies that TRL's first step samples, with the advantages that it gives them, and its update on them."""
    with _trl_trainer(folder, 1, questions) as trainer:
        before = _copied(trainer.model.named_parameters())
        trainer.train()
        after = _copied(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    grad_norm = next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)
    return _samples(trainer.first_batch), FirstUpdate(float(grad_norm), _moved(before, after))


def _copied(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights}


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after[name] - weight for name, weight in before.items()}


def _samples(batch: dict[str, Any]) -> list[Sample]:
    """TRL's padded batch, row by row; what the sampler said of log-probs is asked by nothing here."""
    found = []
    for row, advantage in enumerate(batch["advantages"].tolist()):
        prompt, reply = (
            batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist() for name in ("prompt", "completion")
        )
        found.append(Sample(prompt, reply, [0.0] * len(reply), advantage))
    return found


def our_steps(folder: Path, steps: int, questions: int = QUESTIONS) -> list[Step]:
    """Seconds of each of our steps but the first, from one recorded step to the next."""
    found, ends, record = [], [], RunBookkeeping.record_step

    def clocked(books: RunBookkeeping, step: int, graded: Any, row: dict[str, Any], curriculum: dict[str, Any]) -> None:
        record(books, step, graded, row, curriculum)
        ends.append(time.perf_counter())
        phases = {name.removeprefix("seconds/"): row[name] for name in row if name.startswith("seconds/")}
        found.append({**phases, "reply_tokens": graded.num_tokens})

    with mock.patch.object(RunBookkeeping, "record_step", clocked):
        expo.train.train(our_config(folder, steps, questions))
    return steps_between(found, ends)


def steps_between(phases: list[Step], ends: list[float]) -> list[Step]:
    """Every step but the first, with the seconds since the one before it ended."""
    return [{**taken, "step": end - start} for taken, start, end in zip(phases[1:], ends[:-1], ends[1:], strict=True)]


def trl_steps(folder: Path, steps: int, questions: int = QUESTIONS) -> list[Step]:
    """Seconds of each of TRL's steps but the first."""
    with _trl_trainer(folder, steps, questions) as trainer:
        trainer.train()
    return steps_between(trainer.steps[:steps], trainer.ends[:steps])


@contextmanager
def _trl_trainer(folder: Path, steps: int, questions: int) -> Iterator[Any]:
    from datasets import Dataset
    from transformers import set_seed

    rows = [
        {"prompt": PROMPTS["plain"].format(question=question.text), "answer": question.answer}
        for question in load_questions("ledger:train").questions
    ]
    set_seed(0)
    with errors_only(), Verifier() as verifier:

        def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
            return [verdict.reward for verdict in verifier.grade(completions, answer)]

        yield _timed_trainer()(
            model=check_model_path(ModelSection(path="ledger")),
            reward_funcs=reward,
            args=_trl_arguments(folder, steps, questions * GROUP_SIZE),
            train_dataset=Dataset.from_list(rows),
        )


def _trl_arguments(folder: Path, steps: int, num_replies: int) -> Any:
    from trl import GRPOConfig

    micro_batch = min(MICRO_BATCH, num_replies)
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=num_replies // micro_batch,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=1.0,
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        beta=BETA,
        epsilon=CLIP,
        loss_type="grpo",
        use_bias_correction_kl=False,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": "float32"},
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )


def _timed_trainer() -> type:
    """GRPOTrainer, noting what its phases take, and when each step has been logged."""
    from trl import GRPOTrainer

    class TimedTrainer(GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.phases: Step = {}
            self.steps: list[Step] = []
            self.ends: list[float] = []
            self.first_batch: dict[str, Any] | None = None
            super().__init__(*args, **kwargs)

        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - started

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            with self.phase("rollout"):
                generated = super()._generate(*args, **kwargs)
            self.phases["reply_tokens"] = sum(map(len, generated[1]))
            return generated

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            made = super()._generate_and_score_completions(*args, **kwargs)
            self.first_batch = made if self.first_batch is None else self.first_batch
            return made

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with self.phase("reward"):
                return super()._calculate_rewards(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            with self.phase("reference"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

        def log(self, *args: Any, **kwargs: Any) -> None:
            # called once a step, and with a summary after the last
            with redirect_stdout(io.StringIO()):
                super().log(*args, **kwargs)
            self.steps.append(self.phases)
            self.ends.append(time.perf_counter())
            self.phases = {}

    return TimedTrainer
