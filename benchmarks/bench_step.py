"""One training step by phase, ours and TRL's, on the embedded model with the same data, settings and generation engine.

The trainers run alternately in fresh processes, so that other load on the machine affects both; a pair of runs is one
round, and the order alternates. Before timing, both make one update on the same replies, and the updates must agree.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fresh import in_fresh_process
from benchmarks.trl_step import our_first_update, our_steps, trl_first_update, trl_steps

PAIRS, STEPS = 3, 5  # runs of each trainer; steps per run, the first of which is not counted
TRAINERS = {"expo": our_steps, "TRL GRPOTrainer": trl_steps}
CHECKED_QUESTIONS = 4
# relative, of gradient norm and update. AdamW's first step is nearly the sign of the gradient, so weights with a tiny
# gradient may move either way. The first update has no KL penalty and no clipping; tests/integrations compare later
# updates, with our loss in TRL's trainer
NORM_BOUND, UPDATE_BOUND = 1e-4, 1e-2


def run(job: Callable[..., Any], *arguments: object) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return in_fresh_process(job, Path(folder) / "run", *arguments)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_step(table, is_tiny):
    samples, theirs = run(trl_first_update, CHECKED_QUESTIONS)
    ours = run(our_first_update, samples)
    assert theirs.grad_norm > 0, "every group had equal rewards, so there is no gradient"
    errors = {"grad_norm": abs(ours.grad_norm / theirs.grad_norm - 1), "update": ours.distance(theirs)}
    assert errors["grad_norm"] <= NORM_BOUND
    assert errors["update"] <= UPDATE_BOUND
    num_pairs, sizes = (1, (2, 4)) if is_tiny else (PAIRS, (STEPS,))
    for pair in range(num_pairs):
        for name in list(TRAINERS)[:: -1 if pair % 2 else 1]:
            steps = run(TRAINERS[name], *sizes)
            described = {"case": "step", "contender": name, "pair": pair, "errors": errors}
            table += [{**described, "seconds": step} for step in steps]
