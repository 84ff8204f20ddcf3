"""Weights in buckets, and their way from rank 0 to workers: real processes over gloo."""

import subprocess
import sys
import time

import pytest
import torch

from expo.errors import ConfigError
from expo.rollout.vllm.client import Server, ServerUnavailable
from expo.rollout.vllm.server import _require_broadcast
from expo.rollout.vllm.transfer import interface
from expo.rollout.vllm.transfer.broadcast import WeightBroadcast
from expo.rollout.vllm.transfer.group import (
    END,
    ROOT,
    Group,
    GroupError,
    address_toward,
    empty_bucket,
    new_store,
    pack,
    wait_for_workers,
)

CPU = torch.device("cpu")
PATIENCE_S = 120.0  # importing torch is slow where cores are shared
WORKER = """
import sys
import torch
from expo.rollout.vllm.transfer.group import END, empty_bucket, join

host, port, rank, size, path = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
group, found, number = join(host, port, rank, size, "gloo", 120.0), {}, 0
while (manifest := group.read(str(number))) != END:
    bucket = empty_bucket(manifest, torch.device("cpu"))
    group.start(bucket.data)
    group.wait()
    found.update((name, value.clone()) for name, value in bucket.tensors())
    number += 1
group.close()
torch.save(found, path)
"""


def weights():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 10, generator=generator)
    return {
        "wide": wide,
        "half": torch.randn(3, generator=generator).bfloat16(),  # 6 bytes: what follows it must be aligned
        "turned": wide.T,
        "every second": wide[:, ::2],
        "number": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "large": torch.randn(100, generator=generator),
        "whole": torch.arange(5),
    }


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("num_bytes", [1, 250, 2**20])
def test_weights_come_out_of_buckets_as_they_went_in(num_bytes):
    buckets = [bucket.kept() for bucket in pack(weights().items(), CPU, num_bytes)]
    assert len(buckets) > 1 or num_bytes == 2**20
    assert_same({name: value for bucket in buckets for name, value in bucket.tensors()}, weights())


def test_a_source_may_take_back_each_weight_when_the_next_is_asked_for():
    def gathered():
        for name, value in weights().items():
            lent = value.clone()
            yield name, lent
            lent.zero_()

    buckets = [bucket.kept() for bucket in pack(gathered(), CPU, 250)]
    assert_same({name: value for bucket in buckets for name, value in bucket.tensors()}, weights())


@pytest.fixture
def start_worker(tmp_path):
    started = []

    def start(store, rank, size):
        place = [store.host, store.port, rank, size, tmp_path / f"{rank}.pt"]
        started.append(subprocess.Popen([sys.executable, "-c", WORKER, *map(str, place)], stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def join_all(start_worker, size):
    address = address_toward("127.0.0.1", 9)
    store = new_store(address, size, PATIENCE_S)
    workers = [start_worker(store, rank, size) for rank in range(1, size)]
    wait_for_workers(store, size, PATIENCE_S, lambda: None)
    return workers, Group(store, ROOT, size, "gloo", address, PATIENCE_S)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_worker_is_sent_all_buckets(start_worker, tmp_path, num_workers):
    workers, group = join_all(start_worker, 1 + num_workers)
    number = 0
    for number, bucket in enumerate(pack(weights().items(), CPU, 250), 1):
        group.announce(str(number - 1), bucket.manifest())
        group.start(bucket.data)
        group.wait()
    group.announce(str(number), END)
    for rank, worker in enumerate(workers, 1):
        assert worker.wait(PATIENCE_S) == 0
        assert_same(torch.load(tmp_path / f"{rank}.pt"), weights())
    group.close()


def test_a_worker_that_dies_ends_the_wait_for_it(start_worker):
    (worker,), group = join_all(start_worker, 2)
    group.start(torch.zeros(2**27, dtype=torch.uint8))  # more than the connection takes in; the worker reads nothing
    worker.kill()
    started = time.monotonic()
    with pytest.raises(GroupError, match="by peer"):
        group.wait()
    assert time.monotonic() - started < PATIENCE_S / 2, "a deadline ended it"
    group.close()


def test_a_failure_known_otherwise_ends_a_wait_and_leaves_nothing_to_wait_for(start_worker):
    (_,), group = join_all(start_worker, 2)
    group.start(torch.zeros(2**27, dtype=torch.uint8))

    def check():
        raise ServerUnavailable("it said so")

    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match="it said so"):
        group.wait(check)
    group.close()
    assert time.monotonic() - started < PATIENCE_S / 2


def test_workers_that_do_not_come_are_named_with_what_to_do():
    store = new_store("127.0.0.1", 2, PATIENCE_S)
    with pytest.raises(GroupError, match=r"not come to 127\.0\.0\.1:\d+ within 0\.1 s; .*vllm\.transfer = files"):
        wait_for_workers(store, 2, 0.1, lambda: None)


def test_weights_are_kept_for_a_server_that_is_away(monkeypatch, capsys):
    monkeypatch.setattr(interface, "BUCKET_BYTES", 250)
    server = Server("http://127.0.0.1:9")
    broadcast = WeightBroadcast([server], 1, CPU, PATIENCE_S)
    broadcast.take(weights().items())
    assert broadcast.version is not None
    assert "127.0.0.1:9 did not take the weights" in capsys.readouterr().err
    with pytest.raises(ServerUnavailable, match="refused"):
        broadcast.bring(server, broadcast.version)
    with pytest.raises(ServerUnavailable, match="newer weights"):
        broadcast.bring(server, "an older version")
    assert_same({name: value for bucket in broadcast._kept[1] for name, value in bucket.tensors()}, weights())
    broadcast.close()


def test_servers_that_cannot_be_sent_weights_are_refused():
    server = Server("http://a:1")
    with pytest.raises(ConfigError, match=r"has the weight transfer None, but .* needs expo; start it with"):
        _require_broadcast(server, {"weight_transfer_config": None}, on_gpu=True)
    sent = {"weight_transfer_config": {"backend": "expo"}, "device_config": {"device_type": "cpu"}}
    _require_broadcast(server, sent, on_gpu=False)
    with pytest.raises(ConfigError, match=r"runs on a CPU and rank 0 on a GPU.*take vllm\.transfer = files"):
        _require_broadcast(server, sent, on_gpu=True)


def test_an_empty_bucket_has_room_for_what_is_announced():
    for bucket in pack(weights().items(), CPU, 250):
        assert empty_bucket(bucket.manifest(), CPU).data.shape == bucket.data.shape
