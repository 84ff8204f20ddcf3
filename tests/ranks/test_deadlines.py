"""If a rank dies or hangs, the whole run ends within the deadline, and reports the phase."""

import re
import time

import pytest

from tests.ranks.running import argv, kill_all, launch, processes_naming, start, wait_for_mark

pytestmark = pytest.mark.slow
DEADLINE_S = 5
GRACE_S = 10  # allowed after the deadline

# the fault of rank 1, its phase, and whether rank 1 writes its own stacks
FAULTS = {
    "raises": ("raise", "update", False),
    "is killed": ("kill", "update", False),
    "exits": ("exit", "sync", False),
    "sleeps": ("sleep", "update", True),
    "is stopped": ("stop", "rollout", False),
    "is stopped between phases": ("stop", "record", False),
}
# the phases in which the other rank may learn of it: one that exits takes what it has not sent of the phase before
LEARNED_IN = {"record": ("save",), "sync": ("update", "sync")}


def ended(folder, fault, ranks=2):
    """Seconds from the fault to the end of torchrun, its exit code, its stderr, and the processes that remain."""
    phase = LEARNED_IN.get(fault["phase"], (fault["phase"],))[-1]
    command = argv(folder, "run", by_workers=True, run__checkpoint_every=1, **{f"deadline__{phase}": DEADLINE_S})
    return watched(folder, command, [fault], ranks)


def watched(folder, command, faults, ranks=2):
    """As `ended`, of a run with several faults, from the first of them."""
    mark = folder / "injected"
    faults = [{**faults[0], "mark": str(mark)}, *faults[1:]]
    process = start(folder, [launch("run", command, ranks, faults, in_process=True)], ranks)
    try:
        wait_for_mark(mark, process)
        injected = time.monotonic()
        problems = process.communicate(timeout=60)[1]
        while (left := processes_naming(str(folder))) and time.monotonic() < injected + DEADLINE_S + GRACE_S:
            time.sleep(0.05)
        return time.monotonic() - injected, process.returncode, problems, left
    finally:
        kill_all(str(folder))


@pytest.mark.parametrize("what", FAULTS)
def test_a_rank_that_dies_or_hangs_ends_the_run(tmp_path, what):
    do, phase, writes_stacks = FAULTS[what]
    nth = 3 if phase in ("sync", "record") else 2  # a step after which nothing is evaluated
    took, code, problems, left = ended(tmp_path, {"phase": phase, "do": do, "nth": nth, "on_ranks": [1]})
    assert took < DEADLINE_S + GRACE_S, problems
    assert code != 0
    named = any(f"phase {name}" in problems for name in LEARNED_IN.get(phase, (phase,)))
    # torchrun names a rank that was killed, and may end the other one before it learns of it
    assert named or (do == "kill" and "rank      : 1" in problems.partition("Root Cause")[2]), problems
    assert left == {}, "processes of the run are still there"
    hangs = do in ("sleep", "stop")
    stacks = {path.name for path in (tmp_path / "run").glob("stacks-*")}
    assert stacks == ({"stacks-rank0.txt"} if hangs else set()) | ({"stacks-rank1.txt"} if writes_stacks else set())
    if hangs:
        assert "File " in problems
        assert "in train\n" in (tmp_path / "run" / "stacks-rank0.txt").read_text()


def test_code_that_never_releases_the_gil_is_ended_too(tmp_path):
    took, code, problems, left = ended(tmp_path, {"phase": "reference", "do": "spin", "nth": 2}, ranks=1)
    assert took < DEADLINE_S + GRACE_S, problems
    assert code != 0
    assert 'launcher.py", line' in problems
    assert left == {}


def test_an_error_in_sampling_is_named_while_another_rank_samples_for_ever(tmp_path):
    faults = [
        {"phase": "sampling", "do": "raise", "on_ranks": [1], "nth": 2},
        {"phase": "sampling", "do": "sleep", "on_ranks": [0], "nth": 2},
    ]
    command = argv(tmp_path, "run", evaluation__every=0, deadline__rollout=DEADLINE_S)
    took, code, problems, left = watched(tmp_path, command, faults)
    assert took < DEADLINE_S + GRACE_S, problems
    assert code != 0
    assert "rank 1 waits to end: rank 1 failed: RuntimeError: injected" in problems
    assert "phase rollout" in problems
    assert left == {}


TORCHRUN_KILLS_AFTER_S = 30  # from its SIGTERM; deadline.start is longer in these tests
KILL = {"do": "kill", "on_ranks": [0]}
DEATHS = {
    "before the ranks connect": (
        [{"phase": "connect", **KILL}],
        r"rank 1, phase start: it waits for (its connections to the other ranks|rank 0): ended by SIGTERM",
    ),
    "while the other ranks do not react": (
        [{"phase": "start", **KILL}, {"phase": "start", "do": "sleep", "on_ranks": [1]}],
        r"rank 1: rank 0 \(process \d+\) has died in phase start; this rank is ended",
    ),
}


@pytest.mark.parametrize("when", DEATHS)
def test_the_others_name_rank_0_that_dies_while_the_run_starts(tmp_path, when):
    faults, line = DEATHS[when]
    took, code, problems, left = watched(tmp_path, argv(tmp_path, "run", deadline__start=120), faults)
    assert took < TORCHRUN_KILLS_AFTER_S - 5, problems
    assert code != 0
    assert re.search(line, problems), problems
    assert left == {}
