"""Supervision of the servers by rank 0: a thread for each server restarts it and sends it the current weights.

A server that the run started is restarted when it dies; any server that lost its weights is sent them again. The ranks
that wait for its replies need not know: they repeat their requests until the server has the current weights.
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
from expo.rollout.vllm.key import VARIABLE
from expo.rollout.vllm.transfer.interface import WeightTransfer, weight_version

MAX_RESTARTS = 3  # of one server between two weight syncs
CHECK_INTERVAL_S = 0.5
LOG_TAIL = 2000  # characters shown of the log of a server that does not start
TERMINATE_S = 8.0  # grace period between SIGTERM and SIGKILL


class ServerProcess:
    """A server that the run starts on this machine, in a process group of its own.

    Its stdin is a pipe that is never written to: when this process ends for any reason, the pipe closes, and
    `fork_guarded` in the server's process ends the server. Its port is reserved until `release`: while the server
    restarts, another user's program there would be sent the key.

    Args:
        config_path: the run's config.yaml.
        log: file for its output.
        folder: of the weights, if they are transferred through files.
        gpus: CUDA devices that it may use; empty: those of this process.
        threads: CPU threads; None: vLLM's choice.
        key: that the server requires; it is in the environment, which other users cannot read.
    """

    def __init__(
        self, config_path: Path, log: Path, folder: Path | None, gpus: Sequence[int], threads: int | None, key: str
    ) -> None:
        self._reserved = reserve_port()
        port = self._reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._command = [sys.executable, "-m", "expo.serve", str(config_path), f"--port={port}", "--guarded"]
        if folder is not None:
            self._command.append(f"--cleanup-dir={folder}")
        self._environment = {**os.environ, VARIABLE: key}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            self._environment.pop(name, None)  # the server is not a rank of the run
        if gpus:
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(number) for number in gpus)
        if threads is not None:
            self._environment.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process; the server is ready when it answers."""
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
    def has_exited(self) -> bool:
        """Whether the process has ended, or was never started."""
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        """Ends the server and all its child processes."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * TERMINATE_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the guard may have been killed
        self._process.wait()
        self._process = None

    def release(self) -> None:
        """Frees the port, once the server has been stopped for good."""
        self._reserved.close()

    def log_tail(self) -> str:
        """The path of its log, and the end of the log on one line."""
        with suppress(OSError):
            return f"{self._log} ends with: {' '.join(self._log.read_text(errors='replace')[-LOG_TAIL:].split())}"
        return f"its log is {self._log}"


class Supervisor:
    """Keeps one server running and on the current weights.

    Args:
        server: the server.
        process: its process, if the run starts it; None: it is started by others.
        weights: the current weights.
        patience_s: seconds that the server may be unavailable.
    """

    def __init__(
        self, server: Server, process: ServerProcess | None, weights: WeightTransfer, patience_s: float
    ) -> None:
        self.server, self._process, self._weights, self._patience_s = server, process, weights, patience_s
        self._restarts = 0
        self._problem: EngineError | None = None
        self._closing = threading.Event()
        self._send_lock = threading.Lock()  # held by the thread that sends weights
        self._thread = threading.Thread(target=self._watch, name=f"supervisor of {server.url}", daemon=True)

    def start(self) -> None:
        """Starts the server, if the run has to."""
        if self._process is not None:
            self._process.start()

    def wait_until_ready(self) -> None:
        """Waits until the server answers, then begins to supervise it. Raises: ConfigError if it does not start."""
        try:
            retry(self.server, self._patience_s, self._require_process, lambda: self.server.get(HEALTH))
        except EngineError as error:
            raise ConfigError(str(error)) from error
        self._thread.start()

    def _require_process(self) -> None:
        if self._process is not None and self._process.has_exited:
            raise EngineError(f"the vLLM server does not start; {self._process.log_tail()}")

    def check(self) -> None:
        """Raises: EngineError if the server cannot be kept running."""
        if self._problem is not None:
            raise self._problem

    def sync(self) -> None:
        """Waits until the server has the current weights. Raises: EngineError."""
        retry(self.server, self._patience_s, self.check, self._send_weights)
        self._restarts = 0

    def _send_weights(self) -> None:
        """Sends the current weights, unless the server has them."""
        with self._send_lock:
            version = self._weights.version
            if version is not None and weight_version(self.server) != version:
                self._weights.send(self.server, version)

    def _watch(self) -> None:
        while not self._closing.wait(CHECK_INTERVAL_S):
            try:
                self._repair()
            except ServerUnavailable:
                continue
            except EngineError as error:
                self._problem = error
                return

    def _repair(self) -> None:
        """Restarts a server that has died, and sends weights that it lacks."""
        if self._process is not None and self._process.has_exited:
            if self._restarts == MAX_RESTARTS:
                raise EngineError(
                    f"the vLLM server has died {MAX_RESTARTS + 1} times since the last weight sync; "
                    f"{self._process.log_tail()}; fix the cause, then go on with --resume"
                )
            self._restarts += 1
            self._process.stop()
            self._process.start()
        self._send_weights()

    def close(self) -> None:
        """Ends the supervision, and the server if the run started it."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(TERMINATE_S)
        if self._process is not None:
            self._process.stop()
            self._process.release()


def reserve_port() -> socket.socket:
    """A socket bound to a free local port, at which only a process of this user can listen then, if it sets
    SO_REUSEPORT too; `share_port` has vLLM set it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def fork_guarded(folder: Path | None) -> None:
    """Forks this process: returns in the child, which becomes the server, while the parent stays as its guard.

    The guard waits until stdin closes, because the run's process has ended for any reason, or until the server has
    ended. It then ends the server and the rest of the process group, and in the first case removes `folder`.
    """
    server = os.fork()
    if server == 0:
        return
    while not _has_ended(server):
        if select.select([sys.stdin], [], [], CHECK_INTERVAL_S)[0]:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            _terminate(server)
            break
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _terminate(process: int) -> None:
    """Sends SIGTERM to a child and waits until it has ended and freed its shared memory, at most TERMINATE_S."""
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + TERMINATE_S
    while time.monotonic() < deadline and not _has_ended(process):
        time.sleep(0.05)


def _has_ended(process: int) -> bool:
    return os.waitpid(process, os.WNOHANG)[0] != 0
