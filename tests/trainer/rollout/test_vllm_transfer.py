"""Weights packed into buckets and broadcast from rank 0 to workers: real processes over TCP."""

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from expo.errors import ConfigError
from expo.rollout.vllm.client import Server, ServerUnavailable
from expo.rollout.vllm.key import new_key
from expo.rollout.vllm.server import _require_broadcast
from expo.rollout.vllm.transfer import interface
from expo.rollout.vllm.transfer.broadcast import WeightBroadcast
from expo.rollout.vllm.transfer.buckets import empty_bucket, fill_buckets
from expo.rollout.vllm.transfer.connection import GroupError, Listener, connect
from expo.rollout.vllm.transfer.files import WeightFiles
from expo.rollout.vllm.transfer.group import END_OF_UPDATE, address_toward, gather_workers
from expo.rollout.vllm.transfer.store import RemoteStore, new_store, serve_store

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
PATIENCE_S = 120.0  # importing torch is slow where cores are shared
KEY = new_key()
WORKER = """
import sys
import torch
from expo.rollout.vllm.transfer.buckets import empty_bucket
from expo.rollout.vllm.transfer.group import END_OF_UPDATE, join

host, port, rank, size, path, key = sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:]
group, found = join((host, port), key, rank, size, "tcp", 120.0), {}
while (manifest := group.read_message()) != END_OF_UPDATE:
    bucket = empty_bucket(manifest, torch.device("cpu"))
    group.receive(bucket.data)
    found.update((name, value.clone()) for name, value in bucket.tensors())
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

    def start(listener, rank, size):
        place = [listener.address, listener.port, rank, size, tmp_path / f"{rank}.pt", KEY]
        started.append(subprocess.Popen([sys.executable, "-c", WORKER, *map(str, place)], stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def listener():
    found = Listener(address_toward("127.0.0.1", 9), KEY, PATIENCE_S)
    yield found
    found.close()


def join_all(listener, start_worker, size):
    workers = [start_worker(listener, rank, size) for rank in range(1, size)]
    group = gather_workers(listener, size, "tcp", PATIENCE_S)
    listener.close()
    return workers, group


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_worker_receives_all_buckets(listener, start_worker, tmp_path, num_workers):
    workers, group = join_all(listener, start_worker, 1 + num_workers)
    for bucket in fill_buckets(weights().items(), CPU, 250):
        group.start(bucket.manifest(), bucket.data)
        group.wait()
    group.start(END_OF_UPDATE)
    group.wait()
    for rank, worker in enumerate(workers, 1):
        assert worker.wait(PATIENCE_S) == 0
        assert_equal(torch.load(tmp_path / f"{rank}.pt"), weights())
    group.close()


UNREAD = torch.zeros(2**27, dtype=torch.uint8)  # more than sockets buffer


def test_the_death_of_a_worker_ends_the_wait_for_it(listener, start_worker):
    (worker,), group = join_all(listener, start_worker, 2)
    worker.send_signal(signal.SIGSTOP)
    group.start("[]", UNREAD)
    worker.kill()
    started = time.monotonic()
    with pytest.raises(GroupError, match="the other side does not receive"):
        group.wait()
    assert time.monotonic() - started < PATIENCE_S / 2, "a deadline ended it"
    group.close()


def test_a_failed_check_ends_the_wait_and_the_group_closes_at_once(listener, start_worker):
    (worker,), group = join_all(listener, start_worker, 2)
    worker.send_signal(signal.SIGSTOP)
    group.start("[]", UNREAD)

    def check():
        raise ServerUnavailable("it failed")

    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match="it failed"):
        group.wait(check)
    group.close()
    assert time.monotonic() - started < PATIENCE_S / 2


def test_missing_workers_are_reported_with_what_to_change(listener):
    with pytest.raises(GroupError, match=r"not reached 127\.0\.0\.1:\d+ within 0\.1 s; .*vllm\.transfer = files"):
        gather_workers(listener, 2, "tcp", 0.1)


def test_nccls_store_is_used_over_a_connection(listener):
    """By gloo in place of NCCL, which needs GPUs: two groups in this process find each other through it."""
    store = new_store()
    near = connect((listener.address, listener.port), KEY, "store/1", PATIENCE_S)
    while (far := listener.take("store/1")) is None:
        time.sleep(0.01)
    serve_store(store, far)
    remote = RemoteStore(near, PATIENCE_S)
    assert [remote.check(["a"]), remote.add("a", 2), remote.check(["a"]), remote.delete_key("a")] == [0, 2, 1, 1]
    remote.set("bytes", bytes(range(256)))
    assert bytes(store.get("bytes")) == remote.get("bytes") == bytes(range(256))

    def group_of(rank, own):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        return dist.ProcessGroupGloo(own, rank, 2, options)

    with ThreadPoolExecutor(2) as pool:
        groups = [future.result() for future in [pool.submit(group_of, 0, store), pool.submit(group_of, 1, remote)]]
        sent, received = torch.arange(5), torch.zeros(5, dtype=torch.int64)
        for work in [groups[0].broadcast(sent, 0), groups[1].broadcast(received, 0)]:
            work.wait()
    assert torch.equal(sent, received)
    near.close()
    with pytest.raises(GroupError):
        remote.get("bytes")


def test_strangers_are_turned_away_and_hold_nobody_up(listener):
    place = (listener.address, listener.port)
    silent = [socket.create_connection(place) for _ in range(8)]
    with pytest.raises(GroupError, match="is not rank 0 of this run: connection closed by peer"):
        connect(place, new_key(), "weights/1", PATIENCE_S)
    connected = connect(place, KEY, "weights/1", PATIENCE_S)
    while listener.take("weights/1") is None:
        time.sleep(0.01)
    assert listener.take("weights/1") is None, "the stranger was taken for the worker"
    with socket.create_connection(place) as repeating:
        nonce = repeating.recv(32)
        repeating.sendall(nonce + nonce)
        assert repeating.recv(1) == b""
    connected.close()
    for stranger in silent:
        stranger.close()


def test_a_worker_takes_nothing_from_a_listener_without_the_key():
    impostor = Listener("127.0.0.1", new_key(), PATIENCE_S)
    with pytest.raises(GroupError, match="is not rank 0 of this run"):
        connect((impostor.address, impostor.port), KEY, "weights/1", PATIENCE_S)
    impostor.close()


def test_a_listener_is_reached_at_its_own_address_alone(listener):
    assert listener.address == "127.0.0.1"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", listener.port))


def test_after_the_workers_have_joined_nothing_listens(listener, start_worker):
    _, group = join_all(listener, start_worker, 2)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((listener.address, listener.port))
    group.close()


def test_weights_are_kept_for_an_unavailable_server(monkeypatch, capsys):
    monkeypatch.setattr(interface, "BUCKET_BYTES", 250)
    server = Server("http://127.0.0.1:9", key=KEY)
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


@pytest.mark.parametrize("kind", ["files", "broadcast"])
def test_staged_weights_replace_the_current_ones_when_they_are_used(kind):
    transfer = WeightFiles(None) if kind == "files" else WeightBroadcast([], 1, CPU, PATIENCE_S)
    transfer.publish(weights().items())
    first = transfer.version
    staged = [transfer.stage({"a": torch.full((2,), float(number))}.items()) for number in range(3)]
    assert transfer.version == first
    transfer.use(staged[1])
    assert transfer.version == staged[1]
    if kind == "files":  # those before are gone, the one after is kept
        assert {path.name for path in transfer.folder.iterdir()} == set(staged[1:])
        (path,) = (transfer.folder / staged[1]).iterdir()
        assert_equal(load_file(path), {"a": torch.ones(2)})
    else:
        ((_, value),) = transfer._copy[1][0].tensors()
        assert torch.equal(value, torch.ones(2))
    transfer.use(staged[2])
    transfer.close()
    assert kind == "broadcast" or not transfer.folder.exists()


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
