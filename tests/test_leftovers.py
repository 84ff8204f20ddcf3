"""The check for leftovers finds what it is there for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import leftovers


@pytest.fixture
def sleeper(monkeypatch):
    """A process under a mark of its own, whose command line looks like one of ours."""
    monkeypatch.setenv(leftovers.MARK, "sleeper")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "torchrun"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_outlives_its_test_is_found_and_ended(sleeper, monkeypatch):
    monkeypatch.setattr(leftovers, "GRACE_S", 0.0)
    assert leftovers.processes("another") == {}
    (command,) = leftovers.end_processes("sleeper")
    assert command.endswith("torchrun")
    assert sleeper.wait(timeout=60) < 0


def test_the_processes_of_a_test_file_are_marked():
    assert len(os.environ[leftovers.MARK]) == 32


def test_new_files_in_the_repository_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "ROOT", tmp_path)
    (tmp_path / "runs").mkdir()
    before = leftovers.repository_files()
    (tmp_path / "runs" / "20260101").mkdir()
    (tmp_path / "stray.txt").touch()
    (tmp_path / "__pycache__").mkdir()
    assert leftovers.repository_files() - before == {"runs/20260101", "stray.txt"}


def test_a_run_compiles_kernels_into_its_own_folder(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    assert Path(os.environ["TRITON_CACHE_DIR"]).parent in (base, base.parent)
