"""The checks for GPUs: a bad check does not affect the others, and all of them run as far as a CPU can run them."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.conftest import with_former_cases
from benchmarks.events import counted
from benchmarks.gpu.worker import CHECKS
from tests import ROOT
from tests.planted_checks import PLANTED
from tests.ranks.running import environment_of_no_rank
from tests.stand_in_cuda import GPUPlace, stand_in_cuda

pytestmark = pytest.mark.medium


def run_planted(folder, seconds):
    session = gpu_check.Session(PLANTED, PLANTED, folder, is_rehearsal=True)
    journal = folder / "journal.jsonl"
    gpu_check.run_checks(session, PLANTED, journal, seconds, is_rehearsal=True, module="tests.planted_checks")
    checks = {check["name"]: check for check in json.loads((folder / "gpu_check.json").read_text())["checks"]}
    return session, checks


def test_every_check_gets_a_verdict_whatever_the_others_do(tmp_path):
    session, checks = run_planted(tmp_path, seconds=300)
    assert {name: check["verdict"] for name, check in checks.items()} == {
        **{"raises": "error", "dies": "error", "hangs": "error"},
        **{"misses": "missed", "is not here": "not here", "passes": "needs a GPU"},
    }
    assert "planted" in checks["raises"]["note"]
    assert "exit code 7" in checks["dies"]["note"]
    assert "longer than 4 s" in checks["hangs"]["note"]
    assert [measure["is_met"] for measure in checks["misses"]["measures"]] == [False, False, True]
    assert all(check["measures"] for check in checks.values())  # also those before an error
    assert session.failed == ["raises", "dies", "hangs", "misses"]


def test_checks_after_the_time_limit_are_not_run(tmp_path):
    session, checks = run_planted(tmp_path, seconds=0)
    assert {check["verdict"] for check in checks.values()} == {"not run"}
    assert "time limit of 0 s" in checks["passes"]["note"]
    assert session.failed == list(PLANTED)


def test_the_command_fails_without_a_gpu(capsys):
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert gpu_check.main([]) == 2
    assert "no GPU found" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["waits", "compilations", "graph", "loss-speed", "training-step-0.5B"])
def test_the_code_that_only_a_gpu_reaches_has_no_errors(name):
    with stand_in_cuda():
        measures = list(CHECKS[name].run(GPUPlace(torch.device("cpu"))))
    assert measures
    assert any(measure.bound is not None for measure in measures)
    if name == "waits":  # no function waits for a CPU, and a planted wait is counted
        assert [measure.value for measure in measures if measure.name.endswith(": waits")] == [0.0] * 14
        assert next(measure.value for measure in measures if measure.name.startswith("planted")) == 1


@pytest.mark.slow
def test_the_checks_run_in_the_interpreter_up_to_where_they_need_a_gpu(tmp_path):
    pytest.importorskip("triton")
    names = [name for name in CHECKS if name not in ("compiled", "trainer", "tf32")]  # minutes, or other tests
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--out", str(tmp_path), "--checks", *names]
    environment = {**environment_of_no_rank(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    verdicts = {check["name"]: check["verdict"] for check in checks}
    assert {name for name, verdict in verdicts.items() if verdict == "met"} >= {"numerics", "in-place-race"}
    assert set(verdicts.values()) <= {"met", "needs a GPU", "not here"}
    assert not (tmp_path / "gpu_check.jsonl").exists()


@pytest.mark.parametrize("owner", [torch.cuda.Event, torch.cuda.Stream, torch.cuda])
def test_a_wait_that_pytorch_does_not_report_is_counted(owner):
    with mock.patch.object(owner, "synchronize", return_value=None), counted(torch.device("cpu")) as counts:
        assert counts.waits == 0
        owner.synchronize()
        owner.synchronize()
    assert counts.waits == 2
    assert counts.wait_names[0].endswith(".synchronize")


def test_a_table_measured_in_parts_keeps_all_its_cases(tmp_path):
    stamp = {"commit": "abc", "machine": "H100", "threads": 1, "versions": {}}
    path = tmp_path / "loss-cuda.json"

    def table(stamp, **ms):
        rows = [{"case": case, "contender": "expo_kernels", "ms": value} for case, value in ms.items()]
        return {"stamp": stamp, "rows": rows}

    def cases(results):
        return {row["case"]: row["ms"] for row in results["rows"]}

    path.write_text(json.dumps(table(stamp, a=1, b=1)))
    assert cases(with_former_cases(table(stamp, b=2, c=2), path)) == {"a": 1, "b": 2, "c": 2}
    for changed in ({"commit": "def"}, {"machine": "H200"}, {"versions": {"torch": "2.9"}}):
        assert cases(with_former_cases(table(stamp | changed, b=2), path)) == {"b": 2}
    dirty = stamp | {"commit": "abc-dirty"}
    path.write_text(json.dumps(table(dirty, a=1)))
    assert cases(with_former_cases(table(dirty, b=2), path)) == {"b": 2}
