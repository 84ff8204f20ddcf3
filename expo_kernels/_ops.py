"""The registered ops of the loss, and their autograd; each op chooses between PyTorch and Triton.

A loss op computes the loss and its gradients in one pass; autograd saves the gradients, and backward only multiplies
them by the incoming gradient. Values are checked in the op (see `LossInputs.from_tensors`), shapes before it. A loss
call returns a `LossOutput`, built from the op's results. `_logps_ops.py` has the ops of log-probs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expo_kernels import _compat, _engine, _launch
from expo_kernels._head import HeadCall, HeadTensors
from expo_kernels._inputs import GRADIENT_METRIC_NAMES, METRIC_NAMES, LossInputs
from expo_kernels._narrowing import grouped, narrowed, part_shapes

# loss 0-dim, metrics [len(METRIC_NAMES)] (longer with a gradient tolerance), number of tokens 0-dim, log-probs shaped
# like the mask, the wanted gradients
_Made = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


class LossOutput(NamedTuple):
    """What a loss call returns."""

    loss: Tensor
    """0-dim: call .backward() on it. With aggregation "none": the loss of each token, shaped like `completion_mask`."""

    metrics: dict[str, Tensor]
    """0-dim tensors on the device, detached; means over valid tokens (0 if there are none):
    `kl`: nats, by the chosen estimator, with the importance weight if it is enabled; 0 without `ref_logps`;
    `ratio_mean`, `ratio_max`: pi_theta / pi_old of the token or of its sequence ("gmpo": of the sequence, clipped);
    `clip_low_fraction`, `clip_high_fraction`: share of valid tokens for which the surrogate's lower or upper clipped
    term was chosen (the dual clip's cap and Clip-Cov's drawn tokens count as upper; "dppo_tv": share of those masked at
    that bound; always 0 for "sapo", "vespo" and "kl_cov");
    `tokens`: number of valid tokens; `entropy`: nats, only with `return_entropy`;
    only with a `gradient_tolerance`: `gradient_error_bound`, the bound on the relative errors of dHidden and dWeight,
    and `kept_columns`, the share of the vocabulary in their products."""

    logps: Tensor
    """Log-probs in nats, shaped like `completion_mask`, float32, detached; 0 at masked positions."""


# --- called by the public functions


def call_policy_loss(
    tensors: HeadTensors,
    completion_ids: Tensor,
    inputs: LossInputs,
    *,
    budget_mb: float | None = None,
    return_entropy: bool = False,
    inplace: bool = False,
    vocab_group: str | None = None,
    weight_dtype: torch.dtype | None = None,
    gradient_tolerance: float = 0.0,
) -> LossOutput:
    """The loss from hidden states or from logits; the arguments are checked already."""
    op_inputs = (
        completion_ids,
        inputs.completion_mask,
        inputs.to_tensors(tensors.arithmetic_dtype),
        inputs.objective.text,
        inputs.group_size,
    )
    wants_grad = [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors]
    if inplace and wants_grad[0]:
        logits = tensors.hidden_or_logits.detach()
        loss, *others = policy_loss_inplace(logits, *op_inputs, return_entropy)
        return _output(with_gradient(loss, tensors.hidden_or_logits, logits), *others, return_entropy=return_entropy)
    made = policy_loss(
        *tensors, wants_grad, *op_inputs, budget_mb, return_entropy, vocab_group, weight_dtype, gradient_tolerance
    )
    return _output(*made[:4], return_entropy=return_entropy)


def call_policy_loss_from_logps(logps: Tensor, inputs: LossInputs) -> LossOutput:
    """The loss from log-probs; the arguments are checked already."""
    op_tensors = inputs.to_tensors(HeadTensors(logps).arithmetic_dtype)
    if inputs.objective.aggregation == "none":
        losses = token_losses(logps, inputs.completion_mask, op_tensors, inputs.objective.text, inputs.group_size)
        return _output(*losses, return_entropy=False)
    wants_grad = [logps.requires_grad and torch.is_grad_enabled()]
    made = policy_loss_from_logps(
        logps, wants_grad, inputs.completion_mask, op_tensors, inputs.objective.text, inputs.group_size
    )
    return _output(*made[:4], return_entropy=False)


def _output(
    loss: Tensor, metrics: Tensor, num_tokens: Tensor, token_logps: Tensor, *, return_entropy: bool
) -> LossOutput:
    values = metrics.unbind()
    names = METRIC_NAMES if len(values) == len(METRIC_NAMES) else METRIC_NAMES + GRADIENT_METRIC_NAMES
    named = dict(zip(names, values, strict=True)) | {"tokens": num_tokens}
    del named["loss"]
    if not return_entropy:
        del named["entropy"]
    return LossOutput(loss, named, token_logps)


# --- the loss


@torch.library.custom_op("expo_kernels::policy_loss", mutates_args=())
def policy_loss(
    hidden_or_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants_grad: list[bool],
    completion_ids: Tensor,
    completion_mask: Tensor,
    tensors: list[Tensor | None],
    objective: str,
    group_size: int,
    logits_budget_mb: float | None,
    return_entropy: bool,
    vocab_group: str | None,
    weight_dtype: torch.dtype | None,
    gradient_tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The loss, and the wanted gradients of hidden states or logits, weight and bias (see `_Made`).

    Only autograd may use the gradients: it scales them in place.
    """
    inputs = LossInputs.from_tensors(completion_mask, tensors, objective, group_size)
    head = HeadTensors(hidden_or_logits, weight, bias)
    call = HeadCall(
        head,
        completion_ids,
        completion_mask,
        inputs.objective.temperature,
        inputs.objective.logit_softcap,
        logits_budget_mb,
        (wants_grad[0], wants_grad[1], wants_grad[2]),
        vocab_group,
        completion_lengths=inputs.completion_lengths,
        weight_dtype=weight_dtype,
        gradient_tolerance=gradient_tolerance,
        temperatures=inputs.temperatures(head.arithmetic_dtype),
    )
    made, gradients = _engine.policy_loss(call, inputs, return_entropy=return_entropy)
    return *made, gradients


@policy_loss.register_fake
def _(
    hidden_or_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants_grad: list[bool],
    _: Tensor,
    completion_mask: Tensor,
    *options: Any,
) -> _Made:
    tensors = HeadTensors(hidden_or_logits, weight, bias)
    dtype = tensors.arithmetic_dtype
    # gradients of the caller's logits have the logits' dtype; sums over tokens have the arithmetic's dtype
    grad_dtype = hidden_or_logits.dtype if weight is None else dtype
    gradients = [
        tensor.new_empty(shape, dtype=grad_dtype)
        for tensor, is_wanted in zip(tensors, wants_grad, strict=True)
        if is_wanted and tensor is not None
        for shape in (part_shapes(tensor) if tensor is weight else [tensor.shape])
    ]
    loss, metrics, num_tokens, token_logps = _fake_loss(completion_mask, dtype)
    gradient_tolerance = options[-1]
    if gradient_tolerance > 0.0:
        metrics = metrics.new_empty(len(METRIC_NAMES + GRADIENT_METRIC_NAMES))
    return loss, metrics, num_tokens, token_logps, gradients


@torch.library.custom_op("expo_kernels::policy_loss_", mutates_args={"logits"})
def policy_loss_inplace(
    logits: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    tensors: list[Tensor | None],
    objective: str,
    group_size: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of the caller's logits; the gradient overwrites the logits."""
    inputs = LossInputs.from_tensors(completion_mask, tensors, objective, group_size)
    call = HeadCall(
        HeadTensors(logits),
        completion_ids,
        completion_mask,
        inputs.objective.temperature,
        inputs.objective.logit_softcap,
        budget_mb=None,
        wants_grad=(True, False, False),
        inplace=True,
        temperatures=inputs.temperatures(HeadTensors(logits).arithmetic_dtype),
    )
    made, (gradient,) = _engine.policy_loss(call, inputs, return_entropy=return_entropy)
    if gradient.data_ptr() != logits.data_ptr():
        logits.copy_(gradient)
    loss, metrics, num_tokens, token_logps = made
    return loss, metrics, num_tokens, token_logps


@policy_loss_inplace.register_fake
def _(logits: Tensor, _: Tensor, completion_mask: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_loss(completion_mask, HeadTensors(logits).arithmetic_dtype)


@torch.library.custom_op("expo_kernels::policy_loss_from_logps", mutates_args=())
def policy_loss_from_logps(
    logps: Tensor,
    wants_grad: list[bool],
    completion_mask: Tensor,
    tensors: list[Tensor | None],
    objective: str,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The loss of the caller's log-probs, and dL/dlogps if wanted (see `_Made`)."""
    inputs = LossInputs.from_tensors(completion_mask, tensors, objective, group_size)
    made, gradients = _engine.policy_loss_from_logps(logps, inputs, wants_grad=wants_grad[0])
    return *made, gradients


@policy_loss_from_logps.register_fake
def _(logps: Tensor, wants_grad: list[bool], completion_mask: Tensor, *_: Any) -> _Made:
    dtype = HeadTensors(logps).arithmetic_dtype
    return *_fake_loss(completion_mask, dtype), [logps.new_empty(logps.shape, dtype=dtype)] if wants_grad[0] else []


@torch.library.custom_op("expo_kernels::token_losses", mutates_args=())
def token_losses(
    logps: Tensor, completion_mask: Tensor, tensors: list[Tensor | None], objective: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each of the caller's log-probs; metrics, number of tokens and log-probs as in `_Made`."""
    inputs = LossInputs.from_tensors(completion_mask, tensors, objective, group_size)
    losses, metrics, num_tokens, token_logps = _engine.token_losses(logps, inputs)
    return losses, metrics, num_tokens, token_logps


@token_losses.register_fake
def _(logps: Tensor, completion_mask: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    __, metrics, num_tokens, kept = _fake_loss(completion_mask, HeadTensors(logps).arithmetic_dtype)
    return torch.empty_like(kept), metrics, num_tokens, kept


@torch.library.custom_op("expo_kernels::token_losses_backward", mutates_args=())
def token_losses_backward(
    grad_losses: Tensor,
    logps: Tensor,
    completion_mask: Tensor,
    tensors: list[Tensor | None],
    objective: str,
    group_size: int,
) -> Tensor:
    """dL/dlogps from the gradient of each token's loss, in the dtype of the log-probs."""
    inputs = LossInputs.from_tensors(completion_mask, tensors, objective, group_size)
    return _engine.token_losses_backward(grad_losses, logps, inputs)


@token_losses_backward.register_fake
def _(_: Tensor, logps: Tensor, *__: Any) -> Tensor:
    return logps.new_empty(logps.shape)


@torch.library.custom_op("expo_kernels::with_gradient", mutates_args=())
def with_gradient(loss: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG001 - for autograd alone
    """Return the loss and attach its gradient with respect to the logits, which is computed already."""
    return loss.clone()


@with_gradient.register_fake
def _(loss: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(loss)


def _fake_loss(completion_mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        completion_mask.new_empty((), dtype=dtype),
        completion_mask.new_empty(len(METRIC_NAMES), dtype=dtype),
        completion_mask.new_empty((), dtype=torch.int64),
        completion_mask.new_empty(completion_mask.shape, dtype=dtype),
    )


def _register_gradients(op: Any, num_differentiable: int) -> None:
    """Register autograd for an op that returns `_Made`; its differentiable inputs come first, then `wants_grad`."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: _Made) -> None:
        _, *others, gradients = output
        wants_grad = inputs[num_differentiable]
        ctx.set_materialize_grads(False)  # otherwise autograd would allocate zeros as large as the gradients
        ctx.mark_non_differentiable(*others, *gradients)
        ctx.save_for_backward(*gradients)
        ctx.wants_grad, ctx.num_others = wants_grad, len(inputs) - num_differentiable
        given = [tensor for tensor, wanted in zip(inputs, wants_grad, strict=False) if wanted]
        ctx.num_rows, ctx.dtypes = [tensor.shape[0] for tensor in given], [tensor.dtype for tensor in given]

    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return tuple([None] * (num_differentiable + ctx.num_others))
        pairs = zip(grouped(ctx.saved_tensors, ctx.num_rows), ctx.dtypes, strict=True)
        made = [_scaled(parts, grad_loss, dtype) for parts, dtype in pairs]
        return *by_input(made, ctx.wants_grad), *(None,) * ctx.num_others

    op.register_autograd(backward, setup_context=keep)


def _keep_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    _, logits, gradient = inputs
    ctx.save_for_backward(gradient)
    ctx.dtype = logits.dtype


@once_differentiable
def _scale_gradient(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return None, _scaled((gradient,), grad_loss, ctx.dtype), None


_register_gradients(policy_loss, num_differentiable=3)
_register_gradients(policy_loss_from_logps, num_differentiable=1)
with_gradient.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logps, completion_mask, tensors, *ctx.settings = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logps, completion_mask, *tensors)


@once_differentiable
def _backward_token_losses(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logps, completion_mask, *tensors = ctx.saved_tensors
    return token_losses_backward(grad_losses, logps, completion_mask, tensors, *ctx.settings), *(None,) * 4


token_losses.register_autograd(_backward_token_losses, setup_context=_keep_inputs)


def by_input(made: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """One entry per input: its gradient from `made`, or None if none is wanted."""
    rest = iter(made)
    return [next(rest) if is_wanted else None for is_wanted in wanted]


def _scaled(parts: Sequence[Tensor], factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * gradient in the input's dtype, rounded once; in the gradient's own memory unless that may be read again.

    `parts` hold the rows of the gradient.
    """
    first = parts[0]
    if _compat.is_being_traced(first):
        # the compiler decides about memory
        return ((first if len(parts) == 1 else torch.cat(list(parts))) * factor).to(dtype)
    # a second backward pass may read the same gradient
    if _compat.graph_is_kept():
        made = [torch.mul(part, factor, out=torch.empty_like(part, dtype=dtype)) for part in parts]
        return made[0] if len(made) == 1 else torch.cat(made)
    if first.dtype != dtype:
        return narrowed(parts, dtype, factor)
    if _launch.use_kernels(first):
        from expo_kernels._triton.launch import launch_scale

        launch_scale(first, factor)
        return first
    # on a CPU, reading the number costs nothing and may save a pass over [V, H]
    is_one = factor.device.type == "cpu" and float(factor) == 1.0
    return first if is_one else first.mul_(factor)
