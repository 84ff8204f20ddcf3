"""The first broadcast over NCCL, which connects the processes inside the call: it has a deadline too."""

import threading
import time

import pytest
import torch

from expo.rollout.vllm.transfer import nccl as transfer
from expo.rollout.vllm.transfer.connection import GroupError
from expo.rollout.vllm.transfer.group import Sender
from expo.rollout.vllm.transfer.nccl import ROOT, NcclGroup

DATA = torch.zeros(3)


class Library:
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
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(transfer, "new_nccl_group", lambda *_: library)
    yield library
    library.abort()


def test_it_ends_at_the_deadline_if_the_others_do_not_come(library):
    group = NcclGroup(None, ROOT, 2, timeout_s=0.2)
    started = time.monotonic()
    with pytest.raises(GroupError, match=r"did not connect over NCCL in 0\.2 s"):
        group.start(DATA)
    assert time.monotonic() - started < 10
    group.close()


def test_only_the_first_one_needs_a_thread(library):
    library.others_are_here.set()
    sender = Sender([], NcclGroup(None, ROOT, 2, timeout_s=60), timeout_s=60)
    for _ in range(2):
        sender.start("the manifest", DATA)
        sender.wait()
    first, second = library.threads
    assert first is not threading.current_thread()
    assert second is threading.current_thread()
    sender.close()


def test_its_errors_are_those_of_the_group(library):
    library.problem = RuntimeError("NCCL error: unhandled system error")
    library.others_are_here.set()
    with pytest.raises(GroupError, match="unhandled system error"):
        NcclGroup(None, ROOT, 2, timeout_s=60).start(DATA)
