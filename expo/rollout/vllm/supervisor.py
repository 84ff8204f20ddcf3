"""Servers kept alive and on the present weights, by rank 0: a thread for each looks after it between the syncs.

A server that the run has started and that died is started again; one that has lost its weights, whoever started it, is
given them again. The ranks that wait for its replies know nothing of it: their requests are refused until the server
has the weights that they ask for, and then answered.
"""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from expo.errors import ConfigError, EngineError
from expo.rollout.vllm.client import HEALTH, Server, ServerUnavailable, retry
from expo.rollout.vllm.transfer.interface import Weights

MAX_RESTARTS = 3  # of one server between two weight syncs
LOOK_S = 0.5
LOG_TAIL = 2000  # characters shown of a server's log when it does not start
END_S = 8.0  # for a server to end when asked to


class ServerProcess:
    """A server that the run has started, on this machine and in a process group of its own.

    Its stdin is a pipe that nobody writes to: when this process ends, however it ends, the pipe closes, and `guard`
    sees to the rest.

    Args:
        config_path: the run's.
        log: file that takes what it prints.
        folder: of the weights, if they go through files.
        gpus: CUDA devices that it may use; none: as they are here.
        threads: CPU threads; None: as vLLM chooses.
    """

    def __init__(
        self, config_path: Path, log: Path, folder: Path | None, gpus: Sequence[int], threads: int | None
    ) -> None:
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._command = [sys.executable, "-m", "expo.serve", str(config_path), f"--port={port}", "--guarded"]
        if folder is not None:
            self._command.append(f"--cleanup-dir={folder}")
        self._environment = dict(os.environ)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            self._environment.pop(name, None)  # the server is no rank of the run
        if gpus:
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(number) for number in gpus)
        if threads is not None:
            self._environment.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; it is ready when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    @property
    def is_dead(self) -> bool:
        """Whether it has ended."""
        return self._process is None or self._process.poll() is not None

    def end(self) -> None:
        """Ends all its processes."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * END_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # those too whose guard was killed
        self._process.wait()
        self._process = None

    def log_tail(self) -> str:
        """Where its log is, and the end of it on one line."""
        with suppress(OSError):
            return f"{self._log} ends with: {' '.join(self._log.read_text(errors='replace')[-LOG_TAIL:].split())}"
        return f"its log is {self._log}"


class Supervisor:
    """Looks after one server.

    Args:
        server: which one.
        process: it, if the run starts it; None: someone else does.
        weights: what it must have.
        patience_s: seconds that it may be away.
    """

    def __init__(self, server: Server, process: ServerProcess | None, weights: Weights, patience_s: float) -> None:
        self.server, self._process, self._weights, self._patience_s = server, process, weights, patience_s
        self._restarts = 0
        self._problem: EngineError | None = None
        self._closing = threading.Event()
        self._at_work = threading.Lock()  # one brings weights at a time
        self._thread = threading.Thread(target=self._watch, name=f"supervisor of {server.url}", daemon=True)

    def start(self) -> None:
        """Starts the server, if that is ours to do."""
        if self._process is not None:
            self._process.start()

    def wait_until_ready(self) -> None:
        """Returns when it answers, and looks after it from then on. Raises: ConfigError if it does not start."""
        try:
            retry(self.server, self._patience_s, self._require_life, lambda: self.server.get(HEALTH))
        except EngineError as error:
            raise ConfigError(str(error)) from error
        self._thread.start()

    def _require_life(self) -> None:
        if self._process is not None and self._process.is_dead:
            raise EngineError(f"the vLLM server does not start; {self._process.log_tail()}")

    def check(self) -> None:
        """Raises: EngineError if the server cannot be kept."""
        if self._problem is not None:
            raise self._problem

    def sync(self) -> None:
        """Returns when the server has the present weights. Raises: EngineError."""
        retry(self.server, self._patience_s, self.check, self._bring)
        self._restarts = 0

    def _bring(self) -> None:
        """Brings the weights if there are any and the server has not."""
        with self._at_work:
            version = self._weights.version
            if version is not None and self.server.get("/weight_info")["weight_version"] != version:
                self._weights.bring(self.server, version)

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_S):
            try:
                self._look()
            except ServerUnavailable:
                continue
            except EngineError as error:
                self._problem = error
                return

    def _look(self) -> None:
        if self._process is not None and self._process.is_dead:
            if self._restarts == MAX_RESTARTS:
                raise EngineError(
                    f"the vLLM server has died {MAX_RESTARTS + 1} times since the last weight sync; "
                    f"{self._process.log_tail()}; mend that, then go on with --resume"
                )
            self._restarts += 1
            self._process.end()
            self._process.start()
        self._bring()

    def close(self) -> None:
        """Ends the server, if it is ours."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(END_S)
        if self._process is not None:
            self._process.end()


def guard(folder: Path | None) -> None:
    """Returns in a new process, which the one that called stays to guard.

    It waits until our stdin closes, because the process that started us has ended in whatever way, or until the new
    process has ended. Then it ends that, what is left of their process group, and in the first case removes `folder`.
    """
    server = os.fork()
    if server == 0:
        return
    while not _has_ended(server):
        if select.select([sys.stdin], [], [], LOOK_S)[0]:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            _end(server)
            break
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _end(process: int) -> None:
    """Asks a child to end, and returns when it has, having given back its shared memory, or after END_S."""
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline and not _has_ended(process):
        time.sleep(0.05)


def _has_ended(process: int) -> bool:
    return os.waitpid(process, os.WNOHANG)[0] != 0
