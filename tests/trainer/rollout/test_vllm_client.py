"""Calls to servers that answer, fail or stay silent."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import pytest

from expo.errors import ConfigError, EngineError, StopRequested
from expo.rollout.vllm.client import HEALTH, RequestPool, Server, ServerUnavailable, retry
from expo.rollout.vllm.key import VARIABLE, new_key
from expo.rollout.vllm.supervisor import Supervisor
from expo.train import main

pytestmark = pytest.mark.medium

SLOW_S = 4.0
NOBODY = "http://127.0.0.1:9"  # the port of the discard protocol, on which nothing listens


class Doubler(BaseHTTPRequestHandler):
    """Answers with twice the number in the request; it fails at the first 7, refuses 8, never answers 9, is slow for 10
    and stops in the middle of its answer to 11. It always answers /health.
    """

    protocol_version = "HTTP/1.1"
    failed = threading.Event()
    connections: ClassVar = set()  # client addresses of the answered requests

    def do_POST(self):
        number = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = 500 if number == 7 and not self.failed.is_set() else 422 if number == 8 else 200
        if number == 7:
            self.failed.set()
        if number == 10:
            time.sleep(SLOW_S)
        if number == 9:
            self.rfile.read(1)  # until the client closes the connection
            return
        self.connections.add(self.client_address)
        if number == 11:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n2")
            self.rfile.read(1)
            return
        self.answer(status, json.dumps(2 * number).encode())

    def do_GET(self):
        self.answer(200, b"")

    def answer(self, status, answer):
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    Doubler.failed.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Doubler) as found:
        found.daemon_threads = True
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield Server(f"http://127.0.0.1:{found.server_port}")
        found.shutdown()


WEIGHTS = SimpleNamespace(version="new", send=None)


def pool(server, seconds=5.0):
    return RequestPool([server], 4, seconds, lambda: None)


def unchanged(_, answer):
    return answer


def test_answers_are_in_order_and_failed_calls_are_repeated(server):
    counts = []
    numbers = list(range(8)) * 3
    assert pool(server).run("/", numbers, unchanged, counts.append) == [2 * number for number in numbers]
    assert sum(counts) == 24
    assert Doubler.failed.is_set()


def test_a_pool_keeps_its_connections_open(server):
    Doubler.connections.clear()
    pool(server).run("/", [1] * 40, unchanged, lambda count: None)
    assert 0 < len(Doubler.connections) <= 4


def test_proxies_of_the_environment_are_ignored(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    assert Server(server.url).post("/", 3) == 6


def test_an_answer_that_stops_in_the_middle_ends_the_wait(server):
    with pytest.raises(EngineError, match=r"vllm\.patience_s = 0\.5 s \(/: TimeoutError"):
        pool(Server(server.url, 0.5), 0.5).run("/", [11], unchanged, lambda count: None)


def test_a_call_is_repeated_if_its_answer_is_rejected(server):
    rejected = {4}

    def read(_, answer):
        if answer in rejected:
            rejected.remove(answer)
            raise ServerUnavailable("sampled with stale weights")
        return answer

    assert pool(server).run("/", [1, 2, 3], read, lambda count: None) == [2, 4, 6]


def test_a_refused_call_ends_the_others_with_an_error(server):
    with pytest.raises(EngineError, match="refuses /: 422"):
        pool(server).run("/", [9, 8, 9], unchanged, lambda count: None)


def test_a_server_that_stays_unavailable_ends_the_wait(server):
    with pytest.raises(EngineError, match=r"vllm\.patience_s = 0\.5 s"):
        pool(Server(NOBODY), 0.5).run("/", [1], unchanged, lambda count: None)


@pytest.fixture
def silent():
    """A server that accepts every connection and never answers; it closes after half a minute."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    timer = threading.Timer(30, listener.close)
    timer.start()
    yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", 1.0)
    timer.cancel()
    listener.close()


@pytest.mark.parametrize(
    "ask",
    [
        lambda silent: retry(silent, 1.0, lambda: None, lambda: silent.get(HEALTH)),
        lambda silent: retry(silent, 1.0, lambda: None, lambda: silent.post("/collective_rpc")),
        lambda silent: pool(silent, 1.0).run("/", [1, 2, 3], unchanged, lambda count: None),
        lambda silent: Supervisor(silent, None, WEIGHTS, 1.0).sync(),
    ],
    ids=["health check", "single call", "pool", "weight sync"],
)
def test_a_server_that_accepts_and_never_answers_ends_the_wait(silent, ask):
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"vllm\.patience_s = 1 s"):
        ask(silent)
    assert time.monotonic() - started < 20  # the bound of patience and backoff


def test_a_silent_server_ends_a_run_at_its_start(silent):
    with pytest.raises(ConfigError, match=r"vllm\.patience_s = 1 s"):
        Supervisor(silent, None, WEIGHTS, 1.0).wait_until_ready()


def test_a_slow_answer_is_awaited_while_the_server_is_healthy(server):
    impatient = pool(Server(server.url, SLOW_S / 2), SLOW_S / 2)
    assert impatient.run("/", [10, 10], unchanged, lambda count: None) == [20, 20]


def test_running_calls_are_cancelled_when_the_run_stops(server):
    def stop(count):
        raise StopRequested("test")

    before = threading.active_count()
    with pytest.raises(StopRequested):
        pool(server).run("/", [9, 9], unchanged, stop)
    for _ in range(100):
        if threading.active_count() <= before:
            return
        time.sleep(0.05)
    pytest.fail("a connection is still open")


def test_a_run_without_its_servers_ends_with_an_error(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, new_key())
    with pytest.raises(SystemExit) as exit_info:
        main(["--rollout.engine=vllm-server", f"--vllm.servers=[{NOBODY}]", "--vllm.patience_s=0.5",
              f"--run.dir={tmp_path / 'run'}"])  # fmt: skip
    assert exit_info.value.code == 2
    assert f"{NOBODY} has not answered" in capsys.readouterr().err
