"""Log-probability, and entropy, of the chosen tokens: from logits, or from hidden states and the output head.

The linear form never holds [tokens, V] logits: they are made a chunk at a time, and once more in backward.
Letters: B sequences, T completion positions, V vocabulary, H hidden. Float32 arithmetic whatever the input dtype
(float64 for float64 inputs).
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expo_kernels import _launch, _rows, _vocab_group
from expo_kernels import _validate as validate
from expo_kernels._vocab_group import VocabShard
from expo_kernels.objective import Objective


def make_source(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    wants_grad: tuple[bool, bool, bool] = (False, False, False),
    *,
    in_place: bool = False,
    shard: VocabShard | None = None,
) -> _rows.RowSource:
    """Rows of `states`: hidden states where a head `weight` is given, else logits."""
    dtype = _rows.arithmetic_dtype(states, weight, bias)
    if weight is None:
        return _rows.LogitRows(states, index, dtype, in_place=in_place)
    return _rows.LinearRows(states, weight, bias, index, dtype, wants_grad, shard)


def join_vocab_group(
    name: str | None,
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    logit_softcap: float | None,
    budget_mb: float | None,
) -> VocabShard | None:
    """This rank's part of a head that is shared; None where it is whole. Checks the ids."""
    shard, valid_ids = None, ids
    if mask is not None and (name is not None or validate.may_read(ids)):
        valid_ids = ids[mask != 0]
    if name is not None:
        assert weight is not None
        (vocab_size, hidden_size), dtype = weight.shape, _rows.arithmetic_dtype(states, weight, bias)
        most_rows = _rows.most_rows(vocab_size, hidden_size, dtype, weight.device, logit_softcap, budget_mb)
        shard = _vocab_group.join(name, weight, valid_ids.reshape(-1), most_rows)
    check_id_values(states, weight, valid_ids, shard)
    return shard


@torch.library.custom_op("expo_kernels::token_logps", mutates_args=())
def _token_logps(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    logits_budget_mb: float | None,
    return_entropy: bool,
    keeps_rows: bool,
    vocab_group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs and entropies like the ids (an empty tensor without `return_entropy`), and, where `keeps_rows`, what
    the kernels' backward reads of each row: its largest logit and its sum, [M] each."""
    given = (states, weight, bias, completion_ids, mask)
    shard = join_vocab_group(vocab_group, *given, logit_softcap, logits_budget_mb)
    with torch.autocast(states.device.type, enabled=False):
        if shard is None and _launch.use_kernels(states, weight, bias):
            from expo_kernels import _fused

            objective = Objective(temperature=temperature, logit_softcap=logit_softcap)
            return _fused.logps_of_states(*given, objective, logits_budget_mb, return_entropy, keeps_rows)
        index = valid_index(mask, completion_ids)
        chosen_ids = completion_ids.reshape(-1).index_select(0, index).long()
        source = make_source(states, weight, bias, index, shard=shard)
        parts = _rows.chunks(source, logit_softcap, logits_budget_mb)
        buffers = _rows.make_buffers(source, parts, logit_softcap)
        logps = torch.empty(source.num_rows, dtype=source.dtype, device=source.device)
        entropies = torch.empty_like(logps)
        for rows in parts:
            ids = chosen_ids[rows]
            read = _rows.read_chunk(
                source, rows, ids, buffers, temperature, logit_softcap, wants_entropy=return_entropy
            )
            logps[rows] = read.logps
            if read.entropies is not None:
                entropies[rows] = read.entropies
        entropies = spread(entropies, index, completion_ids.shape) if return_entropy else logps.new_empty(0)
        # empty rows would do, but then a graph would not be the same on both paths
        tops, sums = (logps.new_zeros(completion_ids.numel() if keeps_rows else 0) for _ in range(2))
        return spread(logps, index, completion_ids.shape), entropies, tops, sums


@_token_logps.register_fake
def _(
    states: Tensor, weight: Tensor | None, bias: Tensor | None, completion_ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, return_entropy, keeps_rows, _ = options

    def made(*shape: int) -> Tensor:
        return states.new_empty(shape, dtype=_rows.arithmetic_dtype(states, weight, bias))

    num_kept = completion_ids.numel() if keeps_rows else 0
    entropies = made(*completion_ids.shape) if return_entropy else made(0)
    return made(*completion_ids.shape), entropies, made(num_kept), made(num_kept)


@torch.library.custom_op("expo_kernels::token_logps_backward", mutates_args=())
def _token_logps_backward(
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    mask: Tensor | None,
    kept_rows: list[Tensor],
    temperature: float,
    logit_softcap: float | None,
    logits_budget_mb: float | None,
    wants_grad: list[bool],
    vocab_group: str | None,
) -> list[Tensor]:
    """Gradients of those of states, weight and bias that want one, in their dtypes.

    `kept_rows` are the entropies, the largest logits and the sums that the forward pass returned.
    """
    of_states, of_weight, of_bias = wants_grad
    wanted = (of_states, of_weight, of_bias)
    given = (states, weight, bias, completion_ids, mask)
    shard = join_vocab_group(vocab_group, *given, logit_softcap, logits_budget_mb)
    with torch.autocast(states.device.type, enabled=False):
        if shard is None and _launch.use_kernels(states, weight, bias):
            from expo_kernels import _fused

            objective = Objective(temperature=temperature, logit_softcap=logit_softcap)
            slopes = (grad_logps, grad_entropies)
            made = _fused.logps_backward(*given, objective, logits_budget_mb, wanted, kept_rows, *slopes)
            return made_gradients(made, (states, weight, bias), in_input_dtypes=True)
        index = valid_index(mask, completion_ids)
        chosen_ids = completion_ids.reshape(-1).index_select(0, index).long()
        source = make_source(states, weight, bias, index, wanted, shard=shard)
        parts = _rows.chunks(source, logit_softcap, logits_budget_mb)
        buffers = _rows.make_buffers(source, parts, logit_softcap)
        logp_slopes = grad_logps.reshape(-1).index_select(0, index)
        entropy_slopes = None if grad_entropies is None else grad_entropies.reshape(-1).index_select(0, index)
        for rows in parts:
            ids = chosen_ids[rows]
            read = _rows.read_chunk(
                source, rows, ids, buffers, temperature, logit_softcap, wants_entropy=entropy_slopes is not None
            )
            chunk = (source, rows, read, logp_slopes[rows])
            if entropy_slopes is None:
                _rows.absorb_logp_slopes(*chunk, temperature)
            else:
                _rows.absorb_logp_and_entropy_slopes(*chunk, entropy_slopes[rows], temperature)
        return made_gradients(source.gradients(), (states, weight, bias), in_input_dtypes=True)


@_token_logps_backward.register_fake
def _(
    _: Tensor, __: Tensor | None, states: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> list[Tensor]:
    given = zip((states, weight, bias), options[-2], strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, wanted in given if wanted and tensor is not None]


def _setup_token_logps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, weight, bias, completion_ids, mask, *ctx.settings, return_entropy, _, ctx.vocab_group = inputs
    _, entropies, tops, sums = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(tops, sums, *(() if return_entropy else (entropies,)))
    ctx.save_for_backward(states, weight, bias, completion_ids, mask, entropies, tops, sums)


@once_differentiable
def _backward_token_logps(
    ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *given, entropies, tops, sums = ctx.saved_tensors
    if grad_logps is None:
        if grad_entropies is None:
            return (None,) * 11
        grad_logps = torch.zeros_like(grad_entropies)
    wants_grad = list(ctx.needs_input_grad[:3])
    kept = [entropies, tops, sums]
    made = _token_logps_backward(grad_logps, grad_entropies, *given, kept, *ctx.settings, wants_grad, ctx.vocab_group)
    return *in_places(made, wants_grad), *(None,) * 8


_token_logps.register_autograd(_backward_token_logps, setup_context=_setup_token_logps)


def made_gradients(
    gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...], *, in_input_dtypes: bool = False
) -> list[Tensor]:
    """The gradients that were made, shaped as their inputs and contiguous, which an op's fake can promise."""
    return [
        gradient.view(tensor.shape).to(tensor.dtype if in_input_dtypes else gradient.dtype).contiguous()
        for gradient, tensor in zip(gradients, inputs, strict=True)
        if gradient is not None and tensor is not None
    ]


def in_places(made: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """One entry per input: the next of `made` where one is wanted."""
    rest = iter(made)
    return [next(rest) if is_wanted else None for is_wanted in wanted]


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
        validate.is_tensor(mask_name, mask)
        validate.same_shape(mask_name, mask, "completion_ids", ids.shape)
    validate.same_device(**{states_name: states, "completion_ids": ids, mask_name: mask})


def check_id_values(states: Tensor, weight: Tensor | None, valid_ids: Tensor, shard: VocabShard | None) -> None:
    """The ids of valid tokens are in the vocabulary, where reading them is free."""
    size, size_name = (states.shape[-1], "V of logits") if weight is None else (weight.shape[0], "V of weight")
    if shard is not None:
        size, size_name = shard.vocab_size, "V of weight on all ranks"
    validate.ids_in_range("completion_ids", valid_ids, size, size_name)


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
    vocab_group: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    validate.number("temperature", temperature, low=0.0, above=True)
    if logit_softcap is not None:
        validate.number("logit_softcap", logit_softcap, low=0.0, above=True)
    keeps_rows = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (states, weight, bias)
    )
    logps, entropies, _, _ = _token_logps(
        states, weight, bias, ids, mask, temperature, logit_softcap, budget_mb, return_entropy, keeps_rows, vocab_group
    )
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
    vocab_group: Any = None,
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
    vocab_group: Any = None,
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
    vocab_group: Any = None,
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
        vocab_group: process group whose ranks share the head by vocabulary: see `linear_expo_loss`. Backward reduces
            too, so every rank must run it.

    Returns:
        Log-probs like `completion_ids` (float64 for float64 inputs), or the pair (log-probs, entropies).

    Raises:
        ValueError: shapes that do not fit, ids out of range (read on CPU), a temperature that is not > 0.
        TypeError: an argument of the wrong type or dtype.
    """
    weight, bias, group_name = _vocab_group.local_head(hidden, weight, bias, vocab_group)
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
        group_name,
    )
