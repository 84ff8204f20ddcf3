"""A run at the bounds of its numbers: it may diverge, but it ends as runs end, without an exception of a library."""

from contextlib import suppress

import pytest

from expo.config import load_config
from expo.errors import ExpoError
from expo.train import train

pytestmark = pytest.mark.medium

SMALL = {
    "run.steps": 1, "optimizer.warmup_steps": 0, "rollout.questions_per_step": 2, "rollout.group_size": 2,
    "evaluation.sets": {}, "run.checkpoint_every": 0,
}  # fmt: skip
YEAR_S = 31_536_000
UPPER = {
    "run.seed": 2**63 - 1, "run.save_by_minutes": YEAR_S / 60, "run.reply_tokens": 10**15, "reward.timeout_s": YEAR_S,
    "reward.correct_weight": 1e6, "kl.beta": 1e6, "objective.clip_high": 1e6, "objective.dual_clip": 1e6,
    "objective.entropy_bonus": 1e6, "rollout.temperature": 1000, "rollout.sync_tolerance": 1e6, "curriculum.std": 1000,
    "optimizer.lr": 1e30, "optimizer.weight_decay": 1e6, "optimizer.max_grad_norm": 1e30,
    "policy.logits_budget_mb": 1e6, "policy.micro_batch_tokens": 2**31 - 1, "rollout.batch_size": 2**20,
    **{f"deadline.{phase}": YEAR_S for phase in ("start", "rollout", "reward", "reference", "update", "sync", "save")},
}  # fmt: skip
LOWER = {
    "reward.correct_weight": 5e-324, "kl.beta": 5e-324, "objective.clip_low": 0, "objective.clip_high": 0,
    "rollout.temperature": 0.01, "curriculum.std": 0.001, "curriculum.mean": 0, "optimizer.lr": 5e-324,
    "optimizer.weight_decay": 5e-324, "optimizer.max_grad_norm": 5e-324, "policy.logits_budget_mb": 5e-324,
    "rollout.batch_size": 1,
}  # fmt: skip


@pytest.mark.parametrize("values", [UPPER, LOWER], ids=["upper", "lower"])
def test_a_run_at_the_bounds_ends_as_runs_end(tmp_path, values):
    config = load_config(None, [*SMALL.items(), *values.items(), ("run.dir", str(tmp_path / "run"))])
    with suppress(ExpoError):
        train(config)
