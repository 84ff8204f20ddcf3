"""One training step by phase, ours and TRL's, on the embedded model: the same data, settings and generation engine.

Each trainer runs in fresh processes, turn by turn, so that what else the machine does falls on both; a pair of runs is
one round, and who goes first changes. Before that both take one update on the same replies, and must move alike.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fresh import in_fresh_process
from benchmarks.trl_step import our_first_update, our_steps, trl_first_update, trl_steps

PAIRS, STEPS = 3, 5  # runs of each trainer; steps of a run, of which the first is left out
TRAINERS = {"expo": our_steps, "TRL GRPOTrainer": trl_steps}
CHECKED_QUESTIONS = 4
# of gradient norm and update, relative. AdamW's first step is nearly the gradient's sign, so that weights whose
# gradient is next to nothing may go either way. The first update has no penalty and clips nothing yet; later ones are
# compared in tests/integrations, of our loss in TRL's trainer
NORM_BOUND, UPDATE_BOUND = 1e-4, 1e-2


def run(job: Callable[..., Any], *arguments: object) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return in_fresh_process(job, Path(folder) / "run", *arguments)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_step(table, is_tiny):
    samples, theirs = run(trl_first_update, CHECKED_QUESTIONS)
    ours = run(our_first_update, samples)
    assert theirs.grad_norm > 0, "every group was all right or all wrong, and taught nothing"
    errors = {"grad_norm": abs(ours.grad_norm / theirs.grad_norm - 1), "update": ours.distance(theirs)}
    assert errors["grad_norm"] <= NORM_BOUND
    assert errors["update"] <= UPDATE_BOUND
    num_pairs, sizes = (1, (2, 4)) if is_tiny else (PAIRS, (STEPS,))
    for pair in range(num_pairs):
        for name in list(TRAINERS)[:: -1 if pair % 2 else 1]:
            steps = run(TRAINERS[name], *sizes)
            described = {"case": "step", "contender": name, "pair": pair, "errors": errors}
            table += [{**described, "seconds": step} for step in steps]
