"""Two nodes, each with an agent of torchrun, that connect over the network."""

import socket
import time

import pytest

from tests.ranks.running import argv, kill_all, launch, log_of, outcome_of, run_launches, start

pytestmark = pytest.mark.slow


def start_nodes(folder, name, plan):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = {"nnodes": 2, "rdzv_backend": "c10d", "rdzv_endpoint": f"127.0.0.1:{port}", "rdzv_id": name}
    return [start(folder, plan, ranks=1, **options) for _ in range(2)]


def test_two_nodes_train_are_killed_and_resume(tmp_path):
    quick = {"run__checkpoint_every": 2, "run__steps": 3, "policy__zero_stage": 1}
    command = argv(tmp_path, "run", **quick)
    mark = tmp_path / "injected"
    fault = {"phase": "update", "do": "mark", "nth": 3, "path": str(mark), "wait": 60}
    nodes = start_nodes(tmp_path, "first", [launch("run", command, fault=fault, in_process=True)])
    while not mark.exists():
        assert [node.poll() for node in nodes] == [None, None], nodes[0].communicate()
        time.sleep(0.05)
    kill_all(str(tmp_path))
    for node in nodes:
        node.communicate()
    nodes = start_nodes(tmp_path, "second", [launch("run", [*command, "--resume"], in_process=True)])
    output_of_nodes = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], output_of_nodes
    assert any("resuming after step 2 of 3" in out for out, _ in output_of_nodes)
    assert run_launches(tmp_path, [launch("whole", argv(tmp_path, "whole", **quick))]) == {"whole": [0, 0]}, log_of(
        tmp_path, "whole"
    )
    assert outcome_of(tmp_path / "run") == outcome_of(tmp_path / "whole")
