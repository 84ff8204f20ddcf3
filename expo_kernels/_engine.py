"""The engine of every op on logits: one loop over chunks of rows, for the PyTorch backend and for the Triton backend.

Valid tokens are compacted first, so that prompt and padding tokens cost nothing; `_plans.py` says which rows a chunk
holds.

For each chunk the head computes logits, the backend turns them into dL/dlogits, and the head accumulates its gradients.
A sequence-level objective needs all log-probs of a sequence before its first gradient: chunks then hold whole
sequences. If a sequence exceeds a chunk, a separate pass computes the log-probs first.

Letters: M positions of the caller's tensors, N rows, n of them in a chunk, V vocabulary, B sequences.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from expo_kernels import _launch, _vocab_group
from expo_kernels import _validate as validate
from expo_kernels._backend_torch import TorchLogps, TorchLoss, gather_tokens, spread, valid_index
from expo_kernels._exponentials import ExponentialHead
from expo_kernels._head import (
    Chunk,
    Gradients,
    Head,
    HeadCall,
    HeadTensors,
    LinearHead,
    Spans,
)
from expo_kernels._inputs import LossInputs
from expo_kernels._kept_head import KeptColumnsHead, leaves_out_columns
from expo_kernels._narrowing import narrowed
from expo_kernels._plans import DevicePlan, HostPlan
from expo_kernels._precision import full_precision
from expo_kernels._products import WideProducts
from expo_kernels._products_gpu import make_products, splits
from expo_kernels._ready_logits import CopiedLogits, ReadyLogits
from expo_kernels._vocab_group import VocabShard

if TYPE_CHECKING:
    from expo_kernels._triton.backend import TritonLogps


class LossResult(NamedTuple):
    """The outputs of a loss op besides gradients."""

    loss: Tensor  # 0-dim
    metrics: Tensor  # [len(METRIC_NAMES)], and with a gradient tolerance GRADIENT_METRIC_NAMES after these
    num_tokens: Tensor  # 0-dim int64
    logps: Tensor  # like the mask


# --- the loops


class LogpsBackend(Protocol):
    """Computes log-probs and their gradients, one chunk at a time."""

    def logps(self, chunk: Chunk) -> None:
        """Compute the log-probs of a chunk, and save what `grad_logits` needs of each row."""

    def grad_logits(self, chunk: Chunk) -> None:
        """Write dL/dlogits of a chunk, given dL/dlogps and dL/dentropies."""


class LossBackend(LogpsBackend, Protocol):
    """Computes the loss as well."""

    needs_whole_sequences: bool
    """Whether a token's gradient depends on the log-probs of its whole sequence."""

    def loss(self, chunk: Chunk) -> None:
        """Compute log-probs, loss and, if wanted, dL/dlogits of a chunk; for token-level objectives."""

    def sequence_loss(self, chunk: Chunk | None) -> None:
        """Compute loss and dL/dlogps of a chunk's sequences (None: of all) from their log-probs."""


class Plan(Protocol):
    """Which rows each chunk holds."""

    def spans(self) -> Spans:
        """Chunks of as many rows as fit."""

    def whole_sequences(self) -> Spans | None:
        """Chunks of whole sequences; None if a sequence may exceed a chunk."""


def run_loss(head: Head, plan: Plan, backend: LossBackend, *, wants_grad: bool) -> None:
    """Compute the loss of all rows; if gradients are wanted, the head accumulates them."""
    if not backend.needs_whole_sequences:
        for chunk in head.chunks(plan.spans()):
            backend.loss(chunk)
            if wants_grad:
                head.accumulate_grads(chunk)
        return
    whole = plan.whole_sequences() if wants_grad else None
    if whole is not None:
        for chunk in head.chunks(whole):
            backend.logps(chunk)
            backend.sequence_loss(chunk)
            backend.grad_logits(chunk)
            head.accumulate_grads(chunk)
        return
    run_logps(head, plan, backend)
    backend.sequence_loss(None)
    if wants_grad:
        run_grads(head, plan, backend)


def run_logps(head: Head, plan: Plan, backend: LogpsBackend) -> None:
    """Compute the log-probs of all rows."""
    for chunk in head.chunks(plan.spans()):
        backend.logps(chunk)


def run_grads(head: Head, plan: Plan, backend: LogpsBackend) -> None:
    """Compute the gradients of all rows from the backend's dL/dlogps."""
    for chunk in head.chunks(plan.spans()):
        backend.grad_logits(chunk)
        head.accumulate_grads(chunk)


# --- heads and plans of a call


def _most_rows(call: HeadCall, buffers: int = 1) -> int:
    """Rows per chunk; `buffers` of [rows, V] in the arithmetic's dtype are alive at once."""
    hidden_or_logits, weight, _ = call.tensors
    return _launch.most_rows(
        call.tensors.vocab_size,
        itemsize=call.tensors.arithmetic_dtype.itemsize,
        buffers=buffers,
        budget_mb=call.budget_mb,
        device=hidden_or_logits.device,
        hidden_size=0 if weight is None else weight.shape[1],
        is_split=weight is not None and splits(hidden_or_logits.dtype, call.weight_dtype or weight.dtype),
        has_tolerance=call.gradient_tolerance > 0.0,
    )


def _check_and_join(call: HeadCall) -> VocabShard | None:
    """Check the ids, and return this rank's shard of a vocabulary-parallel head (None: the head is whole)."""
    _, weight, _ = call.tensors
    shard, valid_ids, may_read = None, call.completion_ids, validate.may_read(call.completion_ids)
    if call.mask is not None and may_read:
        valid_ids = valid_ids[call.mask != 0]
    if call.vocab_group is not None:
        assert weight is not None
        # the kernels need no second buffer for the softcap's derivatives
        buffers = 1 if call.logit_softcap is None or _launch.use_kernels(*call.tensors) else 2
        shard = _vocab_group.join(
            call.vocab_group,
            weight,
            valid_ids.reshape(-1) if may_read else None,
            _most_rows(call, buffers),
            settings=(call.budget_mb, buffers, *(None if tensor is None else tensor.dtype for tensor in call.tensors)),
        )
    size, size_name = call.tensors.vocab_size, "V of logits" if weight is None else "V of weight"
    if shard is not None:
        size, size_name = shard.vocab_size, "V of weight on all ranks"
    validate.ids_in_range("completion_ids", valid_ids, size, size_name)
    return shard


def _rows_for_torch(
    call: HeadCall,
    order: Tensor,
    shard: VocabShard | None,
    sequence_index: Tensor | None = None,
    num_sequences: int = 0,
) -> tuple[Head, Plan]:
    """Head and plan of the positions `order`; logits are divided by the softcap, or else by the temperature."""
    scale = 1.0 / (call.temperature if call.logit_softcap is None else call.logit_softcap)
    most_rows = _most_rows(call, 1 if call.logit_softcap is None else 2) if shard is None else shard.most_rows
    plan = HostPlan(order, most_rows, sequence_index, num_sequences)
    dtype = call.tensors.arithmetic_dtype
    if call.tensors.weight is None:
        wants_grad = call.wants_grad[0]
        logits = call.tensors.hidden_or_logits
        return CopiedLogits(logits, dtype, wants_grad=wants_grad, inplace=call.inplace, scale=scale), plan
    ids, products = call.completion_ids.reshape(-1), WideProducts(dtype)
    head = LinearHead(
        call.product_tensors(),
        ids,
        call.wants_grad,
        products,
        scale=scale,
        shard=shard,
        grad_dtype=call.tensors.weight.dtype,
        gradient_tolerance=call.gradient_tolerance,
    )
    return head, plan


def _rows_for_kernels(call: HeadCall, kernels: "TritonLogps", num_sequences: int = 0) -> tuple[Head, Plan]:
    """Head and plan of all positions."""
    hidden_or_logits, weight, _ = call.tensors
    num_rows, mask, shard = call.completion_ids.numel(), kernels.mask, kernels.shard
    if weight is None:
        plan = DevicePlan(num_rows, max(num_rows, 1), num_sequences)
        return ReadyLogits(hidden_or_logits, wants_grad=call.wants_grad[0], inplace=call.inplace), plan
    length = hidden_or_logits.shape[1] if hidden_or_logits.dim() == 3 else None
    if kernels.keeps_exponentials:
        most_rows = _launch.most_exponential_rows(*weight.shape, budget_mb=call.budget_mb, device=weight.device)
    else:
        most_rows = _most_rows(call) if shard is None else shard.most_rows
    row_multiple = _launch.row_multiple(hidden_or_logits.device)
    plan = DevicePlan(num_rows, most_rows, num_sequences, length, mask, call.completion_lengths, row_multiple)
    tensors = call.product_tensors()
    assert tensors.weight is not None
    products = make_products(hidden_or_logits, tensors.weight)
    ids = kernels.tokens.ids  # the chosen columns of this head
    arguments: dict[str, Any] = {"mask": mask, "shard": shard, "grad_dtype": weight.dtype}
    make_head = ExponentialHead if kernels.keeps_exponentials else LinearHead
    if leaves_out_columns(
        call,
        keeps_exponentials=kernels.keeps_exponentials,
        has_entropy_grad=kernels.has_entropy_grad or kernels.has_lse_grad,
    ):
        make_head, arguments["gradient_tolerance"] = KeptColumnsHead, call.gradient_tolerance
    return make_head(tensors, ids, call.wants_grad, products, **arguments), plan


# --- the ops


def policy_loss(call: HeadCall, inputs: LossInputs, *, return_entropy: bool) -> tuple[LossResult, list[Tensor]]:
    """The loss from hidden states or logits, and the wanted gradients."""
    shard, wants_grad = _check_and_join(call), any(call.wants_grad)
    with torch.autocast(call.completion_ids.device.type, enabled=False), full_precision():
        if _launch.use_kernels(*call.tensors):
            from expo_kernels._triton.backend import TritonLoss

            kernels = TritonLoss(call, inputs, shard, return_entropy=return_entropy)
            head, plan = _rows_for_kernels(call, kernels, inputs.num_sequences)
            run_loss(head, plan, kernels, wants_grad=wants_grad)
            if isinstance(head, KeptColumnsHead) and not head.tolerance_met():
                exact = replace(call, gradient_tolerance=0.0)
                del head, plan, kernels  # the second pass needs their memory
                result, gradients = policy_loss(exact, inputs, return_entropy=return_entropy)
                return _with_report(result, 0.0, 1.0), gradients
            result = LossResult(*kernels.result(), kernels.token_logps.view(call.completion_ids.shape))
        else:
            tokens = gather_tokens(inputs, call.tensors.arithmetic_dtype)
            backend = TorchLoss(call, tokens, shard, return_entropy=return_entropy)
            head, plan = _rows_for_torch(call, tokens.index, shard, tokens.sequence_index, tokens.num_sequences)
            run_loss(head, plan, backend, wants_grad=wants_grad)
            if isinstance(head, LinearHead) and not head.tolerance_met():
                run_grads(head, plan, backend)
            logps = spread(backend.token_logps, tokens.index, call.completion_ids.shape)
            result = LossResult(*backend.result(), logps)
        if call.gradient_tolerance > 0.0:
            assert isinstance(head, LinearHead)
            result = _with_report(result, *(head.gradient_report() if wants_grad else (0.0, 0.0)))
        return result, _made(head.gradients(), call) if wants_grad else []


def _with_report(result: LossResult, *report: float | Tensor) -> LossResult:
    """The result with the metrics of a gradient tolerance."""
    # filled on the device: copies from the host would wait for it
    added = [
        value.to(result.metrics.dtype).view(1) if isinstance(value, Tensor) else result.metrics.new_full((1,), value)
        for value in report
    ]
    return result._replace(metrics=torch.cat([result.metrics, *added]))


def _uses_kernels(logps: Tensor, inputs: LossInputs) -> bool:
    """Whether the loss from log-probs runs by kernels; PyTorch selects tokens by the log-probs of the whole batch."""
    return _launch.use_kernels(logps) and not inputs.objective.spans_batches


def policy_loss_from_logps(logps: Tensor, inputs: LossInputs, *, wants_grad: bool) -> tuple[LossResult, list[Tensor]]:
    """The loss from log-probs, and their gradient if wanted."""
    if _uses_kernels(logps, inputs):
        from expo_kernels._triton.backend import loss_from_logps

        result, grad_logps = loss_from_logps(logps, inputs)
        kept = logps.float().masked_fill(inputs.completion_mask == 0, 0.0)
        return LossResult(*result, kept), [grad_logps] if wants_grad else []
    tokens = gather_tokens(inputs, HeadTensors(logps).arithmetic_dtype)
    valid = logps.reshape(-1).index_select(0, tokens.index).to(tokens.weights.dtype)
    gradients = [spread(tokens.grad_logps(valid), tokens.index, logps.shape)] if wants_grad else []
    return LossResult(*tokens.result(valid), spread(valid, tokens.index, logps.shape)), gradients


def token_losses(logps: Tensor, inputs: LossInputs) -> LossResult:
    """The loss of each token, like the mask, from log-probs; 0 where masked."""
    if _uses_kernels(logps, inputs):
        from expo_kernels._triton.backend import token_losses_from_logps

        (_, metrics, num_tokens), losses = token_losses_from_logps(logps, inputs)
        kept = logps.float().masked_fill(inputs.completion_mask == 0, 0.0)
        return LossResult(losses, metrics, num_tokens, kept)
    tokens = gather_tokens(inputs, HeadTensors(logps).arithmetic_dtype)
    valid = logps.reshape(-1).index_select(0, tokens.index).to(tokens.weights.dtype)
    _, metrics, num_tokens = tokens.result(valid)
    losses, kept = (spread(values, tokens.index, logps.shape) for values in (tokens.terms(valid).losses, valid))
    return LossResult(losses, metrics, num_tokens, kept)


def token_losses_backward(grad_losses: Tensor, logps: Tensor, inputs: LossInputs) -> Tensor:
    """dL/dlogps, given the gradients of `token_losses`."""
    if _uses_kernels(logps, inputs):
        from expo_kernels._triton.backend import token_losses_grad

        return token_losses_grad(grad_losses, logps, inputs).to(logps.dtype)
    tokens = gather_tokens(inputs, HeadTensors(logps).arithmetic_dtype)
    valid, weights = (
        tensor.reshape(-1).index_select(0, tokens.index).to(tokens.weights.dtype) for tensor in (logps, grad_losses)
    )
    grad_logps = replace(tokens, weights=weights).grad_logps(valid)
    return spread(grad_logps, tokens.index, logps.shape).to(logps.dtype)


def token_logps(
    call: HeadCall, *, return_entropy: bool, keeps_rows: bool, return_lse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs and entropies like the ids, row_max and sum_exp of each row, [M], and log-sum-exps like the ids.

    Outputs that are not wanted are empty tensors. Only the Triton backward reads row_max and sum_exp.
    """
    shard, shape = _check_and_join(call), call.completion_ids.shape
    with torch.autocast(call.completion_ids.device.type, enabled=False), full_precision():
        if _launch.use_kernels(*call.tensors):
            from expo_kernels._triton.backend import TritonLogps

            kernels = TritonLogps.reading(
                call, shard, return_entropy=return_entropy, keeps_rows=keeps_rows or return_lse
            )
            head, plan = _rows_for_kernels(call, kernels)
            run_logps(head, plan, kernels)
            lse = kernels.lse() if return_lse else None
            row_values = (kernels.row_max, kernels.sum_exp) if keeps_rows else (None, None)
            # each empty tensor is a new one: the outputs of an op must not alias each other
            entropies, lse, row_max, sum_exp = (
                kernels.token_logps.new_empty(0) if tensor is None else tensor
                for tensor in (kernels.entropies, lse, *row_values)
            )
            entropies = entropies.view(shape) if return_entropy else entropies
            lse = lse.view(shape) if return_lse else lse
            return kernels.token_logps.view(shape), entropies, row_max, sum_exp, lse
        order = valid_index(call.mask, call.completion_ids)
        backend = TorchLogps(call, order, shard, wants_entropy=return_entropy)
        logps = backend.token_logps
        backend.lse = torch.empty_like(logps) if return_lse else None
        head, plan = _rows_for_torch(call, order, shard)
        run_logps(head, plan, backend)
        entropies = spread(backend.token_entropies, order, shape) if return_entropy else logps.new_empty(0)
        lse = logps.new_empty(0) if backend.lse is None else spread(backend.lse, order, shape)
        # empty tensors would do, but then a compiled graph would differ between the two paths
        row_max, sum_exp = (logps.new_zeros(call.completion_ids.numel() if keeps_rows else 0) for _ in range(2))
        return spread(logps, order, shape), entropies, row_max, sum_exp, lse


def token_logps_backward(
    call: HeadCall,
    kept_rows: list[Tensor],
    grad_logps: Tensor,
    grad_entropies: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the inputs (hidden states or logits, weight, bias) that want one, in their dtypes.

    `kept_rows` are the entropies, row_max and sum_exp that `token_logps` returned.
    """
    shard = _check_and_join(call)
    with torch.autocast(call.completion_ids.device.type, enabled=False), full_precision():
        if _launch.use_kernels(*call.tensors):
            from expo_kernels._triton.backend import TritonLogps

            kernels = TritonLogps.differentiating(call, shard, kept_rows, grad_logps, grad_entropies, grad_lse)
            head, plan = _rows_for_kernels(call, kernels)
            run_grads(head, plan, kernels)
            if isinstance(head, KeptColumnsHead) and not head.tolerance_met():
                exact = replace(call, gradient_tolerance=0.0)
                del head, plan, kernels  # the second pass needs their memory
                return token_logps_backward(exact, kept_rows, grad_logps, grad_entropies, grad_lse)
        else:
            order = valid_index(call.mask, call.completion_ids)
            backend = TorchLogps(call, order, shard, wants_entropy=grad_entropies is not None)
            backend.grad_logps = grad_logps.reshape(-1).index_select(0, order)
            if grad_entropies is not None:
                backend.grad_entropies = grad_entropies.reshape(-1).index_select(0, order)
            if grad_lse is not None:
                backend.grad_lse = grad_lse.reshape(-1).index_select(0, order)
            head, plan = _rows_for_torch(call, order, shard)
            run_grads(head, plan, backend)
            if isinstance(head, LinearHead) and not head.tolerance_met():
                run_grads(head, plan, backend)
        return _made(head.gradients(), call, in_input_dtypes=True)


def _made(gradients: Gradients, call: HeadCall, *, in_input_dtypes: bool = False) -> list[Tensor]:
    """The gradients in the shapes of their inputs and contiguous, as the op's fake implementation promises; the sums of
    a weight's gradient in the shapes of `part_shapes`."""
    made: list[Tensor] = []
    for parts, tensor in zip(gradients, call.tensors, strict=True):
        if parts is None or tensor is None:
            continue
        if in_input_dtypes:
            made.append(narrowed(parts, tensor.dtype).view(tensor.shape).contiguous())
        elif len(parts) == 1:
            made.append(parts[0].view(tensor.shape).contiguous())
        else:
            made += parts
    return made
