"""vLLM has the policy's weights after every sync, and the probe catches it if not."""

import pytest

from expo.errors import SyncError
from expo.rollout.vllm import in_process
from tests.vllm.conftest import BY_PROBE


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_every_large_update_arrives(pairs, kind):
    pairs(kind).require_large_updates_to_arrive()


def test_the_probe_catches_a_skipped_sync(pair, monkeypatch):
    pair.move(10)
    skip_sync(pair, monkeypatch)
    with pytest.raises(SyncError, match=BY_PROBE):
        pair.sync.run()


def test_a_skipped_sync_after_a_small_update_is_caught(pairs, monkeypatch):
    pair = pairs("tied", dtype="bfloat16")
    pair.require_small_updates_to_arrive(lambda: skip_sync(pair, monkeypatch))


def skip_sync(pair, monkeypatch):
    monkeypatch.setattr(type(pair.engine), "load_weights", lambda self, weights: list(weights))


def test_the_probe_catches_a_stale_prefix_cache(pair, monkeypatch):
    pair.move(11)
    monkeypatch.setattr(type(pair.engine), "_reset_cache", lambda self: None)
    with pytest.raises(SyncError, match=BY_PROBE):
        pair.sync.run()


def test_the_probe_catches_a_stale_tied_head(pair, monkeypatch):
    pair.move(12)
    monkeypatch.setattr(in_process, "pack_tied_head", lambda model: None)
    with pytest.raises(SyncError, match=BY_PROBE):
        pair.sync.run()


def test_the_probe_catches_a_missing_weight(pair, monkeypatch):
    named = pair.policy.named_weights
    missing = "model.layers.1.mlp.down_proj.weight"
    pair.move(13)
    monkeypatch.setattr(pair.policy, "named_weights", lambda: (item for item in named() if item[0] != missing))
    with pytest.raises(SyncError, match=BY_PROBE):
        pair.sync.run()
