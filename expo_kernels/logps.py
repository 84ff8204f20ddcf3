"""Log-probs of the chosen tokens, entropies and log-sum-exps, from logits or from hidden states and the output head.

The linear form never materializes [tokens, V] logits: it computes them a chunk at a time, and again in backward. The
registered ops of `_logps_ops.py` do the work.

Letters: B sequences, T completion positions, V vocabulary, H hidden. The arithmetic is float32 whatever the input dtype
(float64 for float64 inputs).
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from expo_kernels import _logps_ops, _temperatures
from expo_kernels import _validate as validate
from expo_kernels._head import HeadTensors
from expo_kernels._head_module import head_tensors
from expo_kernels._vocab_group import local_head


def _masked_token_logps(
    tensors: HeadTensors,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    logit_softcap: float | None,
    *,
    return_entropy: bool,
    return_lse: bool,
    budget_mb: float | None = None,
    vocab_group: str | None = None,
    completion_lengths: Tensor | None = None,
    gradient_tolerance: float = 0.0,
) -> Tensor | tuple[Tensor, ...]:
    temperatures: Tensor | None = None
    if isinstance(temperature, Tensor):
        _temperatures.check(temperature, "completion_ids", ids, ids.shape[0] if ids.dim() == 2 else None)
        temperatures, temperature = temperature.detach(), 1.0
    validate.number("temperature", temperature, low=0.0, above=True)
    if logit_softcap is not None:
        validate.number("logit_softcap", logit_softcap, low=0.0, above=True)
    keeps_rows = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    logps, entropies, _, _, lse = _logps_ops.token_logps(
        *tensors,
        ids,
        mask,
        completion_lengths,
        temperatures,
        temperature,
        logit_softcap,
        budget_mb,
        return_entropy,
        keeps_rows,
        vocab_group,
        gradient_tolerance,
        return_lse,
    )
    others = [tensor for tensor, is_wanted in ((entropies, return_entropy), (lse, return_lse)) if is_wanted]
    return (logps, *others) if others else logps


@overload
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[False] = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[True],
    return_lse: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    return_lse: Literal[True],
) -> tuple[Tensor, ...]: ...
def token_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Log-prob in nats of each chosen token, [B, T] float32, 0 at masked positions; differentiable in `logits`.

    Args:
        logits: [B, T, V] or packed [N, V], any float dtype; row t predicts `completion_ids[:, t]`. Not yet divided by
            the temperature.
        completion_ids: [B, T] or [N] integers, in [0, V) where the mask is 1; other values are ignored.
        mask: shaped like `completion_ids`, bool or 0/1; 1 for valid tokens; None: all tokens are valid.
        temperature: > 0, no unit; or a tensor of such floats, [B] or shaped like `completion_ids`, without gradient.
        logit_softcap: logits become cap * tanh(logits / cap) before the temperature; None: no cap.
        return_entropy: also return the entropies of the distributions, in nats, differentiable.
        return_lse: also return the log-sum-exp of each row of logits, after softcap and temperature, in nats,
            differentiable: a z-loss (PaLM, arXiv 2204.02311) is a multiple of the mean of its square.

    Returns:
        Log-probs shaped like `completion_ids` (float64 for float64 logits); or (log-probs, entropies), (log-probs,
        log-sum-exps) or (log-probs, entropies, log-sum-exps), all shaped like them and 0 where masked.

    Raises:
        ValueError: shapes do not match, an id is out of range, or a temperature is not > 0 (ids and those of a tensor
            are checked on CPU).
        TypeError: an argument has the wrong type or dtype.
    """
    validate.floating("logits", logits)
    validate.dimensions("logits", logits, "NV" if logits.dim() == 2 else "BTV")
    validate.ids_and_mask("logits", logits, completion_ids, "mask", mask)
    return _masked_token_logps(
        HeadTensors(logits),
        completion_ids,
        mask,
        temperature,
        logit_softcap,
        return_entropy=return_entropy,
        return_lse=return_lse,
    )


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[False] = False,
    return_lse: Literal[False] = False,
    logits_budget_mb: float | None = None,
    vocab_group: Any = None,
    completion_lengths: Tensor | None = None,
    gradient_tolerance: float = 0.0,
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[True],
    return_lse: Literal[False] = False,
    logits_budget_mb: float | None = None,
    vocab_group: Any = None,
    completion_lengths: Tensor | None = None,
    gradient_tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    return_lse: Literal[True],
    logits_budget_mb: float | None = None,
    vocab_group: Any = None,
    completion_lengths: Tensor | None = None,
    gradient_tolerance: float = 0.0,
) -> tuple[Tensor, ...]: ...
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    logits_budget_mb: float | None = None,
    vocab_group: Any = None,
    completion_lengths: Tensor | None = None,
    gradient_tolerance: float = 0.0,
) -> Tensor | tuple[Tensor, ...]:
    """Log-prob in nats of each chosen token, [B, T] float32, 0 at masked positions, without [tokens, V] logits.

    Differentiable in `hidden`, `weight` and `bias`; backward recomputes the logits chunk by chunk.

    Args:
        hidden: [B, T, H] or packed [N, H], any float dtype; row t predicts `completion_ids[:, t]`.
        weight: [V, H] output head, any float dtype; or its module, as in `linear_expo_loss`.
        completion_ids: [B, T] or [N] integers, in [0, V) where the mask is 1; other values are ignored.
        bias: [V], or None.
        mask: shaped like `completion_ids`, bool or 0/1; 1 for valid tokens; None: all tokens are valid.
        temperature: > 0, no unit; logits are divided by it. Or a tensor, as in `token_logps`.
        logit_softcap: logits become cap * tanh(logits / cap) before the temperature; None: no cap.
        return_entropy: also return the entropies of the distributions, in nats, differentiable.
        return_lse: also return the log-sum-exp of each row of logits, as in `token_logps`.
        logits_budget_mb: MiB for the logits of one chunk; None: a default for the device.
        vocab_group: process group of a vocabulary-parallel head, as in `linear_expo_loss`. Backward also reduces over
            the group, so every rank must run it.
        completion_lengths: [B] integers on the CPU, the 1s of `mask` in each sequence, as in `linear_expo_loss`.
        gradient_tolerance: largest relative error of the gradients of hidden and weight, as in `linear_expo_loss`.

    Returns:
        Log-probs shaped like `completion_ids` (float64 for float64 inputs), or a tuple as in `token_logps`.

    Raises:
        ValueError: shapes do not match, an id is out of range, or a temperature is not > 0 (ids and those of a tensor
            are checked on CPU).
        TypeError: an argument has the wrong type or dtype.
    """
    weight, bias = head_tensors(weight, bias)
    weight, bias, group_name = local_head(hidden, weight, bias, vocab_group)
    validate.head_fits(hidden, weight, bias)
    validate.dimensions("hidden", hidden, "NH" if hidden.dim() == 2 else "BTH")
    validate.ids_and_mask("hidden", hidden, completion_ids, "mask", mask)
    validate.same_device(hidden=hidden, weight=weight, bias=bias)
    if logits_budget_mb is not None:
        validate.number("logits_budget_mb", logits_budget_mb, low=0.0, above=True)
    validate.gradient_tolerance(gradient_tolerance, is_sharded=group_name is not None)
    if completion_lengths is not None:
        if mask is None:
            raise ValueError("completion_lengths would be ignored: mask is None; give the mask or leave them out")
        num_sequences = completion_ids.shape[0] if completion_ids.dim() == 2 else None
        validate.lengths_on_host("completion_lengths", completion_lengths, num_sequences)
    return _masked_token_logps(
        HeadTensors(hidden, weight, bias),
        completion_ids,
        mask,
        temperature,
        logit_softcap,
        return_entropy=return_entropy,
        return_lse=return_lse,
        budget_mb=logits_budget_mb,
        vocab_group=group_name,
        completion_lengths=completion_lengths,
        gradient_tolerance=gradient_tolerance,
    )
