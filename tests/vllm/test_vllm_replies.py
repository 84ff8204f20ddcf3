"""Replies by vLLM: their distribution, log-probs, seeds and end tokens."""

import dataclasses
import json
import weakref
from pathlib import Path

import pytest
import torch

from expo.errors import StopRequested
from expo.learner.batch import collate
from expo.learner.model import PolicyModule
from expo.rollout import GenerationRequest, Sampling, request_seed
from tests.vllm.conftest import PROMPTS, new_engine, save_model

SAMPLING = Sampling(temperature=1.0, max_new_tokens=12)


def requests(samples=8):
    return [
        GenerationRequest(prompt, [request_seed("vllm", row, sample) for sample in range(samples)])
        for row, prompt in enumerate(PROMPTS)
    ]


def tokens(groups):
    return [[reply.token_ids for reply in group] for group in groups]


def largest_difference(policy, sent, groups, temperature):
    """Largest |rollout - policy| log-prob, with the policy's computed as in training."""
    rows = [(request.prompt_ids, reply) for request, group in zip(sent, groups, strict=True) for reply in group]
    objective = dataclasses.replace(policy._objective, temperature=temperature)
    batch = collate([ids for ids, _ in rows], [reply.token_ids for _, reply in rows], 0, torch.device("cpu"))
    with torch.no_grad():
        logps = PolicyModule(policy.model, objective, torch.float32, None)(batch)
    rollout_logps = torch.tensor([logp for _, reply in rows for logp in reply.logps])
    return float((logps[batch.completion_mask] - rollout_logps).abs().max())


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_logps_are_the_policys_at_the_temperature(pair, temperature):
    batch = requests()
    groups = pair.engine.generate(batch, Sampling(temperature, 12))
    assert largest_difference(pair.policy, batch, groups, temperature) < 1e-5


def test_a_seed_gives_the_same_reply_in_any_order_and_after_a_restart(pair):
    expected = tokens(pair.engine.generate(requests(), SAMPLING))
    assert len({tuple(ids) for ids in expected[0]}) > 1, "eight seeds gave one reply"
    backwards = [GenerationRequest(request.prompt_ids, request.seeds[::-1]) for request in requests()[::-1]]
    found = tokens(pair.engine.generate(backwards, SAMPLING))
    assert [group[::-1] for group in found[::-1]] == expected
    again = new_engine(pair.path, pair.policy)
    again.load_weights(pair.policy.named_weights())
    assert tokens(again.generate(requests(), SAMPLING)) == expected
    again.close()


def test_the_models_generation_config_is_ignored(pair, ledger_model, tmp_path):
    path = Path(save_model(tmp_path / "model", ledger_model[1], tied=True))
    own = {"temperature": 0.3, "top_p": 0.5, "top_k": 3, "max_new_tokens": 2, "repetition_penalty": 1.5}
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 1, **own}))
    engine = new_engine(str(path), pair.policy)
    engine.load_weights(pair.policy.named_weights())
    batch = requests()
    groups = engine.generate(batch, SAMPLING)
    assert tokens(groups) == tokens(pair.engine.generate(batch, SAMPLING))
    assert largest_difference(pair.policy, batch, groups, 1.0) < 1e-5
    engine.close()


def test_replies_end_at_an_end_token_or_are_truncated(pair):
    end = pair.policy.tokenizer.eos_token_id
    replies = [reply for group in pair.engine.generate(requests(32), SAMPLING) for reply in group]
    for reply in replies:
        assert len(reply.token_ids) == len(reply.logps) <= SAMPLING.max_new_tokens
        assert end not in reply.token_ids[:-1]
        assert reply.is_truncated == (reply.token_ids[-1] != end)
        assert pair.policy.tokenizer.eos_token not in reply.text
    assert {reply.is_truncated for reply in replies} == {True, False}


def test_prompts_that_exceed_one_forward_pass_are_queued(pair):
    long = [GenerationRequest(prompt * 9, [request_seed("long", row, sample) for sample in range(64)])
            for row, prompt in enumerate(PROMPTS)]  # fmt: skip
    wide = new_engine(pair.path, pair.policy, num_replies=256)
    wide.load_weights(pair.policy.named_weights())
    assert tokens(wide.generate(long, SAMPLING)) == tokens(pair.engine.generate(long, SAMPLING))
    wide.close()


def held_memory(model):
    """Weak references to a vLLM model's weights and to its layers' key-value caches."""
    caches = [layer.kv_cache for layer in model.modules() if hasattr(layer, "kv_cache")]
    assert len(caches) == model.config.num_hidden_layers
    return [weakref.ref(tensor) for tensor in [*model.parameters(), *caches]]


def test_a_closed_engine_frees_its_weights_and_cache_and_others_go_on(pair):
    engine = new_engine(pair.path, pair.policy)
    engine.load_weights(pair.policy.named_weights())
    expected = tokens(engine.generate(requests(), SAMPLING))
    (held,) = engine._llm.apply_model(held_memory)
    assert all(reference() is not None for reference in held)
    engine.close()
    assert all(reference() is None for reference in held)
    assert tokens(pair.engine.generate(requests(), SAMPLING)) == expected


def test_progress_counts_every_reply_and_may_stop_the_call(pair):
    counts = []
    expected = tokens(pair.engine.generate(requests(), SAMPLING, counts.append))
    assert sum(counts) == 32

    def stop(count):
        raise StopRequested("test")

    with pytest.raises(StopRequested):
        pair.engine.generate(requests(), SAMPLING, stop)
    assert tokens(pair.engine.generate(requests(), SAMPLING)) == expected
    assert pair.sync.run() < 1e-5, "a request that was not aborted keeps its cache blocks"
