"""Public functions on emulated kernels against float64: loss, metrics, log-probs and gradients."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from expo_kernels import Objective, _launch, expo_loss, linear_expo_loss, linear_token_logps, reference, token_logps
from tests.kernels.interpreter.batches import (
    Batch,
    G,
    Outcome,
    assert_matches,
    expected,
    make_batch,
    relative_error,
    spoil,
)
from tests.ptx.emulator import emulated_launches
from tests.ptx.launch import LOCKSTEP, REVERSED, Schedule
from tests.ptx.report import Report

IN_TWO_ORDERS = (REVERSED, LOCKSTEP)
IN_EVERY_ORDER = (Schedule("forward"), REVERSED, Schedule("shuffled", seed=1), Schedule("random", seed=2), LOCKSTEP)
# bounds of dL/dlogits against float64, relative in the norm: the unit roundoff of the dtype, 1e-5 for the arithmetic,
# and 1e-4 for the subnormal numbers of float16
GRAD_ERROR = {torch.float32: 1e-5, torch.float16: 2**-11 + 1e-4, torch.bfloat16: 2**-8 + 1e-5}
# bounds of the gradients of hidden states and weight against float64, which also contain the rounding of the results
LINEAR_GRAD_ERROR = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}


@contextmanager
def kernels_as_ptx(**options: Any) -> Iterator[Report]:
    """Public functions use the kernels, and every launch is emulated; `options` are those of `emulated_launches`."""
    with mock.patch.object(_launch._switch, "kernels_on_cpu", True), emulated_launches(**options) as report:
        yield report


@contextmanager
def no_errors(**options: Any) -> Iterator[Report]:
    """The same, where the checks of the emulator must find nothing."""
    with kernels_as_ptx(**options) as report:
        yield report
    assert report.launches, "no kernel was launched"
    assert not report.errors, "\n".join(report.lines())


def loss_arguments(batch: Batch, objective: Objective, advantages: str) -> dict[str, Any]:
    """The keyword arguments of a loss call."""
    given = {"old_logps": batch.old, "ref_logps": batch.ref, "rollout_logps": batch.rollout}
    given |= {"beta": batch.beta, "objective": objective, "entropy_bonus": batch.entropy_bonus, "return_entropy": True}
    given["temperature"] = batch.temperatures
    if advantages == "rewards":
        return given | {"rewards": batch.rewards, "group_size": G}
    assert batch.advantages is not None
    return given | {"advantages": batch.advantages[:, -1] if advantages == "sequence" else batch.advantages}


def make_case(*args: Any, advantages: str, **options: Any) -> tuple[Batch, Batch]:
    """A batch with rewards, or with advantages per "sequence" or "token"; and the same with arbitrary values at masked
    positions."""
    batch = make_batch(*args, **options)
    if advantages == "rewards":
        return batch, spoil(batch)
    drawn = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(5))
    if advantages == "sequence":
        drawn = drawn[:, -1:].expand(batch.mask.shape).contiguous()
        batch = dataclasses.replace(batch, advantages=drawn)
        return batch, dataclasses.replace(spoil(batch), advantages=drawn)
    batch = dataclasses.replace(batch, advantages=drawn)
    return batch, spoil(batch)


def check_loss(
    *,
    B: int = 4,
    T: int = 3,
    V: int = 17,
    dtype: torch.dtype = torch.float32,
    objective: Objective | None = None,
    advantages: str = "rewards",
    entropy_bonus: float = 0.0,
    inplace: bool = False,
    aligned: bool = True,
    loss_scale: float = 1.0,
    temperatures: Tensor | None = None,
) -> None:
    """`expo_loss` from logits; with `aligned=False` rows begin at addresses that are not multiples of 16."""
    objective = objective or Objective()
    options: dict[str, Any] = {"entropy_bonus": entropy_bonus, "temperatures": temperatures}
    batch, spoilt = make_case(B, T, V, dtype, objective=objective, advantages=advantages, **options)
    truth, logits = expected(batch, objective), spoilt.logits
    if not aligned:
        memory = torch.empty(B * T * (V + 3) + 1, dtype=dtype)[1:].view(B, T, V + 3)
        logits = memory[..., :V].copy_(logits)
    arguments = loss_arguments(spoilt, objective, advantages)
    logits.requires_grad_()
    out = expo_loss(logits, spoilt.ids, spoilt.mask, inplace=inplace, **arguments)
    (grad,) = torch.autograd.grad(out.loss * loss_scale, logits)
    if inplace:
        assert grad.data_ptr() == logits.data_ptr()
    truth.grad *= loss_scale
    assert_matches(
        Outcome(out.loss.detach(), out.metrics, out.logps.detach(), grad), truth, grad_error=GRAD_ERROR[dtype]
    )


def check_packed_loss(*, V: int = 128, objective: Objective | None = None) -> None:
    """`expo_loss` on packed sequences of 4, 1, 0 and 4 positions."""
    objective = objective or Objective()
    batch = make_batch(4, 4, V, objective=objective)
    is_there = torch.arange(4) < torch.tensor([4, 1, 0, 4])[:, None]
    batch.mask &= is_there
    truth, spoilt = expected(batch, objective), spoil(batch)
    packed = dataclasses.replace(
        spoilt,
        **{name: getattr(spoilt, name)[is_there] for name in ("old", "ref")},
        rollout=None if spoilt.rollout is None else spoilt.rollout[is_there],
    )
    logits = spoilt.logits[is_there].requires_grad_()
    out = expo_loss(
        logits,
        spoilt.ids[is_there],
        spoilt.mask[is_there],
        cu_seqlens=torch.tensor([0, 4, 5, 5, 9], dtype=torch.int32),
        **loss_arguments(packed, objective, "rewards"),
    )
    (grad,) = torch.autograd.grad(out.loss, logits)
    truth = dataclasses.replace(truth, logps=truth.logps[is_there], grad=truth.grad[is_there])
    assert_matches(Outcome(out.loss.detach(), out.metrics, out.logps.detach(), grad), truth)


def check_linear_loss(
    *,
    V: int = 1000,
    H: int = 16,
    T: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    objective: Objective | None = None,
    advantages: str = "rewards",
    entropy_bonus: float = 0.0,
    rows_per_chunk: int = 5,
    has_bias: bool = False,
    vocab_group: Any = None,
    temperatures: Tensor | None = None,
) -> None:
    """`linear_expo_loss` in several chunks: gradients of hidden states, weight and bias."""
    objective = objective or Objective()
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        (scale * torch.randn(*shape, generator=generator)).to(dtype)
        for scale, shape in ((1.0, (4, T, H)), (0.5, (V, H)), (1.0, (V,)))
    )
    logits = hidden.double() @ weight.double().T + (bias.double() if has_bias else 0.0)
    options: dict[str, Any] = {"entropy_bonus": entropy_bonus, "temperatures": temperatures}
    batch, spoilt = make_case(4, T, V, objective=objective, advantages=advantages, logits=logits, **options)
    truth = expected(batch, objective)
    leaves = [hidden.masked_fill(~batch.mask[..., None], float("nan")), weight, *([bias] if has_bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    out = linear_expo_loss(
        leaves[0],
        weight,
        spoilt.ids,
        spoilt.mask,
        bias=bias if has_bias else None,
        vocab_group=vocab_group,
        logits_budget_mb=rows_per_chunk * V * 4 / 2**20,
        **loss_arguments(spoilt, objective, advantages),
    )
    grads = torch.autograd.grad(out.loss, leaves)
    assert abs(float(out.loss.detach()) - float(truth.loss)) <= 2e-6 * float(truth.size)
    assert float((out.logps - truth.logps).abs().max()) <= 1e-5
    grad_logits = truth.grad.flatten(0, 1)
    true_grads = [grad_logits @ weight.double(), grad_logits.T @ hidden.double().flatten(0, 1), grad_logits.sum(0)]
    for grad, true_grad in zip(grads, true_grads, strict=False):
        assert relative_error(grad.view(true_grad.shape), true_grad.detach()) <= LINEAR_GRAD_ERROR[dtype]


def check_linear_logps(
    *, V: int, rows_per_chunk: int = 4, return_lse: bool = False, temperature: float | Tensor = 0.8
) -> None:
    """`linear_token_logps` in several chunks, whose backward pass computes the logits again."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((3, 3, 16), (V, 16)))
    ids = torch.randint(0, V, (3, 3), generator=generator)
    grad_logps = torch.randn(3, 3, generator=generator)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    true_logps = reference.token_logps(exact[0] @ exact[1].T, ids, temperature)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
    budget = rows_per_chunk * V * 4 / 2**20
    options: dict[str, Any] = {"temperature": temperature, "logits_budget_mb": budget}
    loss = true_loss = 0.0
    if return_lse:
        logps, lse = linear_token_logps(hidden, weight, ids, return_lse=True, **options)
        true_lse = reference.log_sum_exps(exact[0] @ exact[1].T, temperature)
        assert float((lse - true_lse).detach().abs().max()) <= 1e-5
        loss, true_loss = 0.3 * lse.square().sum(), 0.3 * true_lse.square().sum()
    else:
        logps = linear_token_logps(hidden, weight, ids, **options)
    assert float((logps - true_logps).detach().abs().max()) <= 1e-5
    grads = torch.autograd.grad((logps * grad_logps).sum() + loss, leaves)
    for grad, truth in zip(grads, torch.autograd.grad((true_logps * grad_logps).sum() + true_loss, exact), strict=True):
        assert relative_error(grad, truth) <= LINEAR_GRAD_ERROR[torch.bfloat16]


def check_logps(*, V: int, dtype: torch.dtype, softcap: float | None = None, temperature: float | Tensor = 0.8) -> None:
    """`token_logps` with entropies and log-sum-exps, and their gradients."""
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(3, 3, V, generator=generator)).to(dtype)
    ids = torch.randint(0, V, (3, 3), generator=generator)
    grads = torch.randn(3, 3, 3, generator=generator)

    def differentiated(logits: Tensor, *outputs: Tensor) -> list[Tensor]:
        total = (torch.stack(outputs) * grads).sum()
        return [*(output.detach() for output in outputs), *torch.autograd.grad(total, logits)]

    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    given = {"temperature": temperature, "logit_softcap": softcap, "return_entropy": True, "return_lse": True}
    made = differentiated(leaf, *token_logps(leaf, ids, **given))
    truth = differentiated(
        exact,
        reference.token_logps(exact, ids, temperature, softcap),
        reference.token_entropies(exact, temperature, softcap),
        reference.log_sum_exps(exact, temperature, softcap),
    )
    for one, other in zip(made[:3], truth[:3], strict=True):
        assert float((one - other).abs().max()) <= 1e-5
    assert relative_error(made[3], truth[3]) <= GRAD_ERROR[dtype]
