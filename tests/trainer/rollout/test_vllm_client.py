"""Calls to servers that answer, are away, or are to be given up; and processes that end with the one they serve."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from expo.errors import ConfigError, EngineError, StopRequested
from expo.rollout.vllm.client import HEALTH, RequestPool, Server, ServerUnavailable, retry
from expo.rollout.vllm.supervisor import ServerProcess, Supervisor
from expo.train import main

SLOW_S = 4.0
NOBODY = "http://127.0.0.1:9"  # the port of a protocol that nobody speaks any more


class Doubler(BaseHTTPRequestHandler):
    """Answers twice the number given; fails at the first call of each that is 7, refuses 8, never answers to 9, and
    takes its time for 10; it is in good health.
    """

    protocol_version = "HTTP/1.1"
    failed = threading.Event()

    def do_POST(self):
        number = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = 500 if number == 7 and not self.failed.is_set() else 422 if number == 8 else 200
        if number == 7:
            self.failed.set()
        if number == 10:
            time.sleep(SLOW_S)
        if number == 9:
            self.rfile.read(1)  # until the other side hangs up
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


WEIGHTS = SimpleNamespace(version="new", bring=None)


def pool(server, seconds=5.0):
    return RequestPool([server], 4, seconds, lambda: None)


def same(answer):
    return answer


def test_answers_come_in_order_and_failed_calls_again(server):
    counts = []
    assert pool(server).run("/", list(range(8)) * 3, same, counts.append) == [2 * number for number in range(8)] * 3
    assert sum(counts) == 24
    assert Doubler.failed.is_set()


def test_an_answer_that_is_found_wanting_is_asked_for_again(server):
    wanting = {4}

    def read(answer):
        if answer in wanting:
            wanting.remove(answer)
            raise ServerUnavailable("made by older weights")
        return answer

    assert pool(server).run("/", [1, 2, 3], read, lambda count: None) == [2, 4, 6]


def test_a_refused_call_ends_the_others_with_a_clear_line(server):
    with pytest.raises(EngineError, match="refuses /: 422"):
        pool(server).run("/", [9, 8, 9], same, lambda count: None)


def test_a_server_that_stays_away_ends_the_wait(server):
    with pytest.raises(EngineError, match=r"vllm\.patience_s = 0\.5 s"):
        pool(Server(NOBODY), 0.5).run("/", [1], same, lambda count: None)


@pytest.fixture
def silent():
    """A server that takes every connection and says nothing; after half a minute it is gone."""
    place = socket.create_server(("127.0.0.1", 0), backlog=64)
    timer = threading.Timer(30, place.close)
    timer.start()
    yield Server(f"http://127.0.0.1:{place.getsockname()[1]}", 1.0)
    timer.cancel()
    place.close()


@pytest.mark.parametrize(
    "ask",
    [
        lambda silent: retry(silent, 1.0, lambda: None, lambda: silent.get(HEALTH)),
        lambda silent: retry(silent, 1.0, lambda: None, lambda: silent.post("/collective_rpc")),
        lambda silent: pool(silent, 1.0).run("/", [1, 2, 3], same, lambda count: None),
        lambda silent: Supervisor(silent, None, WEIGHTS, 1.0).sync(),
    ],
    ids=["asked whether it lives", "told to do something", "asked for replies", "given weights"],
)
def test_a_server_that_accepts_and_never_answers_ends_the_wait(silent, ask):
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"vllm\.patience_s = 1 s"):
        ask(silent)
    assert time.monotonic() - started < 20  # backoff is a promise


def test_a_server_that_cannot_be_asked_ends_a_run_at_its_start(silent):
    with pytest.raises(ConfigError, match=r"vllm\.patience_s = 1 s"):
        Supervisor(silent, None, WEIGHTS, 1.0).wait_until_ready()


def test_a_slow_server_in_good_health_is_waited_for(server):
    assert pool(Server(server.url, SLOW_S / 2), SLOW_S / 2).run("/", [10, 10], same, lambda count: None) == [20, 20]


def test_calls_under_way_are_hung_up_when_the_run_is_to_stop(server):
    def stop(count):
        raise StopRequested("test")

    before = threading.active_count()
    with pytest.raises(StopRequested):
        pool(server).run("/", [9, 9], same, stop)
    for _ in range(100):
        if threading.active_count() <= before:
            return
        time.sleep(0.05)
    pytest.fail("a thread still waits for an answer")


def test_a_run_without_its_servers_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main(["--rollout.engine=vllm-server", f"--vllm.servers=[{NOBODY}]", "--vllm.patience_s=0.5",
              f"--run.dir={tmp_path / 'run'}"])  # fmt: skip
    assert exit_info.value.code == 2
    assert f"{NOBODY} has not answered" in capsys.readouterr().err


def test_a_server_that_does_not_start_shows_its_log(tmp_path):
    process = ServerProcess(tmp_path / "missing.yaml", tmp_path / "log", tmp_path / "weights", [], None)
    supervisor = Supervisor(Server(process.url), process, None, 60.0)
    supervisor.start()
    with pytest.raises(ConfigError, match=r"does not start; .* cannot read the config file"):
        supervisor.wait_until_ready()
    supervisor.close()


GUARDED = """
import subprocess, sys, time
from pathlib import Path
from expo.rollout.vllm import supervisor
supervisor.END_S = 0.5
supervisor.guard(Path(sys.argv[1]))
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
print(subprocess.Popen([sys.executable, "-c", stubborn]).pid, flush=True)
time.sleep(0 if sys.argv[2] == "dies" else 99)
"""


@pytest.mark.parametrize("server", ["lives", "dies"])
def test_a_server_and_its_children_end_with_the_run_or_together(tmp_path, server):
    folder = tmp_path / "weights"
    folder.mkdir()
    command = [sys.executable, "-c", GUARDED, str(folder), server]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    child = int(process.stdout.readline())
    if server == "lives":
        process.stdin.close()
    process.wait(20)
    process.stdin.close()
    process.stdout.close()
    assert folder.exists() == (server == "dies")
    for _ in range(100):
        if not is_running(child):
            return
        time.sleep(0.05)
    pytest.fail("a child of the server is still there")


def is_running(process):
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
