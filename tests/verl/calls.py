"""Inputs of verl's losses, verl's configuration, and its losses with their gradients."""

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

B, T = 4, 6
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}


def make_config(policy_loss=None, global_batch_info=None, **settings):
    """verl's ActorConfig with clip bounds that differ from each other and from the defaults."""
    clip = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28}
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(**(policy_loss or {})),
        **clip | settings,
    )
    config.global_batch_info.update(global_batch_info or {})
    return config


def make_call(dtype=torch.float32):
    """Arguments of a policy loss: ratios on both sides of every bound, rows of 6, 3, 0 and 5 tokens."""
    generator = torch.Generator().manual_seed(2)
    log_prob = -torch.rand(B, T, dtype=dtype, generator=generator) * 3 - 0.1
    return {
        "old_log_prob": (log_prob + torch.randn(B, T, dtype=dtype, generator=generator)).clamp(max=0.0),
        "log_prob": log_prob,
        "advantages": torch.tensor([[1.0], [-0.5], [0.7], [-1.2]], dtype=dtype).repeat(1, T),
        "response_mask": (torch.arange(T) < torch.tensor([[6], [3], [0], [5]])).long(),
    }


def with_gradient(loss, call):
    """`loss(**call)`, a 0-dim tensor, and its gradient in log_prob."""
    log_prob = call["log_prob"].clone().requires_grad_()
    value = loss(**call | {"log_prob": log_prob})
    (gradient,) = torch.autograd.grad(value, log_prob)
    return value.detach(), gradient


def of_verl(mode, call, aggregation, config):
    """verl's registered loss of this mode, with its gradient."""
    function = get_policy_loss_fn(mode)
    return with_gradient(lambda **given: function(**given, loss_agg_mode=aggregation, config=config)[0], call)
