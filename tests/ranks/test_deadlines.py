"""A rank that dies or hangs ends the whole run in time, and says where."""

import time

import pytest

from tests.ranks.running import argv, kill_all, life, processes_naming, start

pytestmark = pytest.mark.slow
DEADLINE_S = 5
GRACE_S = 10  # promised beyond the deadline

# what befalls rank 1, in which phase, and whether it writes down its own stacks
FAULTS = {
    "raises": ("raise", "update", False),
    "is killed": ("kill", "update", False),
    "exits": ("exit", "sync", False),
    "sleeps": ("sleep", "update", True),
    "is stopped": ("stop", "rollout", False),
    "is stopped between phases": ("stop", "record", False),
}
WAITED_IN = {"record": "save"}  # where the other ranks stand, by another name


def ended(folder, fault, ranks=2):
    """Seconds from the fault to the end of torchrun, its exit code and what was said on stderr, and who stayed."""
    mark, phase = folder / "struck", WAITED_IN.get(fault["phase"], fault["phase"])
    command = argv(folder, "run", fractions=True, run__checkpoint_every=1, **{f"deadline__{phase}": DEADLINE_S})
    process = start(folder, [life("run", command, ranks, {**fault, "mark": str(mark)}, here=True)], ranks)
    try:
        while not mark.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        struck = time.monotonic()
        problems = process.communicate(timeout=60)[1]
        while (left := processes_naming(str(folder))) and time.monotonic() < struck + DEADLINE_S + GRACE_S:
            time.sleep(0.05)
        return time.monotonic() - struck, process.returncode, problems, left
    finally:
        kill_all(str(folder))


@pytest.mark.parametrize("what", FAULTS)
def test_a_rank_that_dies_or_hangs_ends_the_run(tmp_path, what):
    do, phase, writes_stacks = FAULTS[what]
    nth = 3 if phase in ("sync", "record") else 2  # a step after which nothing is evaluated
    took, code, problems, left = ended(tmp_path, {"phase": phase, "do": do, "nth": nth, "on_ranks": [1]})
    assert took < DEADLINE_S + GRACE_S, problems
    assert code != 0
    assert f"phase {WAITED_IN.get(phase, phase)}" in problems
    assert left == {}, "processes of the run are still there"
    hangs = do in ("sleep", "stop")
    stacks = {path.name for path in (tmp_path / "run").glob("stacks-*")}
    assert stacks == ({"stacks-rank0.txt"} if hangs else set()) | ({"stacks-rank1.txt"} if writes_stacks else set())
    if hangs:
        assert "File " in problems
        assert "in train\n" in (tmp_path / "run" / "stacks-rank0.txt").read_text()


def test_code_that_never_lets_go_of_the_interpreter_is_ended_too(tmp_path):
    took, code, problems, left = ended(tmp_path, {"phase": "reference", "do": "spin", "nth": 2}, ranks=1)
    assert took < DEADLINE_S + GRACE_S, problems
    assert code != 0
    assert 'lives.py", line' in problems
    assert left == {}
