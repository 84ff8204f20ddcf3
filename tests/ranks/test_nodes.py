"""Two nodes: each with an agent of torchrun, which find each other over the network."""

import socket
import time

import pytest

from tests.ranks.running import argv, facts, kill_all, life, lived, said, start

pytestmark = pytest.mark.slow


def start_nodes(folder, name, plan):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = {"nnodes": 2, "rdzv_backend": "c10d", "rdzv_endpoint": f"127.0.0.1:{port}", "rdzv_id": name}
    return [start(folder, plan, ranks=1, **options) for _ in range(2)]


def test_two_nodes_train_are_killed_and_go_on(tmp_path):
    quick = {"run__checkpoint_every": 2, "run__steps": 3, "policy__zero_stage": 1}
    command = argv(tmp_path, "run", **quick)
    mark = tmp_path / "struck"
    fault = {"phase": "update", "do": "mark", "nth": 3, "path": str(mark), "wait": 60}
    nodes = start_nodes(tmp_path, "first", [life("run", command, fault=fault, here=True)])
    while not mark.exists():
        assert [node.poll() for node in nodes] == [None, None], nodes[0].communicate()
        time.sleep(0.05)
    kill_all(str(tmp_path))
    for node in nodes:
        node.communicate()
    nodes = start_nodes(tmp_path, "second", [life("run", [*command, "--resume"], here=True)])
    said_by_nodes = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said_by_nodes
    assert any("resuming after step 2 of 3" in out for out, _ in said_by_nodes)
    assert lived(tmp_path, [life("whole", argv(tmp_path, "whole", **quick))]) == {"whole": [0, 0]}, said(
        tmp_path, "whole"
    )
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
