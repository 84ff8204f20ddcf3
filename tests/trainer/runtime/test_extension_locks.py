"""Locks of builds of extensions: one that a process holds stays, one that nobody holds is removed."""

import os
import subprocess
import sys
import time

import pytest

from expo.runtime import extension_locks
from expo.runtime.extension_locks import remove_abandoned_locks

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path):
    """The lock of an extension; its folder holds sources too."""
    folder = tmp_path / "py311_cpu" / "extension"
    folder.mkdir(parents=True)
    (folder / "build.ninja").touch()
    (tmp_path / "py311_cpu" / "locked").touch()
    return folder / "lock"


def test_the_lock_of_a_killed_build_is_removed_and_that_of_a_running_one_stays(tmp_path, lock, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    assert remove_abandoned_locks(tmp_path) == []
    assert lock.exists()
    holder.kill()
    holder.communicate()
    assert lock.exists(), "PyTorch leaves it"
    assert remove_abandoned_locks(tmp_path) == [lock]
    assert not lock.exists()
    assert (lock.parent / "build.ninja").exists()
    assert f"removed {lock}" in capsys.readouterr().err
    assert remove_abandoned_locks(tmp_path) == []


def test_where_other_machines_may_build_a_lock_is_removed_after_an_hour_without_a_change(tmp_path, lock, monkeypatch):
    monkeypatch.setattr(extension_locks, "_file_system", lambda _: "nfs4")
    lock.touch()
    long_ago = time.time() - 2 * extension_locks.ABANDONED_S
    os.utime(lock, (long_ago, long_ago))
    assert remove_abandoned_locks(tmp_path) == [], "a source has just changed"
    os.utime(lock.parent / "build.ninja", (long_ago, long_ago))
    assert remove_abandoned_locks(tmp_path) == [lock]


def test_the_folder_is_the_one_that_pytorch_takes(tmp_path, lock, monkeypatch):
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert str(extension_locks._build_root()) == get_default_build_root()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "py311_cpu"))
    lock.touch()
    assert remove_abandoned_locks() == [lock]
