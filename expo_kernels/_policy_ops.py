"""The registered ops of the policy loss: one per job, which chooses between PyTorch and Triton inside.

An op makes the loss and its gradients at once; autograd keeps the gradients and scales them by the incoming one, which
is all that its backward does. Values are checked in the op (see `Request.unpack`), shapes before it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expo_kernels import _launch, _rows
from expo_kernels._request import SUMS, Request
from expo_kernels._token_batch import Loop, gather_tokens, run_chunks
from expo_kernels.logps import in_places, join_vocab_group, made_gradients, make_source, spread

# loss 0-dim, metrics [len(SUMS)], number of tokens 0-dim, log-probs like the mask, the gradients that are wanted
_Made = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


@torch.library.custom_op("expo_kernels::policy_loss", mutates_args=())
def policy_loss(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants_grad: list[bool],
    completion_ids: Tensor,
    completion_mask: Tensor,
    packed: list[Tensor | None],
    objective: str,
    group_size: int,
    logits_budget_mb: float | None,
    return_entropy: bool,
    vocab_group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The loss, and the gradients of those of states, weight and bias that want one, made at once (see `_Made`).

    The gradients are for autograd alone, which scales them in place.
    """
    of_states, of_weight, of_bias = wants_grad
    return _run(
        (states, weight, bias),
        (of_states, of_weight, of_bias),
        completion_ids,
        Request.unpack(completion_mask, packed, objective, group_size),
        budget_mb=logits_budget_mb,
        return_entropy=return_entropy,
        vocab_group=vocab_group,
    )


@policy_loss.register_fake
def _(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants_grad: list[bool],
    _: Tensor,
    completion_mask: Tensor,
    *__: Any,
) -> _Made:
    dtype = _rows.arithmetic_dtype(states, weight, bias)
    # gradients of ready logits have their dtype, those of sums over tokens the arithmetic's
    grad_dtype = states.dtype if weight is None else dtype
    given = zip((states, weight, bias), wants_grad, strict=True)
    gradients = [
        tensor.new_empty(tensor.shape, dtype=grad_dtype) for tensor, wanted in given if wanted and tensor is not None
    ]
    return *_fake_loss(completion_mask, dtype), gradients


@torch.library.custom_op("expo_kernels::policy_loss_", mutates_args={"logits"})
def policy_loss_in_place(
    logits: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    packed: list[Tensor | None],
    objective: str,
    group_size: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of ready logits, whose gradient is written over them."""
    request = Request.unpack(completion_mask, packed, objective, group_size)
    *made, (gradient,) = _run(
        (logits, None, None),
        (True, False, False),
        completion_ids,
        request,
        budget_mb=None,
        return_entropy=return_entropy,
        in_place=True,
    )
    if gradient.data_ptr() != logits.data_ptr():
        logits.copy_(gradient)
    loss, metrics, num_tokens, token_logps = made
    return loss, metrics, num_tokens, token_logps


@policy_loss_in_place.register_fake
def _(logits: Tensor, _: Tensor, completion_mask: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_loss(completion_mask, _rows.arithmetic_dtype(logits))


@torch.library.custom_op("expo_kernels::policy_loss_from_logps", mutates_args=())
def policy_loss_from_logps(
    logps: Tensor,
    wants_grad: list[bool],
    completion_mask: Tensor,
    packed: list[Tensor | None],
    objective: str,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The loss of ready log-probs, and its gradient in them (see `_Made`)."""
    request = Request.unpack(completion_mask, packed, objective, group_size)
    if _launch.use_kernels(logps):
        from expo_kernels import _fused

        loss, metrics, num_tokens, slopes = _fused.loss_of_logps(logps, request)
        kept = logps.float().masked_fill(completion_mask == 0, 0.0)
        return loss, metrics, num_tokens, kept, [slopes] if wants_grad[0] else []
    tokens = gather_tokens(request, _rows.arithmetic_dtype(logps))
    valid = logps.reshape(-1).index_select(0, tokens.index).to(tokens.weights.dtype)
    gradients = [spread(tokens.logp_slopes(valid), tokens.index, logps.shape)] if wants_grad[0] else []
    return *tokens.summary(valid), spread(valid, tokens.index, logps.shape), gradients


@policy_loss_from_logps.register_fake
def _(logps: Tensor, wants_grad: list[bool], completion_mask: Tensor, *_: Any) -> _Made:
    dtype = _rows.arithmetic_dtype(logps)
    return *_fake_loss(completion_mask, dtype), [logps.new_empty(logps.shape, dtype=dtype)] if wants_grad[0] else []


@torch.library.custom_op("expo_kernels::with_gradient", mutates_args=())
def with_gradient(loss: Tensor, states: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG001 - for autograd alone
    """The loss again, whose gradient in `states` is known already."""
    return loss.clone()


@with_gradient.register_fake
def _(loss: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(loss)


def _fake_loss(completion_mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        completion_mask.new_empty((), dtype=dtype),
        completion_mask.new_empty(len(SUMS), dtype=dtype),
        completion_mask.new_empty((), dtype=torch.int64),
        completion_mask.new_empty(completion_mask.shape, dtype=dtype),
    )


def _run(
    states: tuple[Tensor, Tensor | None, Tensor | None],
    wants_grad: tuple[bool, bool, bool],
    completion_ids: Tensor,
    request: Request,
    *,
    budget_mb: float | None,
    return_entropy: bool,
    in_place: bool = False,
    vocab_group: str | None = None,
) -> _Made:
    """What `policy_loss` returns, by the kernels or by PyTorch."""
    shard = join_vocab_group(
        vocab_group, *states, completion_ids, request.completion_mask, request.objective.logit_softcap, budget_mb
    )
    with torch.autocast(states[0].device.type, enabled=False):
        if shard is None and _launch.use_kernels(*states):
            from expo_kernels import _fused

            *made, gradients = _fused.loss_of_states(
                *states,
                completion_ids,
                request,
                wants_grad=wants_grad,
                budget_mb=budget_mb,
                return_entropy=return_entropy,
                in_place=in_place,
            )
            loss, metrics, num_tokens, token_logps = made
            return loss, metrics, num_tokens, token_logps, made_gradients(gradients, states)
        tokens = gather_tokens(request, _rows.arithmetic_dtype(*states))
        chosen_ids = completion_ids.reshape(-1).index_select(0, tokens.index).long()
        source = make_source(*states, tokens.index, wants_grad, in_place=in_place, shard=shard)
        token_logps, entropies = run_chunks(
            source, Loop(chosen_ids, tokens, budget_mb, return_entropy), any(wants_grad)
        )
        gradients = source.gradients() if any(wants_grad) else (None, None, None)
        at_positions = spread(token_logps, tokens.index, completion_ids.shape)
        return *tokens.summary(token_logps, entropies), at_positions, made_gradients(gradients, states)


def _register_gradients(op: Any, num_states: int) -> None:
    """Autograd of an op that returns `_Made` and takes its states first, then which of them want a gradient."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: _Made) -> None:
        _, *others, gradients = output
        wants_grad = inputs[num_states]
        ctx.set_materialize_grads(False)  # or backward would be given zeros as large as the gradients
        ctx.mark_non_differentiable(*others, *gradients)
        ctx.save_for_backward(*gradients)
        ctx.wants_grad, ctx.num_others = wants_grad, len(inputs) - num_states
        ctx.dtypes = [tensor.dtype for tensor, wanted in zip(inputs, wants_grad, strict=False) if wanted]

    @once_differentiable
    def scale(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return tuple([None] * (num_states + ctx.num_others))
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        made = [_scaled(gradient, grad_loss, dtype) for gradient, dtype in pairs]
        return *in_places(made, ctx.wants_grad), *(None,) * ctx.num_others

    op.register_autograd(scale, setup_context=keep)


def _keep_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    _, states, gradient = inputs
    ctx.save_for_backward(gradient)
    ctx.dtype = states.dtype


@once_differentiable
def _scale_gradient(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return None, _scaled(gradient, grad_loss, ctx.dtype), None


_register_gradients(policy_loss, num_states=3)
_register_gradients(policy_loss_from_logps, num_states=1)
with_gradient.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def _scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_loss * gradient in the input's dtype, rounded once, and in the gradient's own memory where it fits there."""
    if type(gradient) is not Tensor:
        # a tracer's stand-in: the compiler decides what is written where
        return (gradient * grad_loss).to(dtype)
    if gradient.dtype != dtype:
        return torch.mul(gradient, grad_loss, out=torch.empty_like(gradient, dtype=dtype))
    # a second backward may come for the same numbers
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * grad_loss
    if _launch.use_kernels(gradient):
        from expo_kernels import _row_launchers

        _row_launchers.launch_scale(gradient, grad_loss)
        return gradient
    # reading the number is free on CPU and saves a pass over [V, H]
    is_one = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
    return gradient if is_one else gradient.mul_(grad_loss)
