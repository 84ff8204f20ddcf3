"""The key of vLLM servers: where it is read from, where it must not appear, and what happens without it."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from expo import serve
from expo.config import load_config
from expo.errors import ConfigError, EngineError
from expo.rollout.vllm.client import Server
from expo.rollout.vllm.guard import RequireKey
from expo.rollout.vllm.key import VARIABLE, new_key, read_key
from expo.rollout.vllm.server import _require_guard, _require_startable
from expo.rollout.vllm.supervisor import ServerProcess, reserve_port
from expo.train import main
from tests.hostile import CALLS, WRONG_HEADERS, wrong_headers

KEY = new_key()


# --- the guard


async def application(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"passed on"})
    else:
        await send({"type": f"{scope['type']}.passed on"})


def sent_for(scope, headers=()):
    sent = []

    async def send(message):
        sent.append(message)

    encoded = [(name.lower().encode(), value.encode()) for name, value in headers]
    asyncio.run(RequireKey(application)({**scope, "headers": encoded}, None, send))
    return sent


@pytest.fixture
def in_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)


@pytest.mark.parametrize("attempt", WRONG_HEADERS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_without_the_key_is_refused(in_environment, call, attempt):
    method, path, _ = CALLS[call]
    sent = sent_for({"type": "http", "method": method, "path": path.partition("?")[0]}, wrong_headers(attempt, KEY))
    assert sent[0]["status"] == 401
    assert b"passed on" not in sent[1]["body"]


def test_websockets_need_the_key_too(in_environment):
    assert sent_for({"type": "websocket", "path": "/v1/realtime"}) == [{"type": "websocket.close", "code": 1008}]


def test_calls_with_the_key_and_the_servers_own_events_are_passed_on(in_environment):
    headers = [("Authorization", f"Bearer {KEY}")]
    assert sent_for({"type": "http", "method": "GET", "path": "/health"}, headers)[0]["status"] == 200
    assert sent_for({"type": "websocket", "path": "/"}, headers) == [{"type": "websocket.passed on"}]
    assert sent_for({"type": "lifespan"}) == [{"type": "lifespan.passed on"}]


def test_a_server_without_a_key_does_not_start(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="VLLM_API_KEY is not set"):
        RequireKey(application)


# --- where the key comes from


@pytest.fixture
def key_file(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return path


def test_a_key_is_read_from_a_file_or_the_environment(key_file, monkeypatch):
    assert read_key(key_file) == KEY
    monkeypatch.setenv(VARIABLE, new_key())
    assert read_key(key_file) == KEY
    monkeypatch.setenv(VARIABLE, KEY)
    assert read_key(None) == KEY


@pytest.mark.parametrize("content", ["", "short", "with a space in the middle", "é" * 20, "line\nbreak" * 3, "x" * 513])
def test_what_cannot_be_a_key_is_refused_without_showing_it(key_file, content):
    key_file.write_text(content)
    with pytest.raises(ConfigError, match="holds no key; expected 16 to 512") as error:
        read_key(key_file)
    assert not content or content not in str(error.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_can_use_is_refused(key_file, mode):
    key_file.chmod(mode)
    with pytest.raises(ConfigError, match="accessible to other users; make a new key with"):
        read_key(key_file)


def test_a_missing_key_is_reported_with_how_to_make_one(key_file, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read vllm\.key_file = .*missing: No such file"):
        read_key(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"need a key: make a file with .* as vllm\.key_file"):
        read_key(None)


def test_the_command_for_a_new_key_makes_one_that_is_read(key_file, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_key(None)
    (command,) = re.findall(r"\(umask .*?\)", str(error.value))
    subprocess.run(command.replace("FILE", "fresh"), shell=True, check=True, cwd=tmp_path)
    assert len(read_key(tmp_path / "fresh")) == 64


# --- who gives and who needs it


def test_a_run_gives_its_servers_a_key_that_nobody_sees(tmp_path):
    (tmp_path / "config.yaml").write_text(load_config(None).to_yaml())
    process = ServerProcess(tmp_path / "config.yaml", tmp_path / "log", tmp_path / "w", [], None, KEY)
    assert process._environment[VARIABLE] == KEY
    process._command[1:] = ["-c", "import os, sys; print(len(os.environ['VLLM_API_KEY'])); sys.stdin.read()"]
    process.start()
    number = process._process.pid
    shown = Path(f"/proc/{number}/cmdline").read_text()
    assert Path(f"/proc/{number}/environ").stat().st_mode & 0o077 == 0
    process._process.communicate()
    process.stop()
    process.release()
    assert KEY not in shown
    assert (tmp_path / "log").read_text() == f"{len(KEY)}\n"
    assert KEY not in (tmp_path / "config.yaml").read_text()


def bind(port, share, user=None):
    """Whether a process, of another user if given, can listen at a port."""
    script = (
        "import os, socket, sys\n"
        "port, share, user = map(int, sys.argv[1:])\n"
        "if user: os.setuid(user)\n"
        "found = socket.socket()\n"
        "found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "if share: found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        "found.bind(('127.0.0.1', port)); found.listen()\n"
    )
    command = [sys.executable, "-S", "-c", script, str(port), str(int(share)), str(user or 0)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_nobody_else_takes_the_port_of_a_server_that_restarts():
    reserved = reserve_port()
    port = reserved.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))
    assert bind(port, share=True)
    assert not bind(port, share=False)
    if os.geteuid() == 0:  # root alone can try it as somebody else
        assert not bind(port, share=True, user=65534)
    reserved.close()
    assert bind(port, share=False)
    assert os.geteuid() != 0 or bind(port, share=False, user=65534)


class Keyed(BaseHTTPRequestHandler):
    """Answers calls with KEY, and all calls while `is_open`."""

    is_open = False

    def do_GET(self):
        has_key = self.headers["Authorization"] == f"Bearer {KEY}"
        self.send_response(200 if has_key or self.is_open else 401)
        self.end_headers()
        self.wfile.write(b"7")

    def log_message(self, *_):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(Keyed, "is_open", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Keyed) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_a_wrong_key_is_reported_without_showing_it(url):
    assert Server(url, 5.0, KEY).get("/") == 7
    given = new_key()
    with pytest.raises(EngineError, match=r"has another key .* vllm\.key_file or VLLM_API_KEY") as error:
        Server(url, 5.0, given).get("/")
    assert given not in str(error.value)


def test_a_server_that_takes_calls_without_a_key_is_refused(url, monkeypatch):
    server = Server(url, 5.0, KEY)
    _require_guard(server, 5.0)
    monkeypatch.setattr(Keyed, "is_open", True)
    with pytest.raises(ConfigError, match=r"takes calls without a key.* start it with python -m expo\.serve"):
        _require_guard(server, 5.0)


def test_a_run_with_named_servers_needs_their_key(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["--rollout.engine=vllm-server", "--vllm.servers=[http://127.0.0.1:9]", f"--run.dir={tmp_path / 'run'}"])
    assert stop.value.code == 2
    assert "need a key: make a file" in capsys.readouterr().err


def test_a_key_for_servers_that_the_run_starts_is_refused(key_file):
    section = load_config(None, [("rollout.engine", "vllm-server"), ("vllm.key_file", str(key_file))]).vllm
    with pytest.raises(ConfigError, match=r"vllm\.servers is empty"):
        _require_startable(section, None)
    with pytest.raises(ConfigError, match=r"vllm\.key_file is for rollout\.engine = vllm-server"):
        load_config(None, [("vllm.key_file", str(key_file))])


@pytest.mark.parametrize("port", ["0", "-1", "65536", "8e3", "", "9" * 5000, "٣"])
def test_a_server_is_started_at_a_port_alone(port, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, KEY)
    with pytest.raises(SystemExit) as stop:
        serve.main([f"--port={port}"])
    shown = capsys.readouterr().err
    assert (stop.value.code, shown.count("\n")) == (2, 1)
    assert "expected a number from 1 to 65535" in shown


def test_a_server_started_by_hand_needs_a_key(monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(SystemExit) as stop:
        serve.main([])
    assert stop.value.code == 2
    assert "need a key" in capsys.readouterr().err


def test_the_servers_command_line_holds_the_guard_and_no_key(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    arguments = serve.server_arguments(load_config(None), "127.0.0.1", 8000, is_cpu=True)
    assert f"--middleware={serve.GUARD}" in arguments
    assert f"{RequireKey.__module__}.{RequireKey.__qualname__}" == serve.GUARD
    assert not any(KEY in argument for argument in arguments)
