"""Checkpoints that are killed while they are written, spoiled afterwards, or find no room on the disk."""

import json
import subprocess
import sys
import zlib

import pytest

from tests import ROOT
from tests.ranks.running import argv, environment, facts, life, lived, rows_of, said

pytestmark = pytest.mark.slow


def is_whole(path):
    """Whether every file of a checkpoint is as its manifest says."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    contents = {name: (path / name).read_bytes() for name in files}
    return all([len(content), zlib.crc32(content)] == files[name] for name, content in contents.items())


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_twenty_kills_while_saving_lose_nothing(tmp_path):
    steps, kills = 26, 20
    quick = {"run__checkpoint_every": 1, "run__steps": steps, "evaluation__every": 0}
    assert lived(tmp_path, [life("whole", argv(tmp_path, "whole", **quick), ranks=1)], ranks=1) == {"whole": [0]}
    script = [sys.executable, "-m", "tests.ranks.kills", str(tmp_path), str(kills)]
    done = subprocess.run(
        [*script, *argv(tmp_path, "run", **quick)], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "not whole" not in done.stderr, "what bears its final name is whole"
    left = json.loads((tmp_path / "left.json").read_text())
    assert len(left) == kills
    assert sum(".part" in name for kill in left for name in kill["names"]) >= 5, "the kills came while saving"
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole") == ["latest", "step-000025", "step-000026"]
    assert all(is_whole(tmp_path / "run" / "checkpoints" / f"step-{step:06d}") for step in (25, 26))
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".lock"]


WAYS = ("truncated", "flipped", "missing", "manifest cut", "manifest changed", "manifest emptied")


def test_a_spoiled_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path):
    quick = {"run__checkpoint_every": 1, "run__steps": 3, "policy__zero_stage": 1, "run__keep_checkpoints": 3}
    plan = [life("whole", argv(tmp_path, "whole", **quick))]
    for way in WAYS:
        run = tmp_path / way
        spoils = [(run / "checkpoints" / "step-000003", way)]
        command = argv(tmp_path, way, resume=True, **quick)
        plan.append(life(way, command, copies=[(tmp_path / "whole", run)], spoils=spoils))
    run = tmp_path / "all"
    spoils = [(run / "checkpoints" / f"step-{step:06d}", "truncated") for step in (1, 2, 3)]
    command = argv(tmp_path, "all", resume=True, **quick)
    plan.append(life("all", command, copies=[(tmp_path / "whole", run)], spoils=spoils))
    codes = lived(tmp_path, plan)
    whole = facts(tmp_path / "whole")
    for way in WAYS:
        assert codes[way] == [0, 0], said(tmp_path, way)
        assert "step-000003 is not whole" in said(tmp_path, way)
        assert "resuming after step 2 of 3" in said(tmp_path, way)
        assert facts(tmp_path / way) == whole
        assert is_whole(tmp_path / way / "checkpoints" / "step-000003"), "it is written again"
        assert checkpoints(tmp_path / way) == checkpoints(tmp_path / "whole")
        assert said(tmp_path, way, rank=1) == ""
    assert codes["all"] == [1, 1]
    assert "none of the 3 checkpoints" in said(tmp_path, "all").splitlines()[-1]
    assert rows_of(tmp_path / "all", "metrics") == rows_of(tmp_path / "whole", "metrics"), "nothing is begun anew"


def test_a_full_disk_on_one_rank_is_reported_and_the_run_goes_on(tmp_path):
    quick = {"run__checkpoint_every": 1, "run__steps": 3, "run__keep_checkpoints": 3, "evaluation__every": 0}
    plan, cases = [life("whole", argv(tmp_path, "whole", **quick))], {}
    for rank in (0, 1):
        for room in (0, 100, 2**20):  # the system says so at the end; even the small files; the large files alone
            for stage in (0, 3) if room == 2**20 else (2,):
                name = f"full-{rank}-{room}-{stage}"
                if rank == 1 and stage == 0:
                    continue  # it writes only small files
                fault = {"phase": "full disk", "nth": 2, "bytes": room, "on_ranks": [rank]}
                command = argv(tmp_path, name, policy__zero_stage=stage, **quick)
                plan.append(life(name, command, fault=fault))
                cases[name] = rank
    codes = lived(tmp_path, plan)
    assert codes["whole"] == [0, 0]
    for name, rank in cases.items():
        assert codes[name] == [0, 0], said(tmp_path, name) + said(tmp_path, name, rank=1)
        (warning,) = [line for line in said(tmp_path, name).splitlines() if "warning" in line]
        assert "step-000002 could not be written" in warning
        assert f"rank {rank}: OSError" in warning
        assert checkpoints(tmp_path / name) == ["latest", "step-000001", "step-000003"]
        assert all(is_whole(tmp_path / name / "checkpoints" / f"step-{step:06d}") for step in (1, 3))
        assert len(rows_of(tmp_path / name, "metrics")) == 3
