"""The integration: our losses with verl's signature, and our fused head, against verl's own."""

import pytest
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.experimental import torch_functional

from expo_kernels.integrations import verl
from tests.verl.calls import TOLERANCES, B, T, make_call, make_config, of_verl, with_gradient

H, V = 8, 17
VERLS_NAMES = {"expo": "vanilla", "expo_gspo": "gspo", "expo_cispo": "cispo", "expo_sapo": "sapo"}


def assert_same_loss_and_gradient(mode, call, aggregation, config):
    def loss(**given):
        return verl.policy_loss(mode, **given, loss_agg_mode=aggregation, config=config)[0]

    theirs = of_verl(VERLS_NAMES[mode], call, aggregation, config)
    for one, other in zip(with_gradient(loss, call), theirs, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCES[call["log_prob"].dtype])


# verl's own sapo overrides the aggregation that it is given
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("mode", "aggregation"),
    [
        (mode, aggregation)
        for mode in verl.LOSS_MODES
        for aggregation in verl.AGGREGATIONS
        if mode != "expo_sapo" or aggregation == "seq-mean-token-mean"
    ],
)
def test_loss_and_gradient_are_verls(mode, aggregation, dtype):
    assert_same_loss_and_gradient(mode, make_call(dtype), aggregation, make_config())


@pytest.mark.parametrize("aggregation", verl.AGGREGATIONS)
def test_the_whole_batch_over_all_ranks_is_the_denominator(aggregation):
    info = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 16, "loss_scale_factor": 9}
    assert_same_loss_and_gradient("expo", make_call(), aggregation, make_config(global_batch_info=info))
    if aggregation != "token-sum":
        with pytest.raises(ValueError, match="is missing from"):
            verl.policy_loss(
                "expo", **make_call(), loss_agg_mode=aggregation, config=make_config(global_batch_info={"dp_size": 2})
            )


@pytest.mark.parametrize("mode", verl.LOSS_MODES)
def test_weights_and_advantages_may_differ_from_token_to_token(mode):
    call = make_call() | {"rollout_is_weights": torch.rand(B, T) * 2, "advantages": torch.randn(B, T)}
    assert_same_loss_and_gradient(mode, call, "seq-mean-token-mean", make_config())


def test_masked_garbage_changes_nothing():
    call = make_call()
    is_masked = call["response_mask"] == 0
    spoiled = {name: call[name].masked_fill(is_masked, torch.nan) for name in call if "mask" not in name}
    ours, _ = verl.policy_loss("expo", **call | spoiled, config=make_config())
    assert torch.equal(ours, verl.policy_loss("expo", **call, config=make_config())[0])


def test_what_cannot_be_is_refused():
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

    expected = torch_functional.FusedLinearForPPO(chunk_size=chunk_size)
    for mine, other in zip(results(verl.FusedLinearForPPO(chunk_size=chunk_size)), results(expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per", ["reply", "token"])
def test_the_fused_head_takes_a_temperature_per_reply_or_per_token(per):
    """verl's head has the same logits if the hidden states are divided, since it has no bias."""
    hidden, weight, ids = torch.randn(B, T, H), torch.randn(V, H), torch.randint(V, (B, T))
    slopes, temperature = torch.randn(2, B, T), 0.5 + torch.rand(B, T if per == "token" else 1)

    def results(head, divisor, **options):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps, entropies = head(leaves[0] / divisor, leaves[1], ids, **options)
        torch.autograd.backward((logps, entropies), tuple(slopes))
        return logps.detach(), entropies.detach(), *(leaf.grad for leaf in leaves)

    mine = results(verl.FusedLinearForPPO(chunk_size=3), 1.0, temperature=temperature.squeeze(1))
    theirs = results(torch_functional.FusedLinearForPPO(), temperature.unsqueeze(2))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_verl_finds_what_was_registered(monkeypatch):
    theirs = torch_functional.FusedLinearForPPO
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", theirs)  # restored afterwards
    verl.register_losses()
    verl.replace_fused_linear()
    loss, _ = get_policy_loss_fn("expo_cispo")(**make_call(), config=make_config())
    assert loss == verl.policy_loss("expo_cispo", **make_call(), config=make_config())[0]
    assert torch_functional.FusedLinearForPPO is verl.FusedLinearForPPO
