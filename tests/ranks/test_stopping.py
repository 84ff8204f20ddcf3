"""A run that is asked to stop, in any phase and by any rank, saves and ends; resumed, it equals one never stopped."""

import json
import signal
import socket
import sys
import time

import pytest

from tests.ranks.running import (
    LAUNCHER,
    argv,
    launch,
    log_of,
    outcome_of,
    processes_naming,
    run_launches,
    start,
    start_process,
    wait_for_mark,
)

pytestmark = pytest.mark.slow

# the phase: its nth entry, and the step after which the run stops; None if it was about to end anyway
PHASES = {
    "start": (1, 0),
    "curriculum": (3, 1),
    "rollout": (2, 1),
    "reward": (2, 1),
    "reference": (2, 1),
    "update": (2, 2),
    "weights": (3, 2),  # of the rollout engine
    "evaluation": (2, 2),
    "checkpoint": (1, 2),
    "export": (1, None),
}


@pytest.mark.parametrize(
    ("do", "code", "phases"), [("int", 130, list(PHASES)), ("term", 0, ["start", "reward", "update", "export"])]
)
def test_a_signal_in_any_phase_leaves_a_checkpoint_of_the_same_run(tmp_path, do, code, phases):
    quick = {"run__checkpoint_every": 2, "run__steps": 3}
    plan = [launch("whole", argv(tmp_path, "whole", **quick), ranks=1)]
    for phase in phases:
        command = argv(tmp_path, phase, **quick)
        plan.append(launch(phase, command, ranks=1, fault={"phase": phase, "do": do, "nth": PHASES[phase][0]}))
        if phase != "export":
            plan.append(launch(f"{phase}-resumed", [*command, "--resume"], ranks=1))
    codes = run_launches(tmp_path, plan, ranks=1)
    assert {name: given[0] for name, given in codes.items()} == {name: code * (name in PHASES) for name in codes}
    whole = outcome_of(tmp_path / "whole")
    for phase in phases:
        step = PHASES[phase][1]
        assert ("press Ctrl-C again" in log_of(tmp_path, phase)) == (do == "int")
        if step is not None:
            assert f"stopped by SIG{do.upper()} after step {step};" in log_of(tmp_path, phase), phase
            assert f"resuming after step {step} of 3" in log_of(tmp_path, f"{phase}-resumed")
        assert outcome_of(tmp_path / phase) == whole, phase


def test_a_signal_to_one_rank_or_the_time_limit_stops_all(tmp_path):
    quick = {"run__checkpoint_every": 0, "run__steps": 3, "policy__zero_stage": 2}
    plan = [launch("whole", argv(tmp_path, "whole", **quick))]
    for do, phase in (("term", "rollout"), ("usr1", "update")):
        fault = {"phase": phase, "do": do, "nth": 2, "on_ranks": [1]}
        command = argv(tmp_path, do, **quick)
        plan += [launch(do, command, fault=fault), launch(f"{do}-resumed", [*command, "--resume"])]
    command = argv(tmp_path, "time", **quick)
    plan += [launch("time", [*command, "--run.save_by_minutes=0.001"]), launch("time-resumed", [*command, "--resume"])]
    codes = run_launches(tmp_path, plan)
    assert set(map(tuple, codes.values())) == {(0, 0)}, codes
    assert "stopped by SIGTERM after step 1" in log_of(tmp_path, "term")
    assert "stopped by SIGUSR1 after step 2" in log_of(tmp_path, "usr1")
    assert "stopped by run.save_by_minutes after step 0" in log_of(tmp_path, "time")
    for name in ("term", "usr1", "time"):
        assert outcome_of(tmp_path / name) == outcome_of(tmp_path / "whole"), name


def test_a_signal_to_torchrun_leaves_a_checkpoint(tmp_path):
    quick = {"run__checkpoint_every": 0, "run__steps": 3, "by_workers": True}
    mark = tmp_path / "mark"
    # torchrun signals the process group of each rank, the verifier's processes too, while they grade
    fault = {"phase": "grading", "do": "mark", "path": str(mark), "wait": 3}
    process = start(tmp_path, [launch("run", argv(tmp_path, "run", **quick), fault=fault, in_process=True)])
    wait_for_mark(mark, process)
    process.send_signal(signal.SIGTERM)
    out, problems = process.communicate(timeout=120)
    assert "stopped by SIGTERM after step 0; continue with --resume" in out, problems
    assert process.returncode == 1, "torchrun exits with 1 after any signal"
    command = argv(tmp_path, "run", resume=True, **quick)
    codes = run_launches(tmp_path, [launch("whole", argv(tmp_path, "whole", **quick)), launch("resumed", command)])
    assert codes == {"whole": [0, 0], "resumed": [0, 0]}
    assert outcome_of(tmp_path / "run") == outcome_of(tmp_path / "whole")


def test_a_signal_ends_a_rank_that_waits_for_the_others_to_join(tmp_path):
    mark = tmp_path / "mark"
    plan = [
        launch("run", argv(tmp_path, "run"), fault={"phase": "join", "do": "mark", "path": str(mark)}, in_process=True)
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
        process = start_process(tmp_path, [sys.executable, LAUNCHER, tmp_path], MASTER_PORT=str(port), **place)
        wait_for_mark(mark, process)
        time.sleep(1)  # it is waiting for the others by now
        process.send_signal(signal.SIGTERM)
        _, problems = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"rank 1, phase start: it waits for rank 0 or its launcher at 127.0.0.1:{port}: ended by SIGTERM" in problems
    assert not (tmp_path / "run").exists()


def test_ranks_whose_launcher_was_killed_save_and_end_if_the_setting_says_so(tmp_path):
    mark = tmp_path / "mark"
    command = argv(tmp_path, "run", run__checkpoint_every=0, run__end_with_launcher="true", evaluation__every=0)
    fault = {"phase": "update", "do": "mark", "path": str(mark), "nth": 2, "wait": 2}
    process = start(tmp_path, [launch("run", command, fault=fault, in_process=True)])
    wait_for_mark(mark, process)
    process.kill()
    out, problems = process.communicate(timeout=60)  # until the ranks have closed its output
    assert "stopped by the end of its launcher after step 2; continue with --resume" in out, problems
    assert (tmp_path / "run" / "checkpoints" / "step-000002").exists()
    expiry = time.monotonic() + 20
    while left := processes_naming(str(tmp_path)):
        assert time.monotonic() < expiry, left
        time.sleep(0.1)
