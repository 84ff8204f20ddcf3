"""Log-probability, and entropy, of the chosen tokens: from logits, or from hidden states and the output head.

The linear form never holds [tokens, V] logits: they are made a chunk at a time, and once more in backward.
Letters: B sequences, T completion positions, V vocabulary, H hidden. Float32 arithmetic whatever the input dtype
(float64 for float64 inputs).
"""

from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expo_kernels import _launch, _rows
from expo_kernels import _validate as validate
from expo_kernels.objective import Objective


@dataclass(frozen=True)
class _Options:
    """All that is not differentiated."""

    index: Tensor  # [N] int64: positions of the valid tokens
    chosen_ids: Tensor  # [N] int64
    temperature: float
    logit_softcap: float | None
    return_entropy: bool
    budget_mb: float | None


def make_source(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    wants_grad: tuple[bool, bool, bool] = (False, False, False),
    *,
    in_place: bool = False,
) -> _rows.RowSource:
    """Rows of `states`: hidden states where a head `weight` is given, else logits."""
    dtype = _rows.arithmetic_dtype(states, weight, bias)
    if weight is None:
        return _rows.LogitRows(states, index, dtype, in_place=in_place)
    return _rows.LinearRows(states, weight, bias, index, dtype, wants_grad)


class _TokenLogps(torch.autograd.Function):
    """States (logits, or hidden with weight and bias) -> log-probs [N] and entropies [N] of the valid tokens."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor | None, bias: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states, weight, bias)
        ctx.options = options
        source = make_source(states, weight, bias, options.index)
        parts = _rows.chunks(source, options.logit_softcap, options.budget_mb)
        buffers = _rows.make_buffers(source, parts, options.logit_softcap)
        logps = torch.empty(source.num_rows, dtype=source.dtype, device=source.device)
        entropies = torch.zeros_like(logps)
        for rows in parts:
            ids = options.chosen_ids[rows]
            read = _rows.read_chunk(source, rows, ids, buffers, options.temperature, options.logit_softcap)
            logps[rows] = read.logps
            if options.return_entropy:
                entropies[rows] = _rows.chunk_entropies(read)
        if not options.return_entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias = ctx.saved_tensors
        options: _Options = ctx.options
        source = make_source(states, weight, bias, options.index, ctx.needs_input_grad[:3])
        parts = _rows.chunks(source, options.logit_softcap, options.budget_mb)
        buffers = _rows.make_buffers(source, parts, options.logit_softcap)
        with torch.autocast(states.device.type, enabled=False):
            for rows in parts:
                ids = options.chosen_ids[rows]
                read = _rows.read_chunk(source, rows, ids, buffers, options.temperature, options.logit_softcap)
                given = (source, rows, ids, read, grad_logps[rows])
                if options.return_entropy:
                    _rows.absorb_logp_and_entropy_slopes(*given, grad_entropies[rows], options.temperature)
                else:
                    _rows.absorb_logp_slopes(*given, options.temperature)
        return *cast_gradients(source.gradients(), (states, weight, bias)), None


def cast_gradients(
    gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Each gradient in the dtype of its input."""
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, inputs, strict=True)
    )


def valid_index(mask: Tensor | None, ids: Tensor) -> Tensor:
    """Flat positions that count, [N] int64, in order."""
    if mask is None:
        return torch.arange(ids.numel(), device=ids.device)
    return mask.reshape(-1).nonzero().squeeze(1)


def spread(tokens: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """Values of the valid tokens back at their positions, 0 elsewhere; differentiable."""
    return tokens.new_zeros(shape.numel()).index_copy(0, index, tokens).view(shape)


def check_ids_and_mask(states_name: str, states: Tensor, ids: Tensor, mask_name: str, mask: Tensor | None) -> None:
    """The checks on positions that every op makes."""
    validate.integers("completion_ids", ids)
    validate.same_shape("completion_ids", ids, states_name, states.shape[:-1])
    if mask is not None:
        validate.mask_values(mask_name, mask)
        validate.same_shape(mask_name, mask, "completion_ids", ids.shape)
    validate.same_device(**{states_name: states, "completion_ids": ids, mask_name: mask})


def _masked_token_logps(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    return_entropy: bool,
    budget_mb: float | None,
) -> Tensor | tuple[Tensor, Tensor]:
    validate.number("temperature", temperature, low=0.0, above=True)
    if logit_softcap is not None:
        validate.number("logit_softcap", logit_softcap, low=0.0, above=True)
    if _launch.use_kernels(states, weight, bias):
        from expo_kernels import _fused

        made = _fused.logps_of_states(
            states,
            weight,
            bias,
            ids,
            mask,
            Objective(temperature=temperature, logit_softcap=logit_softcap),
            return_entropy=return_entropy,
            budget_mb=budget_mb,
        )
        return made if return_entropy else made[0]
    index = valid_index(mask, ids)
    chosen_ids = ids.reshape(-1).index_select(0, index).long()
    size, size_name = (states.shape[-1], "V of logits") if weight is None else (weight.shape[0], "V of weight")
    validate.ids_in_range("completion_ids", chosen_ids, size, size_name)
    options = _Options(index, chosen_ids, temperature, logit_softcap, return_entropy, budget_mb)
    with torch.autocast(states.device.type, enabled=False):
        pair = _TokenLogps.apply(states, weight, bias, options)  # type: ignore[no-untyped-call]
    logps, entropies = (spread(values, index, ids.shape) for values in cast("tuple[Tensor, Tensor]", pair))
    return (logps, entropies) if return_entropy else logps


@overload
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[False] = False,
) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability in nats of each chosen token, [B, T] float32, 0 where masked; differentiable in `logits`.

    Args:
        logits: [B, T, V] or packed [N, V], any float dtype; row t predicts `completion_ids[:, t]`. Not yet divided by
            the temperature.
        completion_ids: [B, T] or [N] integers in [0, V) wherever the mask is 1, anything elsewhere.
        mask: like `completion_ids`, bool or 0/1: where the token counts; None: everywhere.
        temperature: > 0, no unit.
        logit_softcap: logits become cap * tanh(logits / cap) before the temperature; None: no cap.
        return_entropy: also return the entropies of the distributions, in nats, with their gradient.

    Returns:
        Log-probs like `completion_ids` (float64 for float64 logits), or the pair (log-probs, entropies).

    Raises:
        ValueError: shapes that do not fit, ids out of range (read on CPU), a temperature that is not > 0.
        TypeError: an argument of the wrong type or dtype.
    """
    validate.floating("logits", logits)
    validate.dimensions("logits", logits, "NV" if logits.dim() == 2 else "BTV")
    check_ids_and_mask("logits", logits, completion_ids, "mask", mask)
    return _masked_token_logps(
        logits, None, None, completion_ids, mask, temperature, logit_softcap, return_entropy, None
    )


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[False] = False,
    logits_budget_mb: float | None = None,
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[True],
    logits_budget_mb: float | None = None,
) -> tuple[Tensor, Tensor]: ...
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    logits_budget_mb: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability in nats of each chosen token, [B, T] float32, 0 where masked, without [tokens, V] logits.

    Differentiable in `hidden`, `weight` and `bias`; backward makes the logits again, chunk by chunk.

    Args:
        hidden: [B, T, H] or packed [N, H], any float dtype; row t predicts `completion_ids[:, t]`.
        weight: [V, H] output head, any float dtype.
        completion_ids: [B, T] or [N] integers in [0, V) wherever the mask is 1, anything elsewhere.
        bias: [V], or None.
        mask: like `completion_ids`, bool or 0/1: where the token counts; None: everywhere.
        temperature: > 0, no unit; logits are divided by it.
        logit_softcap: logits become cap * tanh(logits / cap) before the temperature; None: no cap.
        return_entropy: also return the entropies of the distributions, in nats, with their gradient.
        logits_budget_mb: MiB for the logits of one chunk; None: a default for the device.

    Returns:
        Log-probs like `completion_ids` (float64 for float64 inputs), or the pair (log-probs, entropies).

    Raises:
        ValueError: shapes that do not fit, ids out of range (read on CPU), a temperature that is not > 0.
        TypeError: an argument of the wrong type or dtype.
    """
    validate.head_fits(hidden, weight, bias)
    validate.dimensions("hidden", hidden, "NH" if hidden.dim() == 2 else "BTH")
    check_ids_and_mask("hidden", hidden, completion_ids, "mask", mask)
    validate.same_device(hidden=hidden, weight=weight, bias=bias)
    if logits_budget_mb is not None:
        validate.number("logits_budget_mb", logits_budget_mb, low=0.0, above=True)
    return _masked_token_logps(
        hidden,
        weight,
        bias,
        completion_ids,
        mask,
        temperature,
        logit_softcap,
        return_entropy,
        logits_budget_mb,
    )
