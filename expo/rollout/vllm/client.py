"""A vLLM server as seen from the trainer: one call, or many at once, over HTTP."""

import http.client
import json
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from expo.config import VllmSection
from expo.errors import EngineError

PATIENCE_S: float = VllmSection().patience_s
HEALTH = "/health"
ANSWER_S = 10.0  # for a connection, for an answer to /health, for the rest of an answer that has begun
LOOK_S = 2.0  # of waiting for any other answer, after which the server is asked whether it lives
POLL_S = 0.5  # how often a wait for replies looks up, to be told that it should stop
KEEPALIVE_S = 30  # after which the system asks whether a silent server's machine is still there
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.0


class ServerUnavailable(Exception):  # noqa: N818  # not an error: it may be back
    """A server did not answer, or not as one that is well; asking again may help.

    Args:
        reason: what was seen.
        since: when it had last shown life, by time.monotonic(); None: only just.
    """

    def __init__(self, reason: str, since: float | None = None) -> None:
        super().__init__(reason)
        self.since = since


class Server:
    """A server by its address.

    An answer may take as long as it wants while the server answers /health beside it. vLLM does that by itself; most
    others, even what weights it has, wait for a pass of its engine to end.

    Args:
        url: http://host:port.
        patience_s: seconds without a sign of life after which a call is given up.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        self.url, self._patience_s = url, patience_s
        parts = urlsplit(url)
        self.place = str(parts.hostname), int(parts.port or 80)
        self._heard = -math.inf  # when it last answered
        self._asking = threading.Lock()  # held by the one call that asks for all that wait

    def connect(self) -> http.client.HTTPConnection:
        """A new connection. Raises: ServerUnavailable."""
        asked, seconds = time.monotonic(), min(ANSWER_S, self._patience_s)
        connection = http.client.HTTPConnection(*self.place, timeout=seconds)
        try:
            connection.connect()
        except OSError as error:
            raise ServerUnavailable(f"{error}", self._alive_until(asked)) from error
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        return connection

    def get(self, path: str) -> Any:
        """What a path holds. Raises: as `call`."""
        return self._once("GET", path, None)

    def post(self, path: str, body: Any = None) -> Any:
        """The answer to a call. Raises: as `call`."""
        return self._once("POST", path, body)

    def _once(self, method: str, path: str, body: Any) -> Any:
        connection = self.connect()
        try:
            return self.call(connection, method, path, body)
        finally:
            connection.close()

    def call(self, connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> Any:
        """The answer, read from JSON; None if it is empty.

        Raises: ServerUnavailable if there is none or the server failed; EngineError if it refuses the call.
        """
        asked = time.monotonic()
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            if path != HEALTH:
                self._wait(connection.sock, path, asked)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnavailable(f"{path}: {error!r}", self._alive_until(asked)) from error
        if response.status >= 500:
            raise ServerUnavailable(f"{path}: {response.status} {_shortened(answer)}")
        self._heard = time.monotonic()
        if response.status >= 400:
            raise EngineError(f"the vLLM server {self.url} refuses {path}: {response.status} {_shortened(answer)}")
        return json.loads(answer) if answer else None

    def _wait(self, place: socket.socket, path: str, asked: float) -> None:
        """Waits until an answer begins or the connection ends. Raises: ServerUnavailable if the server is silent."""
        while not _has_come(place, min(LOOK_S, self._patience_s / 4)):
            if not self._asking.acquire(blocking=False):
                continue
            try:
                with suppress(ServerUnavailable):
                    self.get(HEALTH)
            finally:
                self._asking.release()
            since = self._alive_until(asked)
            if time.monotonic() - since > self._patience_s:
                raise ServerUnavailable(f"{path}: no answer, and none to {HEALTH}", since)

    def _alive_until(self, asked: float) -> float:
        return max(asked, self._heard)


def _has_come(place: socket.socket, seconds: float) -> bool:
    """Whether within so many seconds there is something to read, if only the end."""
    usual = place.gettimeout()
    place.settimeout(seconds)
    try:
        place.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return False
    finally:
        place.settimeout(usual)
    return True


def _shortened(answer: bytes) -> str:
    return " ".join(answer.decode(errors="replace").split())[:300]


class Backoff:
    """How long to go on asking a server that is away.

    Args:
        server: who is asked.
        seconds: since it last answered.
        check: raises what ends the wait at once.
    """

    def __init__(self, server: Server, seconds: float, check: Callable[[], None]) -> None:
        self._server, self._seconds, self._check = server, seconds, check
        self._since: float | None = None
        self._pause = FIRST_PAUSE_S

    def answered(self) -> None:
        """Starts anew."""
        self._since, self._pause = None, FIRST_PAUSE_S

    def wait(self, reason: ServerUnavailable) -> None:
        """Returns when it is time to ask again. Raises: EngineError if it has been away for too long."""
        now = time.monotonic()
        if self._since is None:
            self._since = now if reason.since is None else reason.since
        if now - self._since + self._pause > self._seconds:
            raise EngineError(
                f"the vLLM server {self._server.url} has not answered for vllm.patience_s = {self._seconds:g} s "
                f"({reason}); see that it runs, then go on with --resume"
            )
        until = now + self._pause
        while time.monotonic() < until:
            self._check()
            time.sleep(min(POLL_S, self._pause))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)


def retry(server: Server, seconds: float, check: Callable[[], None], ask: Callable[[], Any]) -> Any:
    """What `ask` returns, asked again while the server is away. Raises: as `Backoff.wait`."""
    backoff = Backoff(server, seconds, check)
    while True:
        try:
            return ask()
        except ServerUnavailable as reason:
            backoff.wait(reason)


class Call:
    """One call under way, on a thread of its own.

    Args:
        server: who is asked.
        path: what for.
        body: with what.

    Raises: ServerUnavailable if it cannot be reached.
    """

    def __init__(self, server: Server, path: str, body: Any = None) -> None:
        self._server, self._path, self._body = server, path, body
        self._connection = server.connect()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"{path} of {server.url}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server.call(self._connection, "POST", self._path, self._body)
        except Exception as error:
            self._problem = error

    def check(self) -> None:
        """Raises: ServerUnavailable or EngineError if it has failed."""
        if self._problem is not None:
            raise self._problem

    def result(self, seconds: float) -> None:
        """Returns when it is done. Raises: as `check`; ServerUnavailable if that takes longer."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.hang_up()
            raise ServerUnavailable(f"{self._path}: no answer within {seconds:g} s")
        self.hang_up()
        self.check()

    def hang_up(self) -> None:
        """Waits for it no more."""
        with suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class RequestPool:
    """Many calls at once, each on a thread with a connection of its own.

    Args:
        servers: calls go to them in turn.
        size: calls under way at once.
        seconds: that a server may be away.
        check: raises what ends a wait at once.
    """

    def __init__(self, servers: Sequence[Server], size: int, seconds: float, check: Callable[[], None]) -> None:
        self._servers, self._size, self._seconds, self._check = servers, size, seconds, check
        self._stopped = threading.Event()
        self.connections: set[http.client.HTTPConnection] = set()
        self._found: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def run(
        self, path: str, bodies: Sequence[Any], read: Callable[[Any], Any], on_progress: Callable[[int], None]
    ) -> list[Any]:
        """What `read` makes of each answer, in order; an answer that it finds ServerUnavailable is asked for again.

        `on_progress` is told how many were finished since it was last told. If anything is raised meanwhile, the calls
        under way are hung up, at which a server forgets them.
        """
        jobs: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for job in enumerate(bodies):
            jobs.put(job)
        for _ in range(min(self._size, len(bodies))):
            threading.Thread(target=self._work, args=(path, jobs, read), daemon=True).start()
        answers: list[Any] = [None] * len(bodies)
        left = len(bodies)
        try:
            while left:
                num_new = self._collect(answers)
                left -= num_new
                on_progress(num_new)
        except BaseException:
            self._hang_up()
            raise
        return answers

    def _collect(self, answers: list[Any]) -> int:
        """Waits a moment for answers, and returns how many there were."""
        count, timeout = 0, POLL_S
        with suppress(queue.Empty):
            while True:
                index, answer = self._found.get(timeout=timeout)
                if isinstance(answer, Exception):
                    raise answer
                answers[index] = answer
                count, timeout = count + 1, 0.0
        return count

    def _work(self, path: str, jobs: "queue.SimpleQueue[tuple[int, Any]]", read: Callable[[Any], Any]) -> None:
        lines = [_Line(self, server, self._seconds) for server in self._servers]
        with suppress(queue.Empty):
            while not self._stopped.is_set():
                index, body = jobs.get_nowait()
                try:
                    self._found.put((index, lines[index % len(lines)].ask(path, body, read)))
                except Exception as error:
                    self._found.put((index, error))
        for line in lines:
            line.close()

    def check(self) -> None:
        """Raises what ends a wait at once: that nobody waits for the answer any more, or what the owner knows."""
        if self._stopped.is_set():
            raise EngineError("nobody waits for this answer any more")
        self._check()

    def _hang_up(self) -> None:
        self._stopped.set()
        for connection in list(self.connections):
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)


class _Line:
    """One thread's connection to one server, made anew after each failure."""

    def __init__(self, pool: RequestPool, server: Server, seconds: float) -> None:
        self._crowd, self._server = pool, server
        self._patience = Backoff(server, seconds, pool.check)
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, path: str, body: Any, read: Callable[[Any], Any]) -> Any:
        while True:
            try:
                if self._connection is None:
                    self._connection = self._server.connect()
                    self._crowd.connections.add(self._connection)
                found = read(self._server.call(self._connection, "POST", path, body))
                self._patience.answered()
                return found
            except ServerUnavailable as reason:
                self.close()
                self._patience.wait(reason)

    def close(self) -> None:
        if self._connection is not None:
            self._crowd.connections.discard(self._connection)
            self._connection.close()
            self._connection = None
