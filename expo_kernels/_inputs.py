"""`LossInputs`: the arguments of a loss call other than its logits, checked once, and how they pass through an op.

Shapes and types are checked in the public function and values inside the op, for the PyTorch path and for the kernels,
compiled or not. `Tokens` holds the same arguments flattened, as the kernels read them.

Letters: M positions of the caller's tensors, B sequences, T positions each.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from expo_kernels import _compat, _temperatures
from expo_kernels import _validate as validate
from expo_kernels._packing import sequence_of
from expo_kernels.advantages import check_rewards
from expo_kernels.objective import Objective, RolloutCorrection

# a loss op returns these numbers in one tensor, in this order: all but the loss, the maximum and the count are means
# over tokens
METRIC_NAMES = ("loss", "kl", "ratio_mean", "ratio_max", "clip_low_fraction", "clip_high_fraction", "tokens", "entropy")
# these follow with a gradient tolerance
GRADIENT_METRIC_NAMES = ("gradient_error_bound", "kept_columns")
_DEFAULT = Objective()


# the fields that an op takes as one list of tensors: an op's schema has no names for the elements of a list
TENSOR_FIELDS = (
    "advantages",
    "rewards",
    "old_logps",
    "ref_logps",
    "rollout_logps",
    "beta",
    "normalizer",
    "cu_seqlens",
    "entropy_bonus",
    "completion_lengths",
    "temperature",
)


class LossInputs(NamedTuple):
    """The checked arguments of a loss call; shapes as in `expo_loss`."""

    completion_mask: Tensor
    objective: Objective
    num_sequences: int
    advantages: Tensor | None  # None: computed from rewards
    rewards: Tensor | None
    group_size: int
    old_logps: Tensor | None
    ref_logps: Tensor | None
    rollout_logps: Tensor | None
    beta: float | Tensor
    normalizer: float | Tensor | None
    cu_seqlens: Tensor | None
    entropy_bonus: float | Tensor | None  # None: 0, and no entropy is computed
    completion_lengths: Tensor | None = None  # [B] on the CPU
    temperature: Tensor | None = None  # [B] or like the mask; None: that of the objective

    def temperatures(self, dtype: torch.dtype) -> Tensor | None:
        """The temperature of each position, [M]; None: that of the objective."""
        mask = self.completion_mask
        if self.temperature is None:
            return None
        return _temperatures.of_positions(self.temperature, mask, mask.shape, dtype, self.cu_seqlens)

    @property
    def advantages_are_per_sequence(self) -> bool:
        """Whether `advantages` hold one number per sequence rather than one per position."""
        return self.advantages is not None and self.advantages.shape == (self.num_sequences,)

    def to_tensors(self, dtype: torch.dtype) -> list[Tensor | None]:
        """The `TENSOR_FIELDS` as ops take them; numbers become 0-dim tensors of `dtype`, without synchronisation."""

        def as_tensor(value: float | Tensor | None) -> Tensor | None:
            if value is None or isinstance(value, Tensor):
                return value
            device = self.completion_mask.device
            if torch.compiler.is_compiling():
                # a product keeps a changing number symbolic in a trace
                return torch.ones((), dtype=dtype, device=device) * value
            return torch.full((), value, dtype=dtype, device=device)

        return [as_tensor(getattr(self, name)) for name in TENSOR_FIELDS]

    @classmethod
    def from_tensors(
        cls, completion_mask: Tensor, tensors: list[Tensor | None], objective: str, group_size: int
    ) -> Self:
        """Rebuild the arguments inside an op, and check their values."""
        fields: dict[str, Any] = dict(zip(TENSOR_FIELDS, tensors, strict=True))
        cu_seqlens = fields["cu_seqlens"]
        inputs = cls(
            completion_mask=completion_mask,
            objective=Objective.from_text(objective),
            num_sequences=completion_mask.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1,
            group_size=group_size,
            **fields,
        )
        inputs._check_values(fields["beta"], fields["normalizer"], fields["entropy_bonus"])
        return inputs

    def _check_values(self, beta: Tensor, normalizer: Tensor | None, entropy_bonus: Tensor | None) -> None:
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
        if entropy_bonus is not None:
            validate.scalar_value("entropy_bonus", entropy_bonus)
        if self.completion_lengths is not None and validate.may_read(self.completion_mask):
            mask = (self.completion_mask != 0).reshape(-1)
            counted = _lengths(mask, self.completion_mask.shape, self.cu_seqlens)
            validate.equal_lengths("completion_lengths", self.completion_lengths, counted)


@dataclass(frozen=True)
class Tokens:
    """The inputs of the kernels, all flat and on one device."""

    ids: Tensor  # [M] integers
    mask: Tensor | None  # [M] bool; None (for log-probs only): all positions are valid
    objective: Objective
    ids_are_local: bool = False  # columns of this rank's shard, outside [0, V_r) if another rank holds them
    num_sequences: int = 1
    tokens_per_sequence: int = 1  # T of padded input
    starts: Tensor | None = None  # [B + 1] of packed input
    sequence_index: Tensor | None = None  # [M] of packed input
    advantages: Tensor | None = None  # [M], [B], or rewards [B]
    advantages_are: str = "sequence"  # "token", "sequence" or "rewards"
    group_size: int = 1
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    rollout_logps: Tensor | None = None
    lengths: Tensor | None = None  # [B], with aggregation "sequence"
    beta: Tensor | None = None  # one number
    normalizer: Tensor | None = None  # one number
    entropy_bonus: Tensor | None = None  # one number
    temperatures: Tensor | None = None  # [M] float32; None: the objective's

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether a token's gradient depends on the log-probs of its whole sequence."""
        return self.objective.spans_sequences or self.objective.corrects_sequences

    @functools.cached_property
    def hyper_parameters(self) -> Tensor:
        """The float32 block that holds every static number of the objective for the kernels.

        Every call makes its own, on its stream: a block that calls share would be read on other streams before it is
        written, and a captured graph would read it after it is freed.
        """
        from expo_kernels._triton import slots

        return _compat.numbers_on_device(slots.hyper_parameters(self.objective), self.ids.device)


def make_tokens(inputs: LossInputs, completion_ids: Tensor | None) -> Tokens:
    """The inputs of the kernels, without a synchronisation; a loss from log-probs needs no `completion_ids`."""
    mask = (inputs.completion_mask != 0).reshape(-1)
    device, shape = mask.device, inputs.completion_mask.shape
    starts, sequence_index = None, None
    if inputs.cu_seqlens is not None:
        starts = inputs.cu_seqlens.contiguous()
        positions = torch.arange(mask.numel(), device=device)
        sequence_index = sequence_of(positions, starts)

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().reshape(-1).contiguous()

    advantages, meaning = flat(inputs.rewards), "rewards"
    if inputs.advantages is not None:
        advantages = flat(inputs.advantages)
        meaning = "sequence" if inputs.advantages_are_per_sequence else "token"
    objective = inputs.objective
    old_logps, rollout_logps = flat(inputs.old_logps), flat(inputs.rollout_logps)
    is_known = objective.corrects_sequences and not objective.spans_sequences
    if is_known and old_logps is not None and rollout_logps is not None:
        # the correction does not depend on the logits: give each token its sequence's sum of differences as its own
        differences = torch.where(mask, old_logps.float() - rollout_logps.float(), 0.0)
        differences = _sequence_sums(differences, shape, starts, sequence_index)
        if objective.rollout_correction == "geometric_mask":
            differences /= _sequence_sums(mask.float(), shape, starts, sequence_index).clamp(min=1.0)
            # a weight of exp(0) = 1 where the sequence is within the bounds; elsewhere one above the cap of 1, hence 0
            differences = torch.zeros_like(differences).masked_fill(_is_out_of_bounds(differences, objective), math.inf)
            objective = dataclasses.replace(objective, rollout_floor=0.0, rollout_cap=1.0)
        rollout_logps = old_logps.float() - differences
        correction: RolloutCorrection = "token_mask" if objective.masks_rollouts else "token"
        objective = dataclasses.replace(objective, rollout_correction=correction)
    return Tokens(
        ids=mask if completion_ids is None else completion_ids.reshape(-1).contiguous(),
        mask=mask,
        objective=objective,
        num_sequences=inputs.num_sequences,
        tokens_per_sequence=max(shape[-1], 1),  # read for padded input only
        starts=starts,
        sequence_index=sequence_index,
        advantages=advantages,
        advantages_are=meaning,
        group_size=inputs.group_size,
        old_logps=old_logps,
        ref_logps=flat(inputs.ref_logps),
        rollout_logps=rollout_logps,
        lengths=_lengths(mask, shape, starts) if objective.aggregation == "sequence" else None,
        beta=_number(inputs.beta, device),
        normalizer=_normalizer(inputs, mask),
        entropy_bonus=None if inputs.entropy_bonus is None else _number(inputs.entropy_bonus, device),
    )


def _is_out_of_bounds(differences: Tensor, objective: Objective) -> Tensor:
    """Whether exp of each difference is outside [rollout_floor, rollout_cap]."""
    ratios = differences.clamp(-objective.log_ratio_clamp, objective.log_ratio_clamp).exp()
    return (ratios < objective.rollout_floor) | (ratios > objective.rollout_cap)


def _sequence_sums(values: Tensor, shape: torch.Size, starts: Tensor | None, sequence_index: Tensor | None) -> Tensor:
    """The sum over the sequence of each position, [M]."""
    if starts is None or sequence_index is None:
        return values.view(shape).sum(dim=1, keepdim=True).expand(shape).reshape(-1)
    # one thread adds up each sequence in order: equal bits in every run, which index_add_ does not guarantee
    sums: Tensor = torch.segment_reduce(values, "sum", offsets=starts, unsafe=True)
    return sums[sequence_index]


def _lengths(mask: Tensor, shape: torch.Size, starts: Tensor | None) -> Tensor:
    """Number of valid tokens of each sequence, [B]."""
    if starts is None:
        return mask.view(shape).sum(dim=1)
    counted = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return counted[starts[1:].long()] - counted[starts[:-1].long()]


def _normalizer(inputs: LossInputs, mask: Tensor) -> Tensor:
    if inputs.normalizer is not None:
        return _number(inputs.normalizer, mask.device)
    if inputs.objective.aggregation == "token":
        return mask.sum().clamp(min=1).float()
    return _number(float(max(inputs.num_sequences, 1)), mask.device)


def _number(value: float | Tensor, device: torch.device) -> Tensor:
    """A 0-dim float32 tensor on the device; a Python number becomes a kernel's argument, without synchronisation."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float32)
    return torch.full((), float(value), dtype=torch.float32, device=device)


def check_inputs(
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
) -> LossInputs:
    """Check all that can be checked without reading a tensor; return the arguments of a loss call as one value."""
    validate.is_tensor("completion_mask", completion_mask)
    objective = _DEFAULT if objective is None else objective
    shape = completion_mask.shape
    for name, tensor in (("old_logps", old_logps), ("ref_logps", ref_logps), ("rollout_logps", rollout_logps)):
        if tensor is not None:
            validate.floating(name, tensor)
            validate.per_token(name, tensor, "completion_mask", shape)
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
            raise ValueError(
                f"rewards has shape {list(rewards.shape)}; expected [B] = [{num_sequences}], one per sequence"
            )
        validate.same_device(completion_mask=completion_mask, rewards=rewards)
    return LossInputs(
        completion_mask=completion_mask,
        objective=objective,
        num_sequences=num_sequences,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size or 1,
        old_logps=old_logps,
        ref_logps=ref_logps,
        rollout_logps=rollout_logps,
        beta=beta,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        entropy_bonus=entropy_bonus if isinstance(entropy_bonus, Tensor) or entropy_bonus != 0.0 else None,
    )


def _check_scalars(objective: Any, beta: float | Tensor, normalizer: float | Tensor | None) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is a {type(objective).__name__}; expected an expo_kernels.Objective")
    validate.scalar("beta", beta)
    if normalizer is not None:
        validate.scalar("normalizer", normalizer, above_zero=True)
        if objective.aggregation == "none":
            raise ValueError('normalizer has no effect with aggregation "none"; divide the losses yourself')


def _check_options(
    objective: Objective, beta: float | Tensor, ref_logps: Tensor | None, rollout_logps: Tensor | None
) -> None:
    if ref_logps is None:
        if not isinstance(beta, Tensor):
            _check_no_penalty(beta)
        elif not validate.may_read(beta):
            # a tensor on an accelerator is not read: with such a beta, ref_logps are required
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


def fused_inputs(
    inputs: LossInputs, temperature: float | Tensor | None, completion_lengths: Tensor | None = None
) -> LossInputs:
    """The inputs of the losses from logits and hidden states, with the arguments that only these have.

    Refuses what only the loss from log-probs has: its gradient is computed in backward, the others' in forward.
    """
    objective = inputs.objective
    if objective.aggregation == "none":
        raise ValueError(
            'aggregation="none" does not go with logits or hidden states: their loss computes its gradient in the '
            "forward pass, where no token has a weight yet; use expo_loss_from_logps on log-probs of token_logps or "
            "linear_token_logps, or another aggregation"
        )
    if objective.spans_batches:
        raise ValueError(
            f'surrogate "{objective.surrogate}" does not go with logits or hidden states: it selects tokens by the '
            "log-probs of all tokens, and their loss computes its gradient a few rows at a time; use "
            "expo_loss_from_logps on log-probs of token_logps or linear_token_logps, or another surrogate"
        )
    if completion_lengths is not None:
        validate.lengths_on_host("completion_lengths", completion_lengths, inputs.num_sequences)
        inputs = inputs._replace(completion_lengths=completion_lengths)
    if temperature is None:
        return inputs
    if objective.temperature != _DEFAULT.temperature:
        raise ValueError(
            f"temperature is given together with objective.temperature={objective.temperature}; give one or the other"
        )
    if not isinstance(temperature, Tensor):
        return inputs._replace(objective=dataclasses.replace(objective, temperature=temperature))
    _temperatures.check(temperature, "completion_mask", inputs.completion_mask, inputs.num_sequences)
    return inputs._replace(temperature=temperature.detach())


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
    shape = completion_mask.shape
    if advantages.shape in ((num_sequences,), shape):
        return
    how = ""
    if advantages.numel() == num_sequences:  # [B, 1], or a row per question
        how = "; use advantages.flatten()"
    elif advantages.dim() == len(shape) == 2 and len(advantages) == shape[0] and advantages.shape[1] > shape[1]:
        how = f"; if advantages starts with the prompt, use advantages[:, {-shape[1]}:]"
    elif advantages.dim() == 1 and len(advantages) > 0 and num_sequences % len(advantages) == 0:
        repeats = num_sequences // len(advantages)
        how = f"; if these are of questions, use advantages.repeat_interleave({repeats})"
    raise ValueError(
        f"advantages has shape {list(advantages.shape)}; expected one per sequence, [{num_sequences}], "
        f"or one per position, {list(shape)}{how}"
    )
