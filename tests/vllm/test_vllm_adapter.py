"""Weight syncs with vllm.lora = adapter: vLLM applies the policy's LoRA adapter, and stale ones are caught."""

import pytest
import torch
from safetensors.torch import save_file

from expo.errors import EngineError, SyncError
from expo.rollout.vllm import in_process
from expo.rollout.vllm.client import Server
from expo.types import Sample
from tests.vllm.conftest import BY_PROBE, PROMPTS
from tests.vllm.test_vllm_replies import SAMPLING, largest_difference, requests, tokens
from tests.vllm.test_vllm_server import require_equal_replies_after_a_kill

TRANSFERS = [None, "files", "broadcast"]


@pytest.fixture(params=TRANSFERS, ids=["in process", "files", "broadcast"])
def adapted(pairs, request):
    """A pair whose syncs send adapters, in process and by each weight transfer, after the first of them."""
    found = pairs("tied", request.param, takes_adapters=True)
    found.sync.run()
    return found


@pytest.fixture(params=TRANSFERS[1:])
def served(pairs, request):
    found = pairs("tied", request.param, takes_adapters=True)
    found.sync.run()
    return found


def skip_loading(monkeypatch):
    """Neither the engine in process nor a server loads the adapters that it is sent."""
    post = Server.post

    def post_nothing(server, path, body=None):
        is_adapter = body is not None and body.get("method") in ("read_adapter", "use_received_adapter")
        return {"results": [[]]} if is_adapter else post(server, path, body)

    monkeypatch.setattr(Server, "post", post_nothing)
    monkeypatch.setattr(in_process, "load_adapter", lambda model, matrices: [])


def test_every_large_update_arrives(adapted):
    adapted.require_large_updates_to_arrive()


def test_three_large_steps_of_adamw_arrive(adapted):
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        replies = torch.randint(2, 19, (12, 6), generator=generator).tolist()
        samples = [
            Sample(PROMPTS[n % 4], [*reply, 1], [-2.9] * 7, advantage=(-1.0) ** n) for n, reply in enumerate(replies)
        ]
        for mini_batch in adapted.policy.prepare(samples):
            assert not adapted.policy.update(mini_batch, torch.tensor(0.01))["skipped"]
        with pytest.raises(SyncError, match="sync_tolerance"):
            adapted.sync.difference()
        assert adapted.sync.run() < 1e-5, step


@pytest.mark.slow
def test_every_large_update_arrives_with_an_untied_head(pairs):
    pair = pairs("untied", takes_adapters=True)
    pair.sync.run()
    pair.require_large_updates_to_arrive()


def test_only_adapters_are_sent(adapted, monkeypatch):
    def fail():
        raise AssertionError("the base weights were gathered again")

    monkeypatch.setattr(adapted.policy, "named_weights", fail)
    monkeypatch.setattr(adapted.policy, "named_base_weights", fail)
    adapted.move(3)
    assert adapted.sync.run() < 1e-5


def test_all_adapters_are_compared_exactly(adapted):
    found = adapted.engine.describe_weights()[0]
    matrices = dict(adapted.policy.named_adapters())
    assert len(matrices) == 2 * 7 * 2  # two matrices of seven layers in two blocks
    assert {name: found[name]["shape"] for name in matrices} == {
        name: list(matrix.shape) for name, matrix in matrices.items()
    }
    assert adapted.sync.num_compared > len(matrices)


def test_the_probe_catches_a_stale_adapter(adapted, monkeypatch):
    adapted.move(10)
    skip_loading(monkeypatch)
    with pytest.raises(SyncError, match=BY_PROBE):
        adapted.sync.run()


def test_a_stale_adapter_after_a_small_update_is_caught(pairs, monkeypatch):
    pair = pairs("tied", dtype="bfloat16", takes_adapters=True)
    pair.require_small_updates_to_arrive(lambda: skip_loading(monkeypatch))


def test_the_probe_catches_a_stale_prefix_cache(pairs, monkeypatch):
    pair = pairs("tied", takes_adapters=True)
    pair.sync.run()
    pair.move(11)
    monkeypatch.setattr(type(pair.engine), "_reset_cache", lambda self: None)
    with pytest.raises(SyncError, match=BY_PROBE):
        pair.sync.run()


UNKNOWN = "model.layers.9.mlp.up_proj"


def with_unknown(policy):
    """The policy's adapters, and one of a layer that vLLM's model does not have."""
    return {**dict(policy.named_adapters()), **{f"{UNKNOWN}.lora_{part}.weight": torch.ones(6, 6) for part in "AB"}}


def test_a_layer_that_vllm_cannot_adapt_is_refused_and_the_adapter_stays(pairs):
    pair = pairs("tied", takes_adapters=True)
    pair.sync.run()
    before = pair.engine.describe_weights()
    pair.move(15)
    with pytest.raises(EngineError, match=rf"cannot adapt 1 layers .* such as {UNKNOWN}, .* vllm\.lora = merged"):
        pair.engine.load_weights(with_unknown(pair.policy).items())
    assert pair.engine.describe_weights() == before


def test_a_worker_names_the_layers_that_vllm_cannot_adapt(pairs, tmp_path):
    served = pairs("tied", "files", takes_adapters=True)
    served.sync.run()
    save_file(with_unknown(served.policy), tmp_path / "adapter.safetensors")
    (server,) = served.engine._servers
    answer = server.post("/collective_rpc", {"method": "read_adapter", "args": [str(tmp_path)]})
    assert answer == {"results": [[UNKNOWN]]}
    assert served.sync.difference() < 1e-5


def test_logps_of_replies_are_the_policys(adapted):
    adapted.move(12)
    adapted.sync.run()
    batch = requests()
    assert largest_difference(adapted.policy, batch, adapted.engine.generate(batch, SAMPLING), 1.0) < 1e-5


def test_a_restarted_server_is_sent_base_weights_and_adapter(served):
    require_equal_replies_after_a_kill(served)


def test_adapters_are_staged_while_the_server_samples_with_earlier_ones(served):
    before = tokens(served.engine.generate(requests(), SAMPLING))
    served.move(14)
    staged = served.sync.stage()
    assert tokens(served.engine.generate(requests(), SAMPLING)) == before
    assert served.sync.use(staged) < 1e-5
    assert tokens(served.engine.generate(requests(), SAMPLING)) != before
