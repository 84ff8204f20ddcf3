"""One training step by phase, ours and TRL's, on the embedded model: the same data, settings and generation engine.

Each trainer runs in fresh processes, turn by turn, so that what else the machine does falls on both; a pair of runs is
one round.
"""

import importlib.util
import tempfile
from pathlib import Path

import pytest

from benchmarks.fresh import in_fresh_process
from benchmarks.trl_step import our_steps, trl_steps

PAIRS, STEPS = 3, 5  # runs of each trainer; steps of a run, of which the first is left out
TRAINERS = {"expo": our_steps, "TRL GRPOTrainer": trl_steps}


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_step(table, is_tiny):
    num_pairs, sizes = (1, (2, 4)) if is_tiny else (PAIRS, (STEPS,))
    for pair in range(num_pairs):
        for name, run in TRAINERS.items():
            with tempfile.TemporaryDirectory() as folder:
                steps = in_fresh_process(run, Path(folder) / "run", *sizes)
            table += [{"case": "step", "contender": name, "pair": pair, "seconds": step} for step in steps]
