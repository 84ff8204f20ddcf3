"""vLLM has the policy's weights after every sync, and where it has not the probe says so."""

import pytest

from expo.errors import SyncError
from expo.rollout.vllm import in_process
from tests.vllm.conftest import BY_PROBE


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_every_large_update_arrives(pairs, kind):
    pairs(kind).require_large_updates_to_arrive()


def test_the_probe_catches_a_sync_left_out(pair, monkeypatch):
    pair.move(10)
    leave_out_sync(pair, monkeypatch)
    with pytest.raises(SyncError, match=BY_PROBE):
        pair.sync.run()


def test_a_sync_left_out_after_a_small_update_is_caught(pairs, monkeypatch):
    pair = pairs("tied", dtype="bfloat16")
    pair.require_small_updates_to_arrive(lambda: leave_out_sync(pair, monkeypatch))


def leave_out_sync(pair, monkeypatch):
    monkeypatch.setattr(type(pair.engine), "load_weights", lambda self, weights: list(weights))


def test_the_probe_catches_a_prefix_cache_that_was_kept(pair, monkeypatch):
    pair.move(11)
    monkeypatch.setattr(type(pair.engine), "_reset_cache", lambda self: None)
    with pytest.raises(SyncError, match=BY_PROBE):
        pair.sync.run()


def test_the_probe_catches_a_tied_head_left_stale(pair, monkeypatch):
    pair.move(12)
    monkeypatch.setattr(in_process, "pack_tied_head", lambda model: None)
    with pytest.raises(SyncError, match=BY_PROBE):
        pair.sync.run()


def test_the_probe_catches_a_weight_that_never_came(pair, monkeypatch):
    named = pair.policy.named_weights
    left_out = "model.layers.1.mlp.down_proj.weight"
    pair.move(13)
    monkeypatch.setattr(pair.policy, "named_weights", lambda: (item for item in named() if item[0] != left_out))
    with pytest.raises(SyncError, match=BY_PROBE):
        pair.sync.run()
