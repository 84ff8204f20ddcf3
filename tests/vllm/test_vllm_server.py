"""vLLM servers: the same replies as from the in-process engine, on the policy's weights, also after failures."""

import os
import signal

import pytest

from expo.errors import EngineError, StopRequested, SyncError
from expo.rollout import Sampling
from expo.rollout.vllm.client import Server
from expo.rollout.vllm.transfer import broadcast, interface
from expo.rollout.vllm.transfer.files import WeightFiles
from tests.vllm.conftest import BY_PROBE
from tests.vllm.test_vllm_replies import SAMPLING, largest_difference, requests, tokens


def process_of(served):
    (supervisor,) = served.engine._supervisors
    return supervisor._process._process


def kill(served):
    number = process_of(served).pid
    os.killpg(number, signal.SIGKILL)
    return number


def interrupted(named_weights, index, action):
    """The weights; `action` is called before the one with that index."""
    for number, item in enumerate(named_weights()):
        if number == index:
            action()
        yield item


def test_every_large_update_arrives(served):
    served.require_large_updates_to_arrive()


def test_the_probe_catches_a_skipped_sync(served, monkeypatch):
    served.move(10)
    skip_sync(monkeypatch)
    with pytest.raises(SyncError, match=BY_PROBE):
        served.sync.run()


def skip_sync(monkeypatch):
    post = Server.post
    monkeypatch.setattr(Server, "post", lambda *call: None if "read_weights" in str(call) else post(*call))
    monkeypatch.setattr(broadcast, "fill_buckets", lambda *_: iter(()))


def test_the_probe_catches_a_stale_prefix_cache(served, monkeypatch):
    served.move(11)
    monkeypatch.setattr(interface, "reset_prefix_cache", lambda server: None)
    with pytest.raises(SyncError, match=BY_PROBE):
        served.sync.run()


def test_the_probe_catches_a_stale_tied_head(served, monkeypatch):
    served.move(12)
    post = Server.post
    monkeypatch.setattr(Server, "post", lambda *call: None if "pack_tied_head" in str(call) else post(*call))
    with pytest.raises(SyncError, match=BY_PROBE):
        served.sync.run()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_logps_are_the_policys_at_the_temperature(served, temperature):
    batch = requests()
    assert (
        largest_difference(served.policy, batch, served.engine.generate(batch, Sampling(temperature, 12)), temperature)
        < 1e-5
    )


def test_replies_equal_those_of_an_in_process_engine(served, pair):
    expected = pair.engine.generate(requests(), SAMPLING)
    found = served.engine.generate(requests(), SAMPLING)
    assert tokens(found) == tokens(expected)
    assert [reply.text for reply in found[0]] == [reply.text for reply in expected[0]]
    assert [reply.is_truncated for reply in found[0]] == [reply.is_truncated for reply in expected[0]]


def test_progress_counts_every_reply_and_may_stop_the_call(served):
    counts = []
    expected = tokens(served.engine.generate(requests(), SAMPLING, counts.append))
    assert sum(counts) == 32

    def stop(count):
        raise StopRequested("test")

    with pytest.raises(StopRequested):
        served.engine.generate(requests(), SAMPLING, stop)
    assert tokens(served.engine.generate(requests(), SAMPLING)) == expected
    assert served.sync.run() < 1e-5


def require_equal_replies_after_a_kill(served):
    """A server that is killed while it generates is started again, gets the policy's weights, and gives its replies."""
    served.move(13)
    served.sync.run()
    batch = requests(64)
    expected = served.engine.generate(batch, SAMPLING)
    killed = []

    def kill_once(count):
        if count and not killed:
            killed.append(kill(served))

    found = served.engine.generate(batch, SAMPLING, kill_once)
    assert process_of(served).pid != killed[0]
    assert tokens(found) == tokens(expected)
    assert served.sync.difference() < 1e-5


def test_killing_a_server_while_it_generates_changes_no_reply(served):
    require_equal_replies_after_a_kill(served)


def test_a_server_killed_during_a_weight_sync_is_sent_the_weights_again(served, monkeypatch):
    monkeypatch.setattr(interface, "BUCKET_BYTES", 2**14)  # so that some buckets have arrived
    named, before = served.policy.named_weights, process_of(served).pid
    monkeypatch.setattr(served.policy, "named_weights", lambda: interrupted(named, 8, lambda: kill(served)))
    served.move(14)
    assert served.sync.run() < 1e-5
    assert process_of(served).pid != before


def test_a_sync_after_an_interrupted_one_succeeds(served, monkeypatch):
    def fail():
        raise LookupError("test")

    named, before = served.policy.named_weights, process_of(served).pid
    served.move(15)
    with monkeypatch.context() as patch:
        patch.setattr(interface, "BUCKET_BYTES", 2**14)
        patch.setattr(served.policy, "named_weights", lambda: interrupted(named, 8, fail))
        with pytest.raises(LookupError):
            served.sync.run()
    assert served.sync.run() < 1e-5
    assert process_of(served).pid == before


def test_a_stopped_server_ends_the_wait(served, monkeypatch):
    engine, batch = served.engine, requests()
    expected = tokens(engine.generate(batch, SAMPLING))
    (supervisor,) = engine._supervisors
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_section", engine._section.model_copy(update={"patience_s": 3.0}))
        patch.setattr(engine, "_servers", [Server(supervisor.server.url, 3.0, supervisor.server.key)])
        os.killpg(supervisor._process._process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(EngineError, match=r"vllm\.patience_s = 3 s"):
                engine.generate(batch, SAMPLING)
        finally:
            os.killpg(supervisor._process._process.pid, signal.SIGCONT)
    assert tokens(engine.generate(batch, SAMPLING)) == expected


# the servers of the tests below replace those of the tests above


@pytest.mark.slow
def test_every_large_update_arrives_with_an_untied_head_by_broadcasts_and_as_files(pairs, monkeypatch):
    """A server that was started for broadcasts also loads files."""
    served, files = pairs("untied", "broadcast"), WeightFiles(None)
    served.require_large_updates_to_arrive()
    served.restart()
    (supervisor,) = served.engine._supervisors
    monkeypatch.setattr(served.engine, "_weights", files)
    monkeypatch.setattr(supervisor, "_weights", files)
    served.require_large_updates_to_arrive()
    files.close()


@pytest.mark.slow
def test_a_skipped_sync_after_a_small_update_is_caught(pairs, monkeypatch):
    pairs("tied", "files", dtype="bfloat16").require_small_updates_to_arrive(lambda: skip_sync(monkeypatch))
