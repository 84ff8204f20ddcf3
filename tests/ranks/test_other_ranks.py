"""Runs that are resumed with another number of ranks."""

import json
import subprocess
import sys

import pytest

from tests import ROOT
from tests.ranks.running import argv, environment, launch, log_of, rows_of, run_launches
from tests.ranks.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow
STAGES = (0, 3)
SOME_CASES = ("2/4/1-2", "3/0/2-1")  # `python -m tests.ranks.other_ranks` has all


def test_a_run_resumes_with_another_number_of_ranks(tmp_path):
    quick = {"run__checkpoint_every": 2, "run__steps": 4, "run__keep_checkpoints": 2, "evaluation__every": 0}
    plan = []
    for stage in STAGES:
        for before, after in ((2, 1), (1, 2)):
            whole, moved = f"{before}-{stage}", f"{before}-to-{after}-{stage}"
            plan.append(launch(whole, argv(tmp_path, whole, policy__zero_stage=stage, **quick), ranks=before))
            command = argv(tmp_path, moved, resume=True, policy__zero_stage=stage, **quick)
            copies, corruptions = (
                [(tmp_path / whole, tmp_path / moved)],
                [(tmp_path / moved / "checkpoints/step-000004", "gone")],
            )
            plan.append(launch(moved, command, ranks=after, copies=copies, corruptions=corruptions))
    failing = argv(tmp_path, "failing", resume=True, policy__zero_stage=3, **quick)
    fault = {"phase": "convert", "bytes": 100_000}
    plan.append(launch("failing", failing, ranks=1, fault=fault, copies=[(tmp_path / "2-3", tmp_path / "failing")]))
    codes = run_launches(tmp_path, plan)
    for stage in STAGES:
        for before, after in ((2, 1), (1, 2)):
            whole, moved = f"{before}-{stage}", f"{before}-to-{after}-{stage}"
            assert codes[whole] == [0] * before
            assert codes[moved] == [0] * after, log_of(tmp_path, moved)
            assert "resuming after step 2" in log_of(tmp_path, moved)
            left, right = rows_of(tmp_path / whole, "metrics"), rows_of(tmp_path / moved, "metrics")
            for name in ("loss", "kl", "grad_norm", "accuracy"):
                assert right[2][name] == pytest.approx(left[2][name], abs=1e-6), (moved, name)
            assert abs(left[2]["loss"] - left[1]["loss"]) > 1e-4, "the losses could differ"
            names = sorted(path.name for path in (tmp_path / moved / "checkpoints").iterdir())
            assert names == ["latest", "step-000002", "step-000004"]
    assert codes["failing"] == [2]
    (line,) = [line for line in log_of(tmp_path, "failing").splitlines() if "error" in line]
    assert "was saved by another number of ranks and could not be converted for 1" in line
    assert "resume with the number of ranks that saved it" in line


def test_the_updates_after_a_change_of_ranks_are_those_of_a_run_without_one(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    command = [sys.executable, "-m", "tests.ranks.other_ranks", str(tmp_path), str(model), *SOME_CASES]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "differences.json").read_text())
    assert list(found) == list(SOME_CASES)
    assert {case: parts for case, parts in found.items() if not max(parts) <= 1e-6} == {}
