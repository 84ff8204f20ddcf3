"""Checkpoints that are interrupted while they are written, corrupted afterwards, or meet a full disk."""

import json
import subprocess
import sys
import zlib

import pytest

from tests import ROOT
from tests.ranks.running import argv, environment, launch, log_of, outcome_of, rows_of, run_launches

pytestmark = pytest.mark.slow


def is_whole(path):
    """Whether every file of a checkpoint matches the manifest."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    contents = {name: (path / name).read_bytes() for name in files}
    return all([len(content), zlib.crc32(content)] == files[name] for name, content in contents.items())


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_twenty_kills_while_saving_lose_nothing(tmp_path):
    steps, kills = 26, 20
    quick = {"run__checkpoint_every": 1, "run__steps": steps, "evaluation__every": 0}
    assert run_launches(tmp_path, [launch("whole", argv(tmp_path, "whole", **quick), ranks=1)], ranks=1) == {
        "whole": [0]
    }
    script = [sys.executable, "-m", "tests.ranks.kill_while_saving", str(tmp_path), str(kills)]
    done = subprocess.run(
        [*script, *argv(tmp_path, "run", **quick)], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "not whole" not in done.stderr, "a checkpoint with its final name is whole"
    left = json.loads((tmp_path / "left.json").read_text())
    assert len(left) == kills
    assert sum(".part" in name for kill in left for name in kill["names"]) >= 5, "the kills came while saving"
    assert outcome_of(tmp_path / "run") == outcome_of(tmp_path / "whole")
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole") == ["latest", "step-000025", "step-000026"]
    assert all(is_whole(tmp_path / "run" / "checkpoints" / f"step-{step:06d}") for step in (25, 26))
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".lock"]


DAMAGES = ("truncated", "flipped", "missing", "manifest cut", "manifest changed", "manifest emptied")


def test_a_spoiled_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path):
    quick = {"run__checkpoint_every": 1, "run__steps": 3, "policy__zero_stage": 1, "run__keep_checkpoints": 3}
    plan = [launch("whole", argv(tmp_path, "whole", **quick))]
    for damage in DAMAGES:
        run = tmp_path / damage
        corruptions = [(run / "checkpoints" / "step-000003", damage)]
        command = argv(tmp_path, damage, resume=True, **quick)
        plan.append(launch(damage, command, copies=[(tmp_path / "whole", run)], corruptions=corruptions))
    run = tmp_path / "all"
    corruptions = [(run / "checkpoints" / f"step-{step:06d}", "truncated") for step in (1, 2, 3)]
    command = argv(tmp_path, "all", resume=True, **quick)
    plan.append(launch("all", command, copies=[(tmp_path / "whole", run)], corruptions=corruptions))
    codes = run_launches(tmp_path, plan)
    whole = outcome_of(tmp_path / "whole")
    for damage in DAMAGES:
        assert codes[damage] == [0, 0], log_of(tmp_path, damage)
        assert "step-000003 is not whole" in log_of(tmp_path, damage)
        assert "resuming after step 2 of 3" in log_of(tmp_path, damage)
        assert outcome_of(tmp_path / damage) == whole
        assert is_whole(tmp_path / damage / "checkpoints" / "step-000003"), "it is written again"
        assert checkpoints(tmp_path / damage) == checkpoints(tmp_path / "whole")
        assert log_of(tmp_path, damage, rank=1) == ""
    assert codes["all"] == [1, 1]
    assert "none of the 3 checkpoints" in log_of(tmp_path, "all").splitlines()[-1]
    assert rows_of(tmp_path / "all", "metrics") == rows_of(tmp_path / "whole", "metrics"), "the run is not started over"


def test_a_full_disk_on_one_rank_is_reported_and_the_run_goes_on(tmp_path):
    quick = {"run__checkpoint_every": 1, "run__steps": 3, "run__keep_checkpoints": 3, "evaluation__every": 0}
    plan, cases = [launch("whole", argv(tmp_path, "whole", **quick))], {}
    for rank in (0, 1):
        for num_bytes in (0, 100, 2**20):  # fsync fails; all files are too large; the large files are
            for stage in (0, 3) if num_bytes == 2**20 else (2,):
                name = f"full-{rank}-{num_bytes}-{stage}"
                if rank == 1 and stage == 0:
                    continue  # it writes only small files
                fault = {"phase": "full disk", "nth": 2, "bytes": num_bytes, "on_ranks": [rank]}
                command = argv(tmp_path, name, policy__zero_stage=stage, **quick)
                plan.append(launch(name, command, fault=fault))
                cases[name] = rank
    codes = run_launches(tmp_path, plan)
    assert codes["whole"] == [0, 0]
    for name, rank in cases.items():
        assert codes[name] == [0, 0], log_of(tmp_path, name) + log_of(tmp_path, name, rank=1)
        (warning,) = [line for line in log_of(tmp_path, name).splitlines() if "warning" in line]
        assert "step-000002 could not be written" in warning
        assert f"rank {rank}: OSError" in warning
        assert checkpoints(tmp_path / name) == ["latest", "step-000001", "step-000003"]
        assert all(is_whole(tmp_path / name / "checkpoints" / f"step-{step:06d}") for step in (1, 3))
        assert len(rows_of(tmp_path / name, "metrics")) == 3
