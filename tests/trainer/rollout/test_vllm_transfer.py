"""Weights packed into buckets and broadcast from rank 0 to workers: real processes over gloo."""

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
from expo.rollout.vllm.transfer.buckets import empty_bucket, fill_buckets
from expo.rollout.vllm.transfer.group import (
    END_OF_UPDATE,
    ROOT,
    Group,
    GroupError,
    address_toward,
    new_store,
    wait_for_workers,
)

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
PATIENCE_S = 120.0  # importing torch is slow where cores are shared
WORKER = """
import sys
import torch
from expo.rollout.vllm.transfer.buckets import empty_bucket
from expo.rollout.vllm.transfer.group import END_OF_UPDATE, join

host, port, rank, size, path = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
group, found, number = join(host, port, rank, size, "gloo", 120.0), {}, 0
while (manifest := group.read_message(str(number))) != END_OF_UPDATE:
    bucket = empty_bucket(manifest, torch.device("cpu"))
    group.start_broadcast(bucket.data)
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
        "transposed": wide.T,
        "every second": wide[:, ::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "large": torch.randn(100, generator=generator),
        "integers": torch.arange(5),
    }


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("num_bytes", [1, 250, 2**20])
def test_buckets_return_the_weights_they_were_filled_with(num_bytes):
    buckets = [bucket.copy_to_cpu() for bucket in fill_buckets(weights().items(), CPU, num_bytes)]
    assert len(buckets) > 1 or num_bytes == 2**20
    assert_equal({name: value for bucket in buckets for name, value in bucket.tensors()}, weights())


def test_each_weight_is_copied_before_the_next_is_requested():
    def gathered():
        for name, value in weights().items():
            temporary = value.clone()
            yield name, temporary
            temporary.zero_()

    buckets = [bucket.copy_to_cpu() for bucket in fill_buckets(gathered(), CPU, 250)]
    assert_equal({name: value for bucket in buckets for name, value in bucket.tensors()}, weights())


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
def test_every_worker_receives_all_buckets(start_worker, tmp_path, num_workers):
    workers, group = join_all(start_worker, 1 + num_workers)
    number = 0
    for number, bucket in enumerate(fill_buckets(weights().items(), CPU, 250), 1):
        group.post_message(str(number - 1), bucket.manifest())
        group.start_broadcast(bucket.data)
        group.wait()
    group.post_message(str(number), END_OF_UPDATE)
    for rank, worker in enumerate(workers, 1):
        assert worker.wait(PATIENCE_S) == 0
        assert_equal(torch.load(tmp_path / f"{rank}.pt"), weights())
    group.close()


def test_the_death_of_a_worker_ends_the_wait_for_it(start_worker):
    (worker,), group = join_all(start_worker, 2)
    group.start_broadcast(torch.zeros(2**27, dtype=torch.uint8))  # more than sockets buffer; it is never read
    worker.kill()
    started = time.monotonic()
    with pytest.raises(GroupError, match="by peer"):
        group.wait()
    assert time.monotonic() - started < PATIENCE_S / 2, "a deadline ended it"
    group.close()


def test_a_failed_check_ends_the_wait_and_the_group_closes_at_once(start_worker):
    (_,), group = join_all(start_worker, 2)
    group.start_broadcast(torch.zeros(2**27, dtype=torch.uint8))

    def check():
        raise ServerUnavailable("it failed")

    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match="it failed"):
        group.wait(check)
    group.close()
    assert time.monotonic() - started < PATIENCE_S / 2


def test_missing_workers_are_reported_with_what_to_change():
    store = new_store("127.0.0.1", 2, PATIENCE_S)
    with pytest.raises(GroupError, match=r"not reached 127\.0\.0\.1:\d+ within 0\.1 s; .*vllm\.transfer = files"):
        wait_for_workers(store, 2, 0.1, lambda: None)


def test_weights_are_kept_for_an_unavailable_server(monkeypatch, capsys):
    monkeypatch.setattr(interface, "BUCKET_BYTES", 250)
    server = Server("http://127.0.0.1:9")
    broadcast = WeightBroadcast([server], 1, CPU, PATIENCE_S)
    broadcast.publish(weights().items())
    assert broadcast.version is not None
    assert "127.0.0.1:9 did not receive the weights" in capsys.readouterr().err
    with pytest.raises(ServerUnavailable, match="ConnectionRefusedError"):
        broadcast.send(server, broadcast.version)
    with pytest.raises(ServerUnavailable, match="a newer weight sync"):
        broadcast.send(server, "an older version")
    assert_equal({name: value for bucket in broadcast._copy[1] for name, value in bucket.tensors()}, weights())
    broadcast.close()


def test_servers_that_cannot_receive_broadcasts_are_refused():
    server = Server("http://a:1")
    with pytest.raises(ConfigError, match=r"has the weight transfer None, but .* needs expo; start it with"):
        _require_broadcast(server, {"weight_transfer_config": None}, on_gpu=True)
    sent = {"weight_transfer_config": {"backend": "expo"}, "device_config": {"device_type": "cpu"}}
    _require_broadcast(server, sent, on_gpu=False)
    with pytest.raises(ConfigError, match=r"runs on a CPU and rank 0 on a GPU.*take vllm\.transfer = files"):
        _require_broadcast(server, sent, on_gpu=True)


def test_an_empty_bucket_has_the_size_of_its_manifest():
    for bucket in fill_buckets(weights().items(), CPU, 250):
        assert empty_bucket(bucket.manifest(), CPU).data.shape == bucket.data.shape
