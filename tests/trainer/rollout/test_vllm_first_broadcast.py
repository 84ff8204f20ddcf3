"""The first broadcast over NCCL, which connects the processes inside the call: it has a deadline too."""

import threading
import time

import pytest
import torch

from expo.rollout.vllm.transfer import group as transfer
from expo.rollout.vllm.transfer.group import ROOT, Group, GroupError

DATA = torch.zeros(3)


class Connection:
    """A group whose first broadcast returns once the others have come, as NCCL's does; later ones return at once."""

    def __init__(self):
        self.others_are_here, self.threads, self.problem = threading.Event(), [], None

    def broadcast(self, data, root):
        assert (data is DATA, root) == (True, ROOT)
        self.threads.append(threading.current_thread())
        self.others_are_here.wait(60)
        if self.problem is not None:
            raise self.problem
        return self

    def is_completed(self):
        return True

    def wait(self):
        return True

    def abort(self):
        self.others_are_here.set()


@pytest.fixture
def connection(monkeypatch):
    connection = Connection()
    monkeypatch.setattr(transfer, "new_process_group", lambda *_: connection)
    yield connection
    connection.abort()


def test_it_ends_at_the_deadline_if_the_others_do_not_come(connection):
    group = Group(None, ROOT, 2, "nccl", "127.0.0.1", timeout_s=0.2)
    started = time.monotonic()
    with pytest.raises(GroupError, match=r"did not connect over NCCL in 0\.2 s"):
        group.start_broadcast(DATA)
    assert time.monotonic() - started < 10
    group.close()


def test_only_the_first_one_needs_a_thread(connection):
    connection.others_are_here.set()
    group = Group(None, ROOT, 2, "nccl", "127.0.0.1", timeout_s=60)
    for _ in range(2):
        group.start_broadcast(DATA)
        group.wait()
    first, second = connection.threads
    assert first is not threading.current_thread()
    assert second is threading.current_thread()


def test_its_errors_are_those_of_the_group(connection):
    connection.problem = RuntimeError("NCCL error: unhandled system error")
    connection.others_are_here.set()
    group = Group(None, ROOT, 2, "nccl", "127.0.0.1", timeout_s=60)
    with pytest.raises(GroupError, match="unhandled system error"):
        group.start_broadcast(DATA)
