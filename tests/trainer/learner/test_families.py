"""Families of models: each is loaded, sampled, scored and trained with its own logits, or refused by name."""

import re

import pytest
import torch

from expo.config import ModelSection, load_config
from expo.errors import ConfigError
from expo.learner.model_files import load_tokenizer
from expo.learner.policy import DeepSpeedPolicy
from expo.rollout import GenerationRequest, Sampling
from expo.rollout.transformers import TransformersEngine
from expo.runtime.distributed import join_ranks
from expo.types import Sample
from expo_kernels import token_logps
from tests import ROOT
from tests.trainer.learner.families import FAMILIES, save_model

pytestmark = pytest.mark.medium

SCALED, UNREADABLE, UNLIKE, CACHE = (
    "the model scales its logits",
    "their hidden states cannot be read",
    "the logits of their hidden states and head differ",
    "cannot sample from models of the family",
)
REFUSED = {
    "cohere": SCALED,
    "falcon_mamba": CACHE,
    "granite": SCALED,
    "llama4_text": UNREADABLE,
    "mamba": CACHE,
    "minimax": CACHE,
    "recurrent_gemma": UNLIKE,
    "rwkv": CACHE,
}
NOT_PACKED = {
    "bamba", "bloom", "falcon", "falcon_h1", "gpt_oss", "granitemoehybrid", "jamba", "lfm2", "mamba2", "mpt", "opt",
    "qwen3_5_text", "qwen3_next",
}  # fmt: skip
PROMPTS = ("3+8-2+7=", "1+1=")


def open_policy(folder, family):
    save_model(folder, family)
    config = load_config(None, [("model.path", str(folder)), ("optimizer.warmup_steps", 0), ("optimizer.lr", 1e-3)])
    policy = DeepSpeedPolicy(config, join_ranks("cpu", 60))
    engine = TransformersEngine(policy.model, policy.tokenizer, batch_size=8)
    engine.check()
    return policy, engine


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_trains_on_its_own_logits_or_is_refused_by_name(tmp_path, family):
    if family in REFUSED:
        with pytest.raises(ConfigError, match=re.escape(REFUSED[family])) as error:
            open_policy(tmp_path, family)
        assert family in str(error.value) or REFUSED[family] == SCALED
        assert "\n" not in str(error.value)
        return
    policy, engine = open_policy(tmp_path, family)
    prompts = [policy.tokenizer(text)["input_ids"] for text in PROMPTS]
    groups = engine.generate([GenerationRequest(prompt, [1, 2]) for prompt in prompts], Sampling(1.0, 12))
    pairs = [(prompt, reply) for prompt, group in zip(prompts, groups, strict=True) for reply in group]
    samples = []
    for sign, (prompt, reply) in zip((1.0, -1.0, 1.0, -1.0), pairs, strict=True):
        ids = torch.tensor([[*prompt, *reply.token_ids]])
        with torch.no_grad():
            logits = policy.model.eval()(ids).logits[:, len(prompt) - 1 : -1]
        own = token_logps(logits, torch.tensor([reply.token_ids]))[0]
        torch.testing.assert_close(torch.tensor(reply.logps), own, atol=1e-4, rtol=0)
        (scored,) = engine.score([prompt], [reply.token_ids], 1.0)
        torch.testing.assert_close(torch.tensor(scored), own, atol=1e-4, rtol=0)
        samples.append(Sample(prompt, reply.token_ids, reply.logps, sign))
    before = torch.cat([value.flatten() for _, value in policy.named_weights()])
    (mini_batch,) = policy.prepare(samples)
    metrics = policy.update(mini_batch, torch.tensor(0.01))
    assert (metrics["skipped"], metrics["ratio_max"], metrics["kl"]) == (0.0, 1.0, 0.0)
    assert policy.mismatch()["rollout_logp_difference_max"] < 1e-4
    assert not torch.equal(before, torch.cat([value.flatten() for _, value in policy.named_weights()]))
    if family in NOT_PACKED:
        with pytest.raises(ConfigError, match=rf"policy\.packing = true does not work for the family {family}\b"):
            policy._require_separate_sequences()
    else:
        policy._require_separate_sequences()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_packs_is_refused_at_its_start(tmp_path, stage):
    config = load_config(None, [("model.path", str(tmp_path)), ("policy.packing", True), ("policy.zero_stage", stage)])
    save_model(tmp_path, "opt")
    with pytest.raises(ConfigError, match=r"policy\.packing = true does not work for the family opt"):
        DeepSpeedPolicy(config, join_ranks("cpu", 60))
    save_model(tmp_path, "qwen3")
    DeepSpeedPolicy(config, join_ranks("cpu", 60))


def test_a_copy_is_checked_with_its_first_weights(tmp_path):
    model = save_model(tmp_path, "mamba")
    engine = TransformersEngine(model, load_tokenizer(ModelSection(path=str(tmp_path))), batch_size=4, is_shared=False)
    with pytest.raises(ConfigError, match="cannot sample from models of the family mamba"):
        engine.load_weights(model.named_parameters())


def test_the_table_of_the_docs_is_what_is_tested():
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ?(\w*) ?\|$", text, re.MULTILINE)
    assert rows == [(family, *_outcome(family)) for family in sorted(FAMILIES)]


def _outcome(family):
    if family in REFUSED:
        return "refused", ""
    return "trained", "refused" if family in NOT_PACKED else "packed"
