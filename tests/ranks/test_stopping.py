"""Asked to stop, in any phase and by any rank, a run saves and ends; resumed, it ends as if never asked."""

import json
import signal
import socket
import sys
import time

import pytest

from tests.ranks.running import LIVES, argv, begun, facts, life, lived, said, start

pytestmark = pytest.mark.slow

# the phase and which entrance into it; the step after which the run stops, None where it was about to end anyway
PHASES = {
    "start": (1, 0),
    "curriculum": (3, 1),
    "rollout": (2, 1),
    "reward": (2, 1),
    "reference": (2, 1),
    "update": (2, 2),
    "weights": (3, 2),  # brought to the rollout engine
    "evaluation": (2, 2),
    "checkpoint": (1, 2),
    "export": (1, None),
}


def test_a_signal_in_any_phase_leaves_a_checkpoint_of_the_same_run(tmp_path):
    quick = {"run__checkpoint_every": 2, "run__steps": 3}
    plan = [life("whole", argv(tmp_path, "whole", **quick), ranks=1)]
    for phase, (nth, _) in PHASES.items():
        command = argv(tmp_path, phase, **quick)
        plan.append(life(phase, command, ranks=1, fault={"phase": phase, "do": "term", "nth": nth}))
        if phase != "export":
            plan.append(life(f"{phase}-resumed", [*command, "--resume"], ranks=1))
    codes = lived(tmp_path, plan, ranks=1)
    assert set(map(tuple, codes.values())) == {(0,)}, codes
    whole = facts(tmp_path / "whole")
    for phase, (_, step) in PHASES.items():
        if step is not None:
            assert f"stopped by SIGTERM after step {step};" in said(tmp_path, phase), phase
            assert f"resuming after step {step} of 3" in said(tmp_path, f"{phase}-resumed")
        assert facts(tmp_path / phase) == whole, phase


def test_a_signal_to_one_rank_or_the_end_of_the_time_stops_all(tmp_path):
    quick = {"run__checkpoint_every": 0, "run__steps": 3, "policy__zero_stage": 2}
    plan = [life("whole", argv(tmp_path, "whole", **quick))]
    for do, phase in (("term", "rollout"), ("usr1", "update")):
        fault = {"phase": phase, "do": do, "nth": 2, "on_ranks": [1]}
        command = argv(tmp_path, do, **quick)
        plan += [life(do, command, fault=fault), life(f"{do}-resumed", [*command, "--resume"])]
    command = argv(tmp_path, "time", **quick)
    plan += [life("time", [*command, "--run.save_by_minutes=0.001"]), life("time-resumed", [*command, "--resume"])]
    codes = lived(tmp_path, plan)
    assert set(map(tuple, codes.values())) == {(0, 0)}, codes
    assert "stopped by SIGTERM after step 1" in said(tmp_path, "term")
    assert "stopped by SIGUSR1 after step 2" in said(tmp_path, "usr1")
    assert "stopped by run.save_by_minutes after step 0" in said(tmp_path, "time")
    for name in ("term", "usr1", "time"):
        assert facts(tmp_path / name) == facts(tmp_path / "whole"), name


def test_a_signal_to_torchrun_leaves_a_checkpoint(tmp_path):
    quick = {"run__checkpoint_every": 0, "run__steps": 3, "fractions": True}
    mark = tmp_path / "mark"
    # torchrun signals the whole group of each rank, the verifier's processes too, while answers are being graded
    fault = {"phase": "grading", "do": "mark", "path": str(mark), "wait": 3}
    process = start(tmp_path, [life("run", argv(tmp_path, "run", **quick), fault=fault, here=True)])
    while not mark.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, problems = process.communicate(timeout=120)
    assert "stopped by SIGTERM after step 0; continue with --resume" in out, problems
    assert process.returncode == 1, "torchrun says so of any signal"
    command = argv(tmp_path, "run", resume=True, **quick)
    codes = lived(tmp_path, [life("whole", argv(tmp_path, "whole", **quick)), life("resumed", command)])
    assert codes == {"whole": [0, 0], "resumed": [0, 0]}
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def test_a_rank_that_waits_for_the_others_ends_at_once(tmp_path):
    mark = tmp_path / "mark"
    plan = [life("run", argv(tmp_path, "run"), fault={"phase": "join", "do": "mark", "path": str(mark)}, here=True)]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
        process = begun(tmp_path, [sys.executable, LIVES, tmp_path], MASTER_PORT=str(nobody.getsockname()[1]), **place)
        while not mark.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(1)  # it is asking for the others by now
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "run").exists()
