"""Group-relative advantages, and the KL coefficient conditioned on accuracy (AKL).

Source: FG-ExPO (arXiv 2605.11403), eq. 1 for the advantages, eq. 4, 5 and 8 for AKL.
Letters: B sequences = questions * group_size. Float32 out.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from expo_kernels import _validate as validate
from expo_kernels import reference

AdvantageScale = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, group_size: int, *, scale: AdvantageScale = "group", eps: float = 1e-6) -> Tensor:
    """Group-relative advantage of each rollout, [B] float32.

    Source: FG-ExPO eq. 1; the scale "batch" is from REINFORCE++, "none" from Dr. GRPO.

    Args:
        rewards: [B] finite numbers; the rewards of one question are adjacent.
        group_size: G >= 2, rollouts per question; divides B.
        scale: "group": divide by the population std of the group, plus eps; "batch": divide by the population std of
            all B rewards, plus eps; "none": only subtract the group's mean.
        eps: >= 0, in the unit of the rewards.

    Returns:
        [B] float32 (float64 for float64 rewards) on the rewards' device; exactly 0 in a group of equal rewards.

    Raises:
        ValueError: G is 1 or does not divide B, a reward is not finite (checked on CPU), or the scale is unknown.
        TypeError: an argument has the wrong type.
    """
    check_rewards(rewards, group_size)
    validate.choice("scale", scale, ("group", "batch", "none"))
    validate.number("eps", eps, low=0.0)
    advantages: Tensor = _group_advantages(rewards.detach(), group_size, scale, eps)
    return advantages


@torch.library.custom_op("expo_kernels::group_advantages", mutates_args=())
def _group_advantages(rewards: Tensor, group_size: int, scale: str, eps: float) -> Tensor:
    validate.finite("rewards", rewards)
    return advantages_of_rewards(rewards, group_size, scale, eps)


@_group_advantages.register_fake
def _(rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=_dtype_of(rewards))


def advantages_of_rewards(rewards: Tensor, group_size: int, scale: str = "group", eps: float = 1e-6) -> Tensor:
    """`group_advantages` of rewards that are checked already."""
    rewards = rewards.to(_dtype_of(rewards))
    if rewards.numel() == 0:
        return rewards.clone()
    return reference.group_advantages(rewards, group_size, scale, eps)


def _dtype_of(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


def check_rewards(rewards: Tensor, group_size: int) -> None:
    """Check the type and shape of rewards; the op checks that they are finite."""
    validate.real("rewards", rewards)
    if rewards.dim() != 1:
        how = f"use rewards.flatten(), [{rewards.numel()}]" if rewards.dim() > 1 else "give a tensor of one dimension"
        raise ValueError(f"rewards has shape {list(rewards.shape)}; expected [B], those of a question adjacent; {how}")
    validate.group_size_divides(rewards.numel(), group_size)


def akl_beta(
    accuracies: Tensor,
    beta: float | Tensor = 0.02,
    *,
    rho: Literal["tanh", "constant"] | Callable[[Tensor], Tensor] = "tanh",
    process_group: Any = None,
) -> Tensor:
    """beta_eff = beta * rho(mean accuracy): 0-dim float32 on the device of `accuracies`, without a host sync.

    Source: FG-ExPO eq. 4, 5 and 8. A higher accuracy gives a larger penalty weight.

    Args:
        accuracies: verifier scores in [0, 1] of this rank's rollouts of the step, any shape, bool or real; with
            rho="constant" their values are not read.
        beta: >= 0, weight of the penalty before scaling; a 0-dim tensor is not copied to the host.
        rho: "tanh": (tanh(x) + 1) / 2; "constant": 1, which is GRPO; or a function of the 0-dim mean, which must be
            increasing, with positive bounds.
        process_group: the ranks that share the batch; one all-reduce of (sum, count). None: only this process.

    Returns:
        0-dim float32 tensor.

    Raises:
        ValueError: `accuracies` is empty (with a `process_group`: on all ranks), or a score is not in [0, 1] (both
            checked on CPU), or `rho` is unknown.
        TypeError: an argument has the wrong type.
    """
    validate.real("accuracies", accuracies)
    validate.scalar("beta", beta)
    validate.callable_or_choice("rho", rho, ("tanh", "constant"))
    if accuracies.numel() == 0 and process_group is None:
        raise ValueError("accuracies is empty; expected the verifier scores of at least one rollout")
    if rho == "constant":
        scaling = torch.ones((), device=accuracies.device)
    else:
        sum_and_count = _accuracy_sum(accuracies.detach())
        if process_group is not None:
            torch.distributed.all_reduce(sum_and_count, group=process_group)
        mean = _mean_accuracy(sum_and_count)
        scaling = rho(mean) if callable(rho) else reference.akl_scale(mean, rho)
    return _scaled_beta(beta.detach(), scaling) if isinstance(beta, Tensor) else scaling * beta


@torch.library.custom_op("expo_kernels::accuracy_sum", mutates_args=())
def _accuracy_sum(accuracies: Tensor) -> Tensor:
    """Sum and count of the accuracies, [2] float64."""
    validate.finite("accuracies", accuracies)
    validate.within("accuracies", accuracies, 0.0, 1.0)
    total = accuracies.sum(dtype=torch.float64)
    return torch.stack([total, torch.full_like(total, accuracies.numel())])


@_accuracy_sum.register_fake
def _(accuracies: Tensor) -> Tensor:
    return accuracies.new_empty(2, dtype=torch.float64)


@torch.library.custom_op("expo_kernels::mean_accuracy", mutates_args=())
def _mean_accuracy(sum_and_count: Tensor) -> Tensor:
    """The mean of all ranks' accuracies, 0-dim float32."""
    if validate.may_read(sum_and_count) and float(sum_and_count[1]) == 0:
        raise ValueError("accuracies is empty on every rank; expected the verifier scores of at least one rollout")
    return (sum_and_count[0] / sum_and_count[1]).float()


@_mean_accuracy.register_fake
def _(sum_and_count: Tensor) -> Tensor:
    return sum_and_count.new_empty((), dtype=torch.float32)


@torch.library.custom_op("expo_kernels::scaled_beta", mutates_args=())
def _scaled_beta(beta: Tensor, scaling: Tensor) -> Tensor:
    validate.scalar_value("beta", beta)
    return beta.to(scaling.device, torch.float32) * scaling


@_scaled_beta.register_fake
def _(_: Tensor, scaling: Tensor) -> Tensor:
    return torch.empty_like(scaling, dtype=torch.promote_types(torch.float32, scaling.dtype))
