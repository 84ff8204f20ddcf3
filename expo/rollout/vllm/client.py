"""HTTP calls to vLLM servers: one at a time, or many at once.

All calls of a process run in one event loop on a thread of its own, so a call can be awaited beside a health check and
cancelled, at which its connection closes and the server drops the request.
"""

import asyncio
import functools
import json
import math
import queue
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager, suppress
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from expo.config import VllmSection
from expo.errors import EngineError, first_line
from expo.rollout.vllm.key import VARIABLE, authorization

T = TypeVar("T")
PATIENCE_S: float = VllmSection().patience_s
HEALTH = "/health"
TIMEOUT_S = 10.0  # to connect, to send a request, to get an answer from /health, between two parts of an answer
HEALTH_CHECK_S = 2.0  # wait for any other answer before /health is called
MOST_ANSWER_BYTES = 2**28
POLL_S = 0.5  # interval at which a wait for replies checks whether to stop
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.0
KEEPALIVE_EXPIRY_S = 4.0  # idle connections are not reused after that; vLLM closes them after 5 s
KEEPALIVE_IDLE_S = 30  # the operating system probes connections as silent as that, in case the server's machine is gone


class ServerUnavailable(Exception):  # noqa: N818  # not an error: it may be back
    """A server gave no answer, or one that shows it is not working; the call may succeed when repeated.

    Args:
        reason: what happened.
        since: time.monotonic() when the server last answered; None: just now.
    """

    def __init__(self, reason: str, since: float | None = None) -> None:
        super().__init__(reason)
        self.since = since


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all calls of this process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="calls to vLLM servers", daemon=True).start()
    return loop


class Server:
    """A vLLM server, by its URL.

    An answer may take any time while the server answers /health meanwhile. vLLM answers /health at once; most other
    calls, even /weight_info, wait for the engine's current forward pass.

    Args:
        url: http://host:port.
        patience_s: seconds without any answer from the server after which a call fails.
        key: sent with every call; empty: none.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S, key: str = "") -> None:
        self.url, self.key, self._patience_s = url, key, patience_s
        parts = urlsplit(url)
        self.address = str(parts.hostname), int(parts.port or 80)
        self._last_answer = -math.inf
        self._timeout_s = min(TIMEOUT_S, patience_s)
        self._loop = _event_loop()
        self._health_lock = asyncio.Lock()  # held by the one call that asks for /health on behalf of all that wait
        self._health_check_s = min(HEALTH_CHECK_S, patience_s / 4)

    def get(self, path: str) -> Any:
        """The answer to a GET request. Raises: as `call`."""
        return self._wait(self.call_once("GET", path))

    def post(self, path: str, body: Any = None) -> Any:
        """The answer to a POST request. Raises: as `call`."""
        return self._wait(self.call_once("POST", path, body))

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Runs a coroutine, such as a `call_once`, in the background; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def session(self) -> aiohttp.ClientSession:
        """A new session, with any number of connections; called on the event loop of the calls."""
        connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=KEEPALIVE_EXPIRY_S, socket_factory=_socket_with_keepalive
        )
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = authorization(self.key)
        return aiohttp.ClientSession(
            self.url,
            connector=connector,
            headers=headers,
            skip_auto_headers=["Accept-Encoding"],
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def call_once(self, method: str, path: str, body: Any = None) -> Any:
        """The answer to a call on a connection of its own. Raises: as `call`."""
        async with self.session() as session:
            return await self.call(session, method, path, body)

    async def call(self, session: aiohttp.ClientSession, method: str, path: str, body: Any) -> Any:
        """The answer, parsed from JSON; None if it is empty.

        Raises: ServerUnavailable if the server is unreachable, silent or failing (5xx); EngineError if it refuses the
            request (4xx).
        """
        start = time.monotonic()
        request = asyncio.ensure_future(self._send(session, method, path, body))
        try:
            while path != HEALTH and not (await asyncio.wait({request}, timeout=self._health_check_s))[0]:
                await self._require_life(path, start)
            status, answer = await request
        except (aiohttp.ClientError, OSError) as error:
            raise ServerUnavailable(f"{path}: {error!r}", self._alive_until(start)) from error
        finally:
            request.cancel()
            request.add_done_callback(lambda task: task.cancelled() or task.exception())  # or asyncio logs it as lost
        if status >= 500:
            raise ServerUnavailable(f"{path}: {status} {_shortened(answer)}")
        self._last_answer = time.monotonic()
        if status == HTTPStatus.UNAUTHORIZED:
            raise EngineError(
                f"the vLLM server {self.url} has another key than the run; give the key of python -m expo.serve in "
                f"vllm.key_file or {VARIABLE}"
            )
        if status >= 400:
            raise EngineError(f"the vLLM server {self.url} refuses {path}: {status} {_shortened(answer)}")
        with self.understand(path):
            return json.loads(answer) if answer else None

    @contextmanager
    def understand(self, path: str) -> Iterator[None]:
        """Reads an answer inside. Raises: EngineError if it has another form than vLLM's answers."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise EngineError(
                f"the vLLM server {self.url} answers {path} in another form than vLLM's ({type(error).__name__}: "
                f"{first_line(error)}); start it with python -m expo.serve, with a version that is supported"
            ) from error

    async def _send(self, session: aiohttp.ClientSession, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Status and content of the answer. Raises: aiohttp.ClientError, OSError, TimeoutError among them."""
        silence_s = self._timeout_s if path == HEALTH else None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s, sock_read=silence_s)
        content = None if method == "GET" else json.dumps(body).encode()
        async with session.request(method, path, data=content, timeout=timeout, allow_redirects=False) as response:
            answer = bytearray()
            # once an answer has begun, it is complete on the server and must keep coming
            async with asyncio.timeout(self._timeout_s) as deadline:
                async for part in response.content.iter_any():
                    answer += part
                    if len(answer) > MOST_ANSWER_BYTES:
                        raise EngineError(f"the vLLM server {self.url} answers {path} with too many bytes")
                    deadline.reschedule(self._loop.time() + self._timeout_s)
            return response.status, bytes(answer)

    async def _require_life(self, path: str, start: float) -> None:
        """Asks for /health. Raises: ServerUnavailable if the server has answered nothing for `patience_s`."""
        if self._health_lock.locked():
            return
        async with self._health_lock:
            with suppress(ServerUnavailable):
                await self.call_once("GET", HEALTH)
        since = self._alive_until(start)
        if time.monotonic() - since > self._patience_s:
            raise ServerUnavailable(f"{path}: no answer, and none to {HEALTH}", since)

    def _alive_until(self, start: float) -> float:
        return max(start, self._last_answer)


def _socket_with_keepalive(address: aiohttp.AddrInfoType) -> socket.socket:
    """A TCP socket whose silent connections the operating system probes."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    return made


def _shortened(answer: bytes) -> str:
    return " ".join(answer.decode(errors="replace").split())[:300]


class Backoff:
    """How long to pause between attempts to call an unavailable server.

    Args:
        server: the server.
        seconds: since its last answer, after which to give up.
    """

    def __init__(self, server: Server, seconds: float) -> None:
        self._server, self._seconds = server, seconds
        self._since: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def next_pause(self, reason: ServerUnavailable) -> float:
        """Seconds to pause before the next attempt. Raises: EngineError if the server was unavailable for too long."""
        now, pause_s = time.monotonic(), self._pause_s
        if self._since is None:
            self._since = now if reason.since is None else reason.since
        if now - self._since + pause_s > self._seconds:
            raise EngineError(
                f"the vLLM server {self._server.url} has not answered for vllm.patience_s = {self._seconds:g} s "
                f"({reason}); see that it runs, then go on with --resume"
            )
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return pause_s


def retry(server: Server, seconds: float, check: Callable[[], None], attempt: Callable[[], T]) -> T:
    """What `attempt` returns, repeated while it raises ServerUnavailable.

    Args:
        server: the server that it calls.
        seconds: as for `Backoff`.
        check: called between attempts; raises to end the wait.
        attempt: makes the call.

    Raises: as `Backoff.next_pause` and `check`.
    """
    backoff = Backoff(server, seconds)
    while True:
        try:
            return attempt()
        except ServerUnavailable as reason:
            resume_at = time.monotonic() + backoff.next_pause(reason)
        while (remaining := resume_at - time.monotonic()) > 0:
            check()
            time.sleep(min(POLL_S, remaining))


class Call:
    """A POST request that runs in the background.

    Args:
        server: the server.
        path: of the request.
        body: its content, sent as JSON.
    """

    def __init__(self, server: Server, path: str, body: Any = None) -> None:
        self._path = path
        self._future = server.submit(server.call_once("POST", path, body))

    def check(self) -> None:
        """Raises: ServerUnavailable or EngineError if it has failed."""
        if self._future.done():
            self._future.result()

    def result(self, seconds: float) -> None:
        """Waits until it is done. Raises: as `check`; ServerUnavailable if that takes longer than `seconds`."""
        try:
            self._future.result(seconds)
        except TimeoutError as error:
            self.cancel()
            raise ServerUnavailable(f"{self._path}: no answer within {seconds:g} s") from error

    def cancel(self) -> None:
        """Ends the request, if it is not done."""
        self._future.cancel()


class RequestPool:
    """Many POST requests at once.

    Args:
        servers: requests go to them in turn.
        size: most requests under way at once.
        seconds: that a server may be unavailable.
        check: called before a request is repeated; raises to end the wait.
    """

    def __init__(self, servers: Sequence[Server], size: int, seconds: float, check: Callable[[], None]) -> None:
        self._servers, self._size, self._seconds, self._check = servers, size, seconds, check

    def run(
        self, path: str, bodies: Sequence[Any], read: Callable[[Any, Any], T], on_progress: Callable[[int], None]
    ) -> list[T]:
        """What `read` returns for each body and its answer, in order; a request for which it raises ServerUnavailable
        is repeated.

        `on_progress` is called with the number of requests finished since its last call, at least every POLL_S. If it
        raises, or a request fails, the requests under way are cancelled, at which a server drops them.
        """
        jobs = iter(enumerate(bodies))  # shared by the workers
        finished: queue.SimpleQueue[tuple[int, T] | Exception] = queue.SimpleQueue()

        async def work(sessions: Sequence[aiohttp.ClientSession]) -> None:
            try:
                for index, body in jobs:
                    number = index % len(self._servers)
                    server = self._servers[number]
                    call = functools.partial(server.call, sessions[number], "POST", path, body)
                    finished.put((index, await self._answer(server, path, call, functools.partial(read, body))))
            except Exception as error:
                finished.put(error)

        async def work_at_once() -> None:
            async with AsyncExitStack() as stack:
                sessions = [await stack.enter_async_context(server.session()) for server in self._servers]
                await asyncio.gather(*(work(sessions) for _ in range(min(self._size, len(bodies)))))

        working = self._servers[0].submit(work_at_once())
        answers: dict[int, T] = {}
        try:
            while len(answers) < len(bodies):
                new = _take_all(finished, POLL_S)
                answers.update(new)
                on_progress(len(new))
        finally:
            working.cancel()
        return [answers[index] for index in range(len(bodies))]

    async def _answer(
        self, server: Server, path: str, call: Callable[[], Awaitable[Any]], read: Callable[[Any], T]
    ) -> T:
        backoff = Backoff(server, self._seconds)
        while True:
            try:
                answer = await call()
                with server.understand(path):
                    return read(answer)
            except ServerUnavailable as reason:
                pause_s = backoff.next_pause(reason)
            self._check()
            await asyncio.sleep(pause_s)


def _take_all(finished: "queue.SimpleQueue[tuple[int, T] | Exception]", seconds: float) -> dict[int, T]:
    """All results in the queue, by index; waits for the first up to `seconds`. Raises: an exception in the queue."""
    found: dict[int, T] = {}
    with suppress(queue.Empty):
        while True:
            result = finished.get(timeout=0.0 if found else seconds)
            if isinstance(result, Exception):
                raise result
            index, answer = result
            found[index] = answer
    return found
