"""The float64 result of a case, and the errors of contenders against it: only correct contenders are timed.

The float64 result is computed by eager PyTorch on the same numbers, one sequence at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.inputs import Inputs, make_inputs, policy_loss
from benchmarks.shapes import TINY, Case

# relative, of loss and gradients; a contender with a larger error computes something else. In bfloat16 most peers round
# every logit to 8 bits, which is an error of up to 0.2 with the head of a language model; that is published, not
# rejected, since `check_formula` has compared every term in float32
BOUND = {"float32": 1e-4, "bfloat16": 0.5}
LOGPS_BOUND = {"float32": 1e-3, "bfloat16": 0.5}  # nats
# standard deviation in nats of old and reference log-probs from the current ones in the check of the formula; it makes
# every term of the loss, clipping and penalty included, a large part of the gradient
FORMULA_LOG_RATIO_STD = 1.5

Loss = Callable[[Tensor, Inputs], Tensor]


class WrongResultError(Exception):
    """A contender's loss or gradients differ from those in float64."""


@dataclass(frozen=True)
class Truth:
    """Float64 results: the loss, log-probs and entropies [B, T], and the gradients of the loss."""

    loss: float
    logps: Tensor
    entropies: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor | None


def truth_of(inputs: Inputs, loss_of: Loss = policy_loss) -> Truth:
    """The eager loss in float64 on the same numbers, one sequence at a time to limit the memory of the logits."""
    weight = inputs.weight.detach().double().requires_grad_(not inputs.case.frozen_head)
    parts = []
    for row in range(len(inputs.ids)):
        part = _one_sequence(inputs, row, weight)
        logits = part.hidden @ weight.T
        log_softmax = logits.log_softmax(-1)
        logps = log_softmax.gather(-1, part.ids.unsqueeze(-1)).squeeze(-1)
        share = _share(inputs, row, loss_of)
        loss = share * loss_of(logps, part)
        loss.backward()
        with torch.no_grad():
            entropies = -(log_softmax.exp() * log_softmax).sum(-1)
        parts.append((loss.detach(), logps.detach(), entropies, part.hidden.grad))
    losses, logps, entropies, gradients = zip(*parts, strict=True)
    return Truth(float(sum(losses)), torch.cat(logps), torch.cat(entropies), torch.cat(gradients), weight.grad)


def _one_sequence(inputs: Inputs, row: int, weight: Tensor) -> Inputs:
    def select(tensor: Tensor) -> Tensor:
        part = tensor.detach()[row : row + 1]
        return part.double() if part.is_floating_point() else part

    names = ("ids", "mask", "advantages", "old_logps", "ref_logps")
    hidden = select(inputs.hidden).requires_grad_()
    return Inputs(inputs.case, hidden, weight, **{name: select(getattr(inputs, name)) for name in names})


def _share(inputs: Inputs, row: int, loss_of: Loss) -> float:
    """The weight of one sequence's mean in the loss of all sequences."""
    if loss_of is policy_loss:
        return 1 / len(inputs.ids)
    return float(inputs.mask[row].sum() / inputs.mask.sum())


def check_formula(contender: Contender, case: Case, device: torch.device) -> None:
    """Checks in float32, on a tiny shape, that a contender computes every term of the loss of `case`.

    The bounds for bfloat16 would accept a loss without its KL penalty, which changes the gradient by only 0.2 % at
    beta = 0.02. A cross-entropy has no such terms.

    Raises: WrongResultError if it computes something else.
    """
    if contender.loss_of is not policy_loss:
        return
    tiny = replace(case, shape=TINY, dtype="float32")
    inputs = make_inputs(tiny, device, log_ratio_std=FORMULA_LOG_RATIO_STD)
    checked_errors(contender, inputs, truth_of(inputs), contender.formula_bound)


def checked_errors(contender: Contender, inputs: Inputs, truth: Truth, bound: float | None = None) -> dict[str, float]:
    """Errors of one contender against `truth`: relative Frobenius norm for gradients, nats for log-probs.

    Raises: WrongResultError if the error of loss or gradients exceeds `bound` (None: the bound of the dtype, or the
        contender's if it approximates by design).
    """
    inputs.clear()
    loss = contender.prepare(inputs)()
    loss.backward()
    errors = {
        "loss": abs(float(loss.detach()) - truth.loss) / max(abs(truth.loss), 1e-3),
        "grad_hidden": relative_error(inputs.hidden.grad, truth.grad_hidden),
    }
    if truth.grad_weight is not None:
        errors["grad_weight"] = relative_error(inputs.weight.grad, truth.grad_weight)
    bound = max(BOUND[inputs.case.dtype], contender.formula_bound) if bound is None else bound
    if not all(error <= bound for error in errors.values()):
        raise WrongResultError(f"{contender.name} on {inputs.case}: {errors}; each must be at most {bound}")
    if contender.logps is not None:
        with torch.no_grad():
            errors["logps"] = largest_error(contender.logps(inputs), truth.logps, inputs.mask)
    inputs.clear()
    return errors


def relative_error(found: Any, truth: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found.double() - truth).norm() / truth.norm())


def largest_error(found: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Largest absolute difference over the unmasked tokens, in the unit of `truth`."""
    return float((found.double() - truth)[mask].abs().max())
