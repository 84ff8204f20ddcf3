"""What a loss call says beside its logits, checked once, and how it travels through a registered op and back.

Shapes and types are checked where the call is made, values inside the op: the same for the PyTorch path and for the
kernels, compiled or not.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from expo_kernels import _validate as validate
from expo_kernels.advantages import check_rewards
from expo_kernels.objective import Objective

# what a loss op returns beside the loss itself, in this order: all but the loss and the maximum are means over tokens
SUMS = ("loss", "kl", "ratio_mean", "ratio_max", "clip_low_fraction", "clip_high_fraction", "tokens", "entropy")
_DEFAULT = Objective()


class Request(NamedTuple):
    """A call's checked arguments; shapes as in `expo_loss`."""

    completion_mask: Tensor
    objective: Objective
    num_sequences: int
    advantages: Tensor | None  # None: to be made of rewards
    rewards: Tensor | None
    group_size: int
    old_logps: Tensor | None
    ref_logps: Tensor | None
    rollout_logps: Tensor | None
    beta: float | Tensor
    normalizer: float | Tensor | None
    cu_seqlens: Tensor | None
    entropy_bonus: float | Tensor | None  # None: 0, and no entropy is computed for it

    @property
    def advantages_are_per_sequence(self) -> bool:
        """Whether `advantages` hold one number per sequence rather than one per position."""
        return self.advantages is not None and self.advantages.shape == (self.num_sequences,)

    def pack(self, dtype: torch.dtype) -> list[Tensor | None]:
        """All tensors but the mask, as ops take them; numbers as 0-dim tensors of `dtype`, without synchronisation."""

        def number(value: float | Tensor | None) -> Tensor | None:
            if value is None or isinstance(value, Tensor):
                return value
            device = self.completion_mask.device
            if torch.compiler.is_compiling():
                # products are what a trace keeps a changing number symbolic through
                return torch.ones((), dtype=dtype, device=device) * value
            return torch.full((), value, dtype=dtype, device=device)

        return [
            self.advantages,
            self.rewards,
            self.old_logps,
            self.ref_logps,
            self.rollout_logps,
            number(self.beta),
            number(self.normalizer),
            self.cu_seqlens,
            number(self.entropy_bonus),
        ]

    @classmethod
    def unpack(cls, completion_mask: Tensor, packed: list[Tensor | None], objective: str, group_size: int) -> Self:
        """The call again, inside an op, once its values have been checked."""
        advantages, rewards, old_logps, ref_logps, rollout_logps, beta, normalizer, cu_seqlens, entropy_bonus = packed
        assert beta is not None
        request = cls(
            completion_mask,
            Objective.from_text(objective),
            completion_mask.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1,
            advantages,
            rewards,
            group_size,
            old_logps,
            ref_logps,
            rollout_logps,
            beta,
            normalizer,
            cu_seqlens,
            entropy_bonus,
        )
        request._check_values(beta, normalizer)
        if entropy_bonus is not None:
            validate.scalar_value("entropy_bonus", entropy_bonus)
        return request

    def _check_values(self, beta: Tensor, normalizer: Tensor | None) -> None:
        validate.mask_values("completion_mask", self.completion_mask)
        validate.scalar_value("beta", beta)
        if self.ref_logps is None and validate.may_read(beta):
            _check_no_penalty(float(beta))
        if normalizer is not None:
            validate.scalar_value("normalizer", normalizer, above_zero=True)
        if self.rewards is not None:
            validate.finite("rewards", self.rewards)
        if self.cu_seqlens is not None:
            validate.cumulative_length_values(self.cu_seqlens, self.completion_mask.shape[0])


def check_request(
    completion_mask: Tensor,
    *,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    rollout_logps: Tensor | None,
    beta: float | Tensor,
    objective: Objective | None,
    normalizer: float | Tensor | None,
    cu_seqlens: Tensor | None,
    entropy_bonus: float | Tensor = 0.0,
) -> Request:
    """The arguments of a loss call as one value, once all that needs no tensor read has been checked."""
    validate.is_tensor("completion_mask", completion_mask)
    objective = _DEFAULT if objective is None else objective
    shape = completion_mask.shape
    for name, tensor in (("old_logps", old_logps), ("ref_logps", ref_logps), ("rollout_logps", rollout_logps)):
        if tensor is not None:
            validate.floating(name, tensor)
            validate.same_shape(name, tensor, "completion_mask", shape)
            validate.same_device(completion_mask=completion_mask, **{name: tensor})
    _check_scalars(objective, beta, normalizer)
    validate.scalar("entropy_bonus", entropy_bonus)
    _check_options(objective, beta, ref_logps, rollout_logps)
    num_sequences = _count_sequences(shape, cu_seqlens)
    if advantages is not None:
        if rewards is not None or group_size is not None:
            raise ValueError("advantages are given together with rewards or group_size; give one or the other")
        _check_advantages(advantages, completion_mask, num_sequences)
    elif rewards is None or group_size is None:
        raise ValueError("neither advantages nor (rewards and group_size) are given; give exactly one of the two")
    else:
        check_rewards(rewards, group_size)
        if rewards.numel() != num_sequences:
            raise ValueError(f"rewards has shape {list(rewards.shape)}; expected [B] = [{num_sequences}]")
        validate.same_device(completion_mask=completion_mask, rewards=rewards)
    return Request(
        completion_mask,
        objective,
        num_sequences,
        advantages,
        rewards,
        group_size or 1,
        old_logps,
        ref_logps,
        rollout_logps,
        beta,
        normalizer,
        cu_seqlens,
        entropy_bonus if isinstance(entropy_bonus, Tensor) or entropy_bonus != 0.0 else None,
    )


def _check_scalars(objective: Any, beta: float | Tensor, normalizer: float | Tensor | None) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is a {type(objective).__name__}; expected an expo_kernels.Objective")
    validate.scalar("beta", beta)
    if normalizer is not None:
        validate.scalar("normalizer", normalizer, above_zero=True)


def _check_options(
    objective: Objective, beta: float | Tensor, ref_logps: Tensor | None, rollout_logps: Tensor | None
) -> None:
    if ref_logps is None:
        if not isinstance(beta, Tensor):
            _check_no_penalty(beta)
        elif not validate.may_read(beta):
            # a tensor on a device is not read: there, the caller who passes one must pass ref_logps
            _check_no_penalty("a tensor that is not known to be 0")
        if objective.kl_importance_weighted:
            raise ValueError("kl_importance_weighted has no effect without ref_logps; give them or turn it off")
    if objective.rollout_correction is None and rollout_logps is not None:
        raise ValueError(
            "rollout_logps would be ignored: objective.rollout_correction is None; "
            'set it to "token" or "sequence", or leave rollout_logps out'
        )
    if objective.rollout_correction is not None and rollout_logps is None:
        raise ValueError(f'rollout_correction="{objective.rollout_correction}" needs rollout_logps; give them')


def _check_no_penalty(beta: float | str) -> None:
    if beta != 0.0:
        raise ValueError(f"ref_logps is None, but beta is {beta}; give ref_logps, or beta=0.0 for no KL penalty")


def _count_sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None:
        return shape[0]
    validate.cumulative_lengths(cu_seqlens)
    return cu_seqlens.numel() - 1


def _check_advantages(advantages: Tensor, completion_mask: Tensor, num_sequences: int) -> None:
    validate.floating("advantages", advantages)
    validate.same_device(completion_mask=completion_mask, advantages=advantages)
    if advantages.shape not in ((num_sequences,), completion_mask.shape):
        raise ValueError(
            f"advantages has shape {list(advantages.shape)}; expected one per sequence, [{num_sequences}], "
            f"or one per position, {list(completion_mask.shape)}"
        )
