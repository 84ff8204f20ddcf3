"""verl's losses and fused head, compared with verl 0.9.1 if it is installed, else with its formulas.

verl 0.9 requires transformers < 5.11, so it cannot be installed beside the trainer; `expected_loss` has the formulas of
its functions, from its documentation and the papers.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from expo_kernels import reference
from expo_kernels.integrations import verl

B, T, H, V = 4, 6, 8, 17
HAS_VERL = importlib.util.find_spec("verl") is not None
VERLS_NAMES = {"expo": "vanilla", "expo_gspo": "gspo", "expo_cispo": "cispo", "expo_sapo": "sapo"}


def make_config(**info):
    if HAS_VERL:
        from verl.workers.config import FSDPActorConfig

        config = FSDPActorConfig(
            strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=0.1, clip_ratio_high=0.28
        )
        config.global_batch_info.update(info)
        return config
    fields = {"clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
    return SimpleNamespace(**fields, tau_pos=1.0, tau_neg=1.05, global_batch_info=info)


def make_call():
    torch.manual_seed(2)
    mask = torch.arange(T) < torch.tensor([[6], [3], [0], [5]])
    log_prob = -torch.rand(B, T) * 3
    return {
        "old_log_prob": log_prob + torch.randn(B, T),
        "log_prob": log_prob,
        "advantages": torch.tensor([[1.0], [-0.5], [0.7], [-1.2]]).expand(B, T),
        "response_mask": mask,
    }


def expected_loss(mode, call, agg_mode, config):
    if HAS_VERL:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn

        return get_policy_loss_fn(VERLS_NAMES[mode])(**call, loss_agg_mode=agg_mode, config=config)[0]
    mask, advantages, log_prob = call["response_mask"].float(), call["advantages"], call["log_prob"]
    log_ratio = log_prob - call["old_log_prob"]
    if mode == "expo_gspo":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1).expand(B, T)
    ratio = log_ratio.clamp(-20, 20).exp()
    clipped = ratio.clamp(0.9, 1.28)
    losses = torch.maximum(-ratio * advantages, -clipped * advantages)
    if mode == "expo":
        losses = torch.where(advantages < 0, torch.minimum(losses, -3.0 * advantages), losses)
    if mode == "expo_cispo":
        losses = -clipped.detach() * advantages * log_prob
    if mode == "expo_sapo":
        tau = torch.where(advantages > 0, 1.0, 1.05)
        losses = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    losses = losses * call.get("rollout_is_weights", 1.0) * mask
    info = config.global_batch_info
    dp_size, num_sequences = info.get("dp_size", 1), info.get("global_batch_size", (mask.sum(1) > 0).sum())
    return (
        dp_size
        * {
            "token-mean": losses.sum() / info.get("batch_num_tokens", mask.sum()),
            "token-sum": losses.sum(),
            "seq-mean-token-sum": losses.sum() / num_sequences,
            "seq-mean-token-sum-norm": losses.sum() / num_sequences / info.get("loss_scale_factor", T),
            "seq-mean-token-mean": (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / num_sequences,
        }[agg_mode]
    )


def assert_same_loss_and_slope(mode, call, agg_mode, config):
    log_prob = call["log_prob"].clone().requires_grad_()
    other = call["log_prob"].clone().requires_grad_()
    ours, _ = verl.policy_loss(mode, **call | {"log_prob": log_prob}, loss_agg_mode=agg_mode, config=config)
    theirs = expected_loss(mode, call | {"log_prob": other}, agg_mode, config)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(log_prob.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", verl.LOSS_MODES)
@pytest.mark.parametrize("agg_mode", verl.AGGREGATIONS)
def test_loss_and_gradient_are_verls(mode, agg_mode):
    if mode == "expo_sapo" and HAS_VERL and agg_mode != "seq-mean-token-mean":
        pytest.skip("verl's own sapo overrides the aggregation it is given")
    assert_same_loss_and_slope(mode, make_call(), agg_mode, make_config())


@pytest.mark.parametrize("agg_mode", verl.AGGREGATIONS)
def test_the_whole_batch_over_all_ranks_is_the_denominator(agg_mode):
    info = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 16, "loss_scale_factor": 9}
    assert_same_loss_and_slope("expo", make_call(), agg_mode, make_config(**info))
    if agg_mode != "token-sum":
        with pytest.raises(ValueError, match="is missing from"):
            verl.policy_loss("expo", **make_call(), loss_agg_mode=agg_mode, config=make_config(dp_size=2))


@pytest.mark.parametrize("mode", [mode for mode in verl.LOSS_MODES if mode != "expo_gspo"])
def test_rollout_weights_weight_the_surrogate(mode):
    call = make_call() | {"rollout_is_weights": torch.rand(B, T) * 2}
    assert_same_loss_and_slope(mode, call, "seq-mean-token-mean", make_config())


def test_masked_garbage_changes_nothing():
    call = make_call()
    spoiled = {name: call[name].masked_fill(~call["response_mask"], torch.nan) for name in call if "mask" not in name}
    ours, _ = verl.policy_loss("expo", **call | spoiled, config=make_config())
    assert torch.equal(ours, verl.policy_loss("expo", **call, config=make_config())[0])


def test_what_cannot_be_is_refused():
    weighted = make_call() | {"rollout_is_weights": torch.ones(B, T)}
    with pytest.raises(ValueError, match="expo_gspo takes no rollout_is_weights"):
        verl.policy_loss("expo_gspo", **weighted, config=make_config())
    with pytest.raises(ValueError, match="config is None"):
        verl.policy_loss("expo", **make_call())
    with pytest.raises(ValueError, match="loss_mode is 'ppo'; expected one of expo, expo_gspo"):
        verl.policy_loss("ppo", **make_call(), config=make_config())
    with pytest.raises(ValueError, match="loss_agg_mode is 'mean'; expected one of token-mean"):
        verl.policy_loss("expo", **make_call(), config=make_config(), loss_agg_mode="mean")
    with pytest.raises(ValueError, match="impl_backend is 'liger'"):
        verl.FusedLinearForPPO(impl_backend="liger")
    with pytest.raises(ValueError, match=r"gradient_tolerance is -0\.1"):
        verl.replace_fused_linear(gradient_tolerance=-0.1)


@pytest.mark.parametrize("shape", [(B, T), (B * T,)])
@pytest.mark.parametrize("chunk_size", [3, 512])
def test_the_fused_head_gives_verls_logps_entropies_and_gradients(shape, chunk_size):
    hidden, weight, ids = torch.randn(*shape, H), torch.randn(V, H), torch.randint(V, shape)
    slopes = torch.randn(2, *shape)

    def results(head):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps, entropies = head(*leaves, ids, temperature=0.7)
        torch.autograd.backward((logps, entropies), tuple(slopes))
        return logps.detach(), entropies.detach(), *(leaf.grad for leaf in leaves)

    def by_formula(hidden, weight, ids, temperature):
        logits = hidden @ weight.T
        return reference.token_logps(logits, ids, temperature), reference.token_entropies(logits, temperature)

    expected = by_formula
    if HAS_VERL:
        from verl.utils.experimental import torch_functional

        expected = torch_functional.FusedLinearForPPO(chunk_size=chunk_size)
    for mine, other in zip(results(verl.FusedLinearForPPO(chunk_size=chunk_size)), results(expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_VERL, reason="verl 0.9 asks for older transformers than the trainer")
def test_verl_finds_what_was_registered():
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.experimental import torch_functional

    theirs = torch_functional.FusedLinearForPPO
    verl.register_losses()
    verl.replace_fused_linear()
    loss, _ = get_policy_loss_fn("expo_cispo")(**make_call(), config=make_config())
    assert loss == verl.policy_loss("expo_cispo", **make_call(), config=make_config())[0]
    assert torch_functional.FusedLinearForPPO is verl.FusedLinearForPPO
    torch_functional.FusedLinearForPPO = theirs


@pytest.mark.skipif(HAS_VERL, reason="verl is installed")
def test_a_missing_verl_is_named():
    with pytest.raises(ImportError, match=r"verl>=0.9,<0.10 is not installed; install it with: pip"):
        verl.register_losses()
