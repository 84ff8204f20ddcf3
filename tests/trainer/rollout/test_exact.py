"""Batch-invariant sampling: equal bits of replies in every batch, and refusals where an engine cannot have them."""

import os
import random
from types import SimpleNamespace

import pytest
import torch

from expo.config import load_config
from expo.errors import ConfigError
from expo.rollout import GenerationRequest, Sampling, request_seed
from expo.rollout.exact import VARIABLE, check_exact, set_batch_invariant
from expo.rollout.transformers import TransformersEngine
from expo.rollout.vllm import server
from expo.train import main

SAMPLING = Sampling(temperature=1.0, max_new_tokens=24)
EXACT = {"rollout.exact": True}


def config_of(changes):
    return load_config(None, list(changes.items()))


def bits(groups):
    return [[(reply.token_ids, reply.logps) for reply in group] for group in groups]


def test_replies_have_equal_bits_in_every_batch(ledger_model):
    texts = [f"{first}+{second}-3+7=" for first in range(2, 9) for second in (1, 4)]
    prompts = [ledger_model[1](text)["input_ids"] for text in texts]
    requests = [
        GenerationRequest(prompt, [request_seed("exact", text, sample) for sample in range(8)])
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    expected = bits(TransformersEngine(*ledger_model, batch_size=256, is_exact=True).generate(requests, SAMPLING))
    for batch_size in (1, 24):
        engine = TransformersEngine(*ledger_model, batch_size=batch_size, is_exact=True)
        order = random.Random(batch_size).sample(range(len(requests)), len(requests) // 2)
        some = bits(engine.generate([requests[number] for number in order], SAMPLING))
        assert some == [expected[number] for number in order]
    # the test would not see a difference if there were none without it
    assert bits(TransformersEngine(*ledger_model, batch_size=1).generate(requests, SAMPLING)) != expected


@pytest.mark.parametrize(
    ("changes", "on_gpu", "reason"),
    [
        ({}, True, "not on a GPU; take rollout.engine = vllm"),
        ({"policy.dtype": "bfloat16"}, False, "not with policy.dtype = bfloat16"),
        ({"rollout.engine": "vllm"}, False, "vLLM has no batch-invariant mode on a CPU"),
        ({"rollout.engine": "vllm-server"}, False, "vLLM has no batch-invariant mode on a CPU"),
    ],
)
def test_what_cannot_be_exact_is_refused(changes, on_gpu, reason):
    config = config_of(EXACT | changes)
    with pytest.raises(ConfigError, match=reason):
        check_exact(config, on_gpu=on_gpu)
    check_exact(config_of(changes), on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("changes", "on_gpu"),
    [
        ({}, False),
        ({"rollout.engine": "vllm"}, True),
        ({"rollout.engine": "vllm-server"}, True),
        ({"rollout.engine": "vllm-server", "vllm.servers": ["http://a:1"]}, False),
    ],
)
def test_what_can_be_exact_is_taken(changes, on_gpu):
    check_exact(config_of(EXACT | changes), on_gpu=on_gpu)


@pytest.mark.parametrize(("capability", "is_new"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_mode_needs_a_new_gpu(monkeypatch, capability, is_new):
    monkeypatch.setenv(VARIABLE, "0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    if is_new:
        set_batch_invariant()
    else:
        with pytest.raises(ConfigError, match=r"8\.0 or more, but GPU has 7\.5"):
            set_batch_invariant()
    assert (os.environ[VARIABLE] == "1") == is_new


def test_without_a_gpu_the_mode_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        set_batch_invariant()


@pytest.mark.parametrize(("variables", "is_right"), [({}, False), ({VARIABLE: False}, False), ({VARIABLE: True}, True)])
def test_a_server_in_another_mode_is_refused(variables, is_right):
    found, config = SimpleNamespace(url="http://a:1"), config_of(EXACT | {"rollout.engine": "vllm-server"})
    if is_right:
        server._require_exact(config, found, variables)
    else:
        with pytest.raises(ConfigError, match=r"http://a:1 has VLLM_BATCH_INVARIANT = False"):
            server._require_exact(config, found, variables)
    server._require_exact(load_config(None), found, {})


def test_a_dry_run_refuses_what_the_run_would(capsys):
    with pytest.raises(SystemExit):
        main(["--dry-run", "--policy.dtype=bfloat16", "--rollout.exact=true", "--run.device=cpu"])
    assert "rollout.exact = true with rollout.engine = transformers" in capsys.readouterr().err
