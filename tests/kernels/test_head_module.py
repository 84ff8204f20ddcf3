"""A head given as a module: what PEFT wraps is differentiated as PEFT's own forward, or refused; never left frozen."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from expo_kernels import LinearExpoLoss, Objective, expo_loss, linear_expo_loss, linear_token_logps, token_logps

B, T, H, V = 4, 6, 16, 40
ONLY_HEAD = {"r": 3, "lora_alpha": 8, "target_modules": ["lm_head"], "init_lora_weights": False}


def causal_lm(*, tied=False):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def with_adapter(*, tied=False, **settings):
    return get_peft_model(causal_lm(tied=tied), LoraConfig(**settings))


def batch():
    torch.manual_seed(1)
    ids = torch.randint(V, (B, T + 1))
    return ids, ids[:, 1:], torch.rand(B, T) < 0.8, torch.randn(B)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_like_own_forward(model):
    """Loss, log-probs and every gradient equal those of the model's own logits."""
    ids, replies, mask, advantages = batch()
    options = {"advantages": advantages, "beta": 0.0}
    inner = model.get_base_model()
    hidden = inner.model(ids).last_hidden_state[:, :-1]
    head = inner.get_output_embeddings()
    logps = linear_token_logps(hidden.detach(), head, replies, mask=mask)
    ours = gradients(model, LinearExpoLoss(Objective())(hidden, head, replies, mask, **options).loss)
    logits = model(ids).logits[:, :-1]
    torch.testing.assert_close(logps, token_logps(logits, replies, mask=mask))
    theirs = gradients(model, expo_loss(logits, replies, mask, **options).loss)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")
    return ours


@pytest.mark.parametrize(
    "settings",
    [
        ONLY_HEAD,
        ONLY_HEAD | {"use_rslora": True, "target_modules": ["lm_head", "q_proj"]},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"r": 2, "target_modules": ["q_proj"]},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=["lora", "rslora", "saved", "plain", "saved-both"],
)
def test_the_gradients_are_those_of_pefts_own_forward(settings):
    ours = assert_like_own_forward(with_adapter(**settings))
    if "lm_head" in (*settings["target_modules"], *settings.get("modules_to_save", ())):
        assert any("lm_head" in name and value.abs().max() > 0 for name, value in ours.items())


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_follow_the_model(target):
    assert_like_own_forward(with_adapter(tied=True, **ONLY_HEAD | {"target_modules": [target, "q_proj"]}))


def test_two_adapters_one_of_them_and_none():
    model = with_adapter(**ONLY_HEAD)
    model.add_adapter("second", LoraConfig(**ONLY_HEAD | {"r": 5}))
    head = model.get_base_model().lm_head
    head.set_adapter(["default", "second"])
    assert any("second" in name for name in assert_like_own_forward(model))
    head.set_adapter("second")
    assert not any("default" in name for name in assert_like_own_forward(model))
    ids, replies, mask, _ = batch()
    hidden = model.get_base_model().model(ids).last_hidden_state[:, :-1]
    with model.disable_adapter():
        base = linear_token_logps(hidden, head, replies, mask=mask)
        torch.testing.assert_close(base, token_logps(model(ids).logits[:, :-1], replies, mask=mask))
    assert not torch.equal(base, linear_token_logps(hidden, head, replies, mask=mask))


def test_merged_adapters_give_log_probs_but_do_not_train():
    model, (ids, replies, mask, _) = with_adapter(**ONLY_HEAD), batch()
    head = model.get_base_model().lm_head
    hidden = model.get_base_model().model(ids).last_hidden_state[:, :-1]
    separate = linear_token_logps(hidden, head, replies, mask=mask).detach()
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(linear_token_logps(hidden, head, replies, mask=mask), separate)
    with pytest.raises(ValueError, match=r"merged adapters, which would not train; call unmerge_adapter\(\)"):
        linear_token_logps(hidden, head, replies, mask=mask)
    whole = model.merge_and_unload()
    torch.testing.assert_close(linear_token_logps(hidden, whole.lm_head, replies, mask=mask).detach(), separate)


def loss(head, hidden=None):
    ids, mask = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T)
    hidden = torch.randn(B, T, H) if hidden is None else hidden
    return linear_expo_loss(hidden, head, ids, mask, advantages=torch.ones(B), beta=0.0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (LoraConfig(**ONLY_HEAD | {"use_dora": True, "init_lora_weights": True}), "DoraLinearVariant"),
        (LoraConfig(**ONLY_HEAD | {"lora_dropout": 0.1}), "lora_dropout=0.1"),
        (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "peft.tuners.ia3"),
        (LoHaConfig(r=2, target_modules=["lm_head"]), "peft.tuners.loha"),
        (
            LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]}),
            "TrainableTokensWrapper",
        ),
    ],
    ids=["dora", "dropout", "ia3", "loha", "tokens"],
)
def test_other_kinds_of_adapters_are_refused_by_name(settings, named):
    head = get_peft_model(causal_lm(), settings).train().get_base_model().lm_head
    with pytest.raises((ValueError, TypeError), match=named) as error:
        loss(head)
    assert "\n" not in str(error.value)


def test_the_bias_of_an_adapter_is_refused():
    adapted = get_peft_model(nn.Sequential(nn.Linear(H, V)), LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    with pytest.raises(ValueError, match="lora_bias"):
        loss(adapted.base_model.model[0])


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"]])
def test_the_base_weight_of_an_adapted_head_is_refused(targets):
    model = with_adapter(**ONLY_HEAD | {"target_modules": targets})
    head = model.get_base_model().lm_head
    hidden = torch.randn(B, T, H, requires_grad=len(targets) > 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"weight is the base weight of a peft.*give the module itself"):
            loss(head.weight, hidden)
    with torch.no_grad():  # the reference policy's log-probs
        loss(head.weight, hidden)
    with model.disable_adapter():
        loss(head.weight, hidden)


def test_weights_that_are_not_adapted_are_taken():
    model = with_adapter(r=2, target_modules=["q_proj"]).get_base_model()
    loss(model.lm_head.weight)
    tied = with_adapter(tied=True, **ONLY_HEAD | {"target_modules": ["embed_tokens"]}).get_base_model()
    loss(tied.lm_head.weight)


def test_a_linear_layer_brings_its_bias():
    hidden, head = torch.randn(B, T, H), nn.Linear(H, V)
    ids, mask = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T)
    options = {"advantages": torch.ones(B), "beta": 0.0}
    apart = linear_expo_loss(hidden, head.weight, ids, mask, bias=head.bias, **options)
    assert torch.equal(loss(head, hidden).loss, apart.loss)
    with pytest.raises(ValueError, match="bias is given, but weight is a module"):
        linear_expo_loss(hidden, head, ids, mask, bias=head.bias, **options)


def test_modules_that_compute_something_else_are_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="Scaled, whose forward is its own"):
        loss(Scaled(H, V))
    with pytest.raises(TypeError, match="Embedding; expected a tensor"):
        loss(nn.Embedding(V, H))


def test_small_adapters_are_not_rounded_away_in_bfloat16():
    model = copy.deepcopy(with_adapter(**ONLY_HEAD))
    head = model.get_base_model().lm_head
    head.base_layer.to(torch.bfloat16)
    head.lora_B["default"].weight.data.mul_(1e-4)
    hidden = torch.randn(B, T, H)
    with model.disable_adapter():
        base = loss(head, hidden).logps
    assert not torch.equal(loss(head, hidden).logps, base)
