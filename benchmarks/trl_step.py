"""Training on the embedded ledger task with this project's trainer and with TRL's GRPOTrainer, configured alike.

Both use the same weights, questions, verifier and settings: 32 questions per step with 8 replies of at most 32 tokens
at temperature 1, transformers generation, one AdamW step in float32, clip 0.2, the k3 penalty with beta = 0.02 to the
initial weights, a mean per sequence, and advantages divided by the group's standard deviation. The method is GRPO
(uniform sampling, constant beta), since TRL has no curriculum and no accuracy-conditioned KL.
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
from benchmarks.step_settings import BETA, BETAS, CLIP, GROUP_SIZE, LR, MAX_NEW_TOKENS, QUESTIONS, step_config
from expo.config import ModelSection
from expo.data import PROMPTS, load_questions
from expo.learner.model_files import check_model_path
from expo.rewards.verifier import Verifier
from expo.run.setup import RunBookkeeping, open_run
from expo.runtime.logging_filters import errors_only
from expo.types import Sample

MICRO_BATCH = 64  # replies of one forward and backward pass in TRL; ours counts tokens, padding included

Step = dict[str, float]  # seconds by phase, and "step" for the total


@dataclass(frozen=True)
class FirstUpdate:
    """The first update of a run: the gradient norm, and the change of each weight."""

    grad_norm: float
    change: dict[str, Tensor]

    def distance(self, other: "FirstUpdate") -> float:
        """The norm of the difference between both changes, relative to the norm of the other change."""
        assert set(self.change) == set(other.change)
        squared = sum(float((change - other.change[name]).square().sum()) for name, change in self.change.items())
        return (squared / sum(float(change.square().sum()) for change in other.change.values())) ** 0.5


def our_first_update(folder: Path, samples: list[Sample]) -> FirstUpdate:
    """Our update of the initial weights on given replies and advantages."""
    with open_run(step_config(folder, 1), False) as run:
        policy = run.learner.policy
        before = _copy(policy.named_weights())
        (mini_batch,) = policy.prepare(samples)
        metrics = policy.update(mini_batch, torch.tensor(BETA))
        return FirstUpdate(metrics["grad_norm"], _change(before, _copy(policy.named_weights())))


def trl_first_update(folder: Path, questions: int) -> tuple[list[Sample], FirstUpdate]:
    """The replies of TRL's first step with their advantages, and TRL's update on them."""
    with _trl_trainer(folder, 1, questions) as trainer:
        before = _copy(trainer.model.named_parameters())
        trainer.train()
        after = _copy(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    grad_norm = next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)
    return _samples(trainer.first_batch), FirstUpdate(float(grad_norm), _change(before, after))


def _copy(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights}


def _change(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after[name] - weight for name, weight in before.items()}


def _samples(batch: dict[str, Any]) -> list[Sample]:
    """The rows of TRL's padded batch as samples; the sampler's log-probs are not used and set to 0."""
    samples = []
    for row, advantage in enumerate(batch["advantages"].tolist()):
        prompt, reply = (
            batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist() for name in ("prompt", "completion")
        )
        samples.append(Sample(prompt, reply, [0.0] * len(reply), advantage))
    return samples


def our_steps(folder: Path, steps: int, questions: int = QUESTIONS) -> list[Step]:
    """Seconds of our steps except the first, from one recorded step to the next."""
    steps_so_far, ends, record_step = [], [], RunBookkeeping.record_step

    def timed_record(
        bookkeeping: RunBookkeeping, step: int, graded: Any, row: dict[str, Any], curriculum: dict[str, Any]
    ) -> None:
        record_step(bookkeeping, step, graded, row, curriculum)
        ends.append(time.perf_counter())
        phases = {name.removeprefix("seconds/"): row[name] for name in row if name.startswith("seconds/")}
        steps_so_far.append({**phases, "reply_tokens": graded.num_tokens})

    with mock.patch.object(RunBookkeeping, "record_step", timed_record):
        expo.train.train(step_config(folder, steps, questions))
    return steps_between(steps_so_far, ends)


def steps_between(phases: list[Step], ends: list[float]) -> list[Step]:
    """Every step except the first, with the seconds since the end of the previous step."""
    return [
        {**seconds, "step": end - start} for seconds, start, end in zip(phases[1:], ends[:-1], ends[1:], strict=True)
    ]


def trl_steps(folder: Path, steps: int, questions: int = QUESTIONS) -> list[Step]:
    """Seconds of TRL's steps except the first."""
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
    """GRPOTrainer that records the seconds of its phases and the time at which each step is logged."""
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
            batch = super()._generate_and_score_completions(*args, **kwargs)
            self.first_batch = batch if self.first_batch is None else self.first_batch
            return batch

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with self.phase("reward"):
                return super()._calculate_rewards(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            with self.phase("reference"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

        def log(self, *args: Any, **kwargs: Any) -> None:
            # called once per step, and once more with a summary
            with redirect_stdout(io.StringIO()):
                super().log(*args, **kwargs)
            self.steps.append(self.phases)
            self.ends.append(time.perf_counter())
            self.phases = {}

    return TimedTrainer
