"""A real vLLM server against another user of its machine: no route answers without the key, and no weights arrive."""

import re
import subprocess
from pathlib import Path

import pytest

from expo.rollout.vllm.key import new_key
from expo.rollout.vllm.transfer import broadcast
from expo.rollout.vllm.transfer.connection import GroupError, connect
from tests.hostile import CALLS, WRONG_HEADERS, status_of, wrong_headers
from tests.vllm.test_vllm_replies import SAMPLING, requests, tokens
from tests.vllm.test_vllm_server import process_of


def server_of(served):
    (supervisor,) = served.engine._supervisors
    return supervisor.server


def processes_of(group):
    """The processes of a process group."""
    shown = subprocess.run(["ps", "-eo", "pid=,pgid="], capture_output=True, text=True, check=True).stdout
    return [pid for pid, of in map(str.split, shown.splitlines()) if int(of) == group]


def listening(processes):
    """Addresses, in hexadecimal, and ports at which processes listen on the network."""
    inodes = set()
    for pid in processes:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", str(fd.readlink())))
            except OSError:  # closed meanwhile
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.append((address, int(port, 16)))
    return found


def test_every_call_of_a_stranger_is_refused_and_changes_nothing(served):
    server, expected = server_of(served), tokens(served.engine.generate(requests(), SAMPLING))
    version = server.get("/weight_info")["weight_version"]
    attempts = [(call, attempt) for call in CALLS for attempt in (WRONG_HEADERS if call == "sleep" else ["no key"])]
    for call, attempt in attempts:
        status = status_of(server.url, call, wrong_headers(attempt, server.key))
        assert status == 401, f"{call} with {attempt}: {status}"
    assert server.get("/weight_info")["weight_version"] == version
    assert tokens(served.engine.generate(requests(), SAMPLING)) == expected
    assert served.sync.difference() < 1e-5


def test_every_route_of_the_server_needs_the_key(served):
    """All that vLLM itself lists, not only the calls of our table."""
    server = server_of(served)
    paths = server.get("/openapi.json")["paths"]
    assert {"/collective_rpc", "/sleep", "/update_weights", "/inference/v1/generate"} <= paths.keys()
    for path in [*paths, "/docs", "/openapi.json", "/ping"]:
        CALLS[path] = ("POST", path.replace("{", "").replace("}", ""), None)
        try:
            assert status_of(server.url, path, []) == 401, path
        finally:
            del CALLS[path]


def test_a_stranger_cannot_take_the_place_of_a_worker(pairs, monkeypatch):
    """It connects to each port of a weight transfer, first of all, as the worker that is expected."""
    served, ports = pairs("tied", "broadcast"), []
    served.sync.run()
    listen = broadcast.Listener

    def watched(address, key, timeout_s):
        found = listen(address, key, timeout_s)
        ports.append(found.port)
        with pytest.raises(GroupError, match="is not rank 0 of this run"):
            connect((address, found.port), new_key(), "weights/1", 5.0)
        return found

    monkeypatch.setattr(broadcast, "Listener", watched)
    (supervisor,) = served.engine._supervisors
    served.engine._weights._channels[supervisor.server.url].close()
    served.move(30)
    assert served.sync.run() < 1e-5
    assert len(ports) == 1


def test_the_key_is_in_no_log_and_no_command_line(served):
    (supervisor,) = served.engine._supervisors
    key = supervisor.server.key
    folder = supervisor._process._log.parent
    assert [path.name for path in folder.rglob("*") if path.is_file() and key in path.read_text(errors="replace")] == []
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(key.encode() in command for command in commands)


def test_the_server_and_its_workers_listen_at_the_local_address_alone(served):
    port = int(server_of(served).url.rpartition(":")[2])
    processes = processes_of(process_of(served).pid)
    found = listening(processes)
    assert ("0100007F", port) in found
    assert {address for address, _ in found} == {"0100007F"}
    # here the machine's name may lead to this address anyway, so look at what makes it so
    assert any(b"GLOO_SOCKET_IFNAME=lo\0" in Path(f"/proc/{pid}/environ").read_bytes() for pid in processes)
