"""The registered ops of log-probs, entropies and log-sum-exps, and their autograd.

An op chooses between PyTorch and Triton; its backward recomputes the logits. Values are checked in the op, shapes
before it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expo_kernels import _engine, _temperatures
from expo_kernels import _validate as validate
from expo_kernels._head import HeadCall, HeadTensors
from expo_kernels._ops import by_input


@torch.library.custom_op("expo_kernels::token_logps", mutates_args=())
def token_logps(
    hidden_or_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    mask: Tensor | None,
    completion_lengths: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    logits_budget_mb: float | None,
    return_entropy: bool,
    keeps_rows: bool,
    vocab_group: str | None,
    gradient_tolerance: float,  # noqa: ARG001 - for backward alone
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, the maximum and the sum of exponentials of each row, [M] each, and log-sum-exps.

    Log-probs, entropies and log-sum-exps are shaped like the ids. Entropies are empty without `return_entropy`,
    log-sum-exps without `return_lse`, and the row values, which the kernels' backward reads, without `keeps_rows`.
    With `temperatures`, [B] or like the ids, `temperature` is 1.
    """
    tensors = HeadTensors(hidden_or_logits, weight, bias)
    call = HeadCall(
        tensors,
        completion_ids,
        mask,
        temperature,
        logit_softcap,
        logits_budget_mb,
        vocab_group=vocab_group,
        completion_lengths=_checked_lengths(completion_lengths, mask),
        temperatures=_of_positions(temperatures, completion_ids, mask, tensors),
    )
    return _engine.token_logps(call, return_entropy=return_entropy, keeps_rows=keeps_rows, return_lse=return_lse)


def _of_positions(
    temperatures: Tensor | None, completion_ids: Tensor, mask: Tensor | None, tensors: HeadTensors
) -> Tensor | None:
    if temperatures is None:
        return None
    return _temperatures.of_positions(temperatures, mask, completion_ids.shape, tensors.arithmetic_dtype)


def _checked_lengths(lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if lengths is not None and mask is not None and validate.may_read(mask):
        counted = (mask != 0).sum(-1).view(-1)
        # nothing says where packed sequences end
        given = lengths if mask.dim() == 2 else lengths.sum().view(1)
        validate.equal_lengths("completion_lengths", given, counted)
    return lengths


@token_logps.register_fake
def _(
    hidden_or_logits: Tensor, weight: Tensor | None, bias: Tensor | None, completion_ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, return_entropy, keeps_rows, _, _, return_lse = options
    dtype = HeadTensors(hidden_or_logits, weight, bias).arithmetic_dtype

    def made(*shape: int) -> Tensor:
        return hidden_or_logits.new_empty(shape, dtype=dtype)

    num_kept = completion_ids.numel() if keeps_rows else 0
    entropies = made(*completion_ids.shape) if return_entropy else made(0)
    lse = made(*completion_ids.shape) if return_lse else made(0)
    return made(*completion_ids.shape), entropies, made(num_kept), made(num_kept), lse


@torch.library.custom_op("expo_kernels::token_logps_backward", mutates_args=())
def token_logps_backward(
    grads: list[Tensor | None],
    hidden_or_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    completion_ids: Tensor,
    mask: Tensor | None,
    completion_lengths: Tensor | None,
    temperatures: Tensor | None,
    kept_rows: list[Tensor],
    temperature: float,
    logit_softcap: float | None,
    logits_budget_mb: float | None,
    wants_grad: list[bool],
    vocab_group: str | None,
    gradient_tolerance: float,
) -> list[Tensor]:
    """The wanted gradients of hidden states or logits, weight and bias, in the inputs' dtypes.

    `grads` are dL/dlogps, and dL/dentropies and dL/dlse (or None); `kept_rows` are the entropies, the maxima and the
    sums of exponentials that the forward pass returned.
    """
    grad_logps, *others = grads
    assert grad_logps is not None
    tensors = HeadTensors(hidden_or_logits, weight, bias)
    call = HeadCall(
        tensors,
        completion_ids,
        mask,
        temperature,
        logit_softcap,
        logits_budget_mb,
        (wants_grad[0], wants_grad[1], wants_grad[2]),
        vocab_group,
        completion_lengths=completion_lengths,
        gradient_tolerance=gradient_tolerance,
        temperatures=_of_positions(temperatures, completion_ids, mask, tensors),
    )
    return _engine.token_logps_backward(call, kept_rows, grad_logps, *others)


@token_logps_backward.register_fake
def _(
    _: list[Tensor | None], hidden_or_logits: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> list[Tensor]:
    given = zip((hidden_or_logits, weight, bias), options[-3], strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, wanted in given if wanted and tensor is not None]


def _setup_token_logps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, temperature, logit_softcap, budget_mb, return_entropy, _, vocab_group, tolerance, return_lse = inputs
    _, entropies, row_max, sum_exp, lse = output
    ctx.settings, ctx.last_settings = (temperature, logit_softcap, budget_mb), (vocab_group, tolerance)
    ctx.set_materialize_grads(False)
    unused = [tensor for tensor, is_given in ((entropies, return_entropy), (lse, return_lse)) if not is_given]
    ctx.mark_non_differentiable(row_max, sum_exp, *unused)
    ctx.save_for_backward(*given, entropies, row_max, sum_exp)


@once_differentiable
def _backward_token_logps(
    ctx: Any,
    grad_logps: Tensor | None,
    grad_entropies: Tensor | None,
    _: None,
    __: None,
    grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    *given, entropies, row_max, sum_exp = ctx.saved_tensors
    if grad_logps is None:
        other = grad_lse if grad_entropies is None else grad_entropies
        if other is None:
            return (None,) * 15
        grad_logps = torch.zeros_like(other)
    wants_grad, kept = list(ctx.needs_input_grad[:3]), [entropies, row_max, sum_exp]
    made = token_logps_backward(
        [grad_logps, grad_entropies, grad_lse], *given, kept, *ctx.settings, wants_grad, *ctx.last_settings
    )
    return *by_input(made, wants_grad), *(None,) * 12


token_logps.register_autograd(_backward_token_logps, setup_context=_setup_token_logps)
