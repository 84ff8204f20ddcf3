"""Servers that the run starts: failures at their start, and their end together with the run."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from expo.errors import ConfigError
from expo.rollout.vllm.client import Server
from expo.rollout.vllm.key import new_key
from expo.rollout.vllm.supervisor import ServerProcess, Supervisor

pytestmark = pytest.mark.medium


def test_the_log_of_a_server_that_does_not_start_is_shown(tmp_path):
    process = ServerProcess(tmp_path / "missing.yaml", tmp_path / "log", tmp_path / "weights", [], None, new_key())
    supervisor = Supervisor(Server(process.url), process, None, 60.0)
    supervisor.start()
    with pytest.raises(ConfigError, match=r"does not start; .* cannot read the config file"):
        supervisor.wait_until_ready()
    supervisor.close()


GUARDED = """
import subprocess, sys, time
from pathlib import Path
from expo.rollout.vllm import supervisor
supervisor.TERMINATE_S = 0.5
supervisor.fork_guarded(Path(sys.argv[1]))
immune = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
print(subprocess.Popen([sys.executable, "-c", immune]).pid, flush=True)
time.sleep(0 if sys.argv[2] == "exits" else 99)
"""


@pytest.mark.parametrize("server", ["runs", "exits"])
def test_a_server_and_its_children_end_with_the_run_and_with_each_other(tmp_path, server):
    folder = tmp_path / "weights"
    folder.mkdir()
    command = [sys.executable, "-c", GUARDED, str(folder), server]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    child = int(process.stdout.readline())
    if server == "runs":
        process.stdin.close()
    process.wait(20)
    process.stdin.close()
    process.stdout.close()
    assert folder.exists() == (server == "exits")
    for _ in range(100):
        if not is_running(child):
            return
        time.sleep(0.05)
    pytest.fail("a child of the server is still running")


def is_running(process):
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
