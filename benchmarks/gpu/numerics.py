"""Whether results are right: against float64, with TF32 switched on, and under torch.compile."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.check import Check, Measure, Measures, Place
from expo_kernels import Objective, expo_loss, linear_expo_loss, linear_token_logps, reference, token_logps
from expo_kernels import __main__ as self_check

LOGP_BOUND = 2e-5  # nats
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
OBJECTIVES = {
    "default": Objective(),
    "softcap, dual clip": Objective(logit_softcap=30.0, temperature=0.7, dual_clip=3.0),
    "weighted k2, token": Objective(kl="k2", kl_importance_weighted=True, aggregation="token"),
    "cispo": Objective(surrogate="cispo"),
    "sapo": Objective(surrogate="sapo"),
    "sequence": Objective(ratio="sequence"),
}
SHAPES = ((4, 1, 64, 2), (4, 33, 64, 17), (4, 33, 128, 1003), (2, 70, 64, 151_936))  # B, T, H, V
TINY_SHAPES = ((4, 3, 64, 17), (2, 5, 64, 1003))


def make_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """The arguments of one call of linear_expo_loss; masked positions contain NaN and invalid ids."""
    B, T, H, V = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    mask = torch.rand(B, T, generator=generator, device=device) < 0.75
    hidden, weight = normal(B, T, H).to(dtype), (2 * normal(V, H) / H**0.5).to(dtype)
    ids = torch.randint(0, V, (B, T), generator=generator, device=device)
    logps = linear_token_logps(hidden, weight, ids)
    return {
        "hidden": hidden.masked_fill(~mask.unsqueeze(-1), math.nan).requires_grad_(),
        "weight": weight.requires_grad_(),
        "completion_ids": ids.masked_fill(~mask, -100),
        "completion_mask": mask,
        "rewards": torch.arange(B, device=device).remainder(2).float(),
        "group_size": 2,
        "old_logps": logps + 0.3 * normal(B, T),
        "ref_logps": logps + 0.3 * normal(B, T),
    }


def gradients(loss: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """dLoss/dhidden and dLoss/dweight."""
    return torch.autograd.grad(loss, (inputs["hidden"], inputs["weight"]))


def relative(tensor: Tensor, truth: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((tensor.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def to_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64, for which the PyTorch path is used."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    for name in ("hidden", "weight"):
        wide[name] = inputs[name].detach().double().requires_grad_()
    return wide


def check_self(place: Place) -> Measures:
    """Every part of `python -m expo_kernels`."""
    for op, error, bound in self_check.table_checks(place.device):
        yield Measure(op, error, bound)
    for dtype in place.size(tuple(self_check.GRADIENT_BOUND), (torch.bfloat16,)):
        for op, error, bound in self_check.checks(dtype, place.device):
            yield Measure(f"{op}, {_name(dtype)}", error, bound)


def check_numerics(place: Place) -> Measures:
    """Log-probs and gradients of every kind of objective at awkward sizes, in several chunks."""
    objectives = place.size(OBJECTIVES, {name: OBJECTIVES[name] for name in ("default", "sequence")})
    for shape in place.size(SHAPES, TINY_SHAPES):
        for dtype, gradient_bound in GRADIENT_BOUND.items():
            inputs = make_inputs(shape, dtype, place.device)
            wide = to_float64(inputs)
            yield from _temperatures_of_tokens(shape, inputs, gradient_bound)
            for name, objective in objectives.items():
                label = f"{name}, T {shape[1]}, V {shape[3]:,}, {_name(dtype)}"
                output = linear_expo_loss(**inputs, objective=objective, logits_budget_mb=1.0)
                truth = linear_expo_loss(**wide, objective=objective)
                error = float((output.logps - truth.logps).abs().max())
                yield Measure(f"log-probs: {label}", error, LOGP_BOUND, "nats")
                pairs = zip(gradients(output.loss, inputs), gradients(truth.loss, wide), strict=True)
                yield Measure(f"gradients: {label}", max(relative(*pair) for pair in pairs), gradient_bound)
    yield from _logps_and_entropies(place.device)
    inputs = make_inputs((4, 5, 8, 64), torch.bfloat16, place.device)
    del inputs["hidden"], inputs["weight"]
    logits = torch.randn(4, 5, 64, device=place.device)
    runs = [expo_loss(logits.clone().requires_grad_(), **inputs) for _ in range(2)]
    yield Measure("two runs differ by", float((runs[0].loss - runs[1].loss).detach().abs()), 0.0)


def _temperatures_of_tokens(
    shape: tuple[int, int, int, int], inputs: dict[str, Any], gradient_bound: float
) -> Measures:
    _, T, _, V = shape
    mask = inputs["completion_mask"]
    given = inputs | {"temperature": torch.linspace(0.6, 1.4, mask.numel(), device=mask.device).view(mask.shape)}
    wide, label = to_float64(given), f"temperatures of tokens, T {T}, V {V:,}, {_name(inputs['hidden'].dtype)}"
    output = linear_expo_loss(**given, logits_budget_mb=1.0)
    truth = linear_expo_loss(**wide)
    yield Measure(f"log-probs: {label}", float((output.logps - truth.logps).abs().max()), LOGP_BOUND, "nats")
    pairs = zip(gradients(output.loss, given), gradients(truth.loss, wide), strict=True)
    yield Measure(f"gradients: {label}", max(relative(*pair) for pair in pairs), gradient_bound)


def _logps_and_entropies(device: torch.device) -> Measures:
    logits = (4 * torch.randn(3, 5, 4099, device=device)).requires_grad_()
    ids = torch.randint(0, 4099, (3, 5), device=device)
    logps, entropies = token_logps(logits, ids, temperature=0.7, return_entropy=True)
    wide = logits.detach().double().requires_grad_()
    true_logps, true_entropies = reference.token_logps(wide, ids, 0.7), reference.token_entropies(wide, 0.7)
    (grad,) = torch.autograd.grad((logps.sin() + entropies.cos()).sum(), logits)
    (true_grad,) = torch.autograd.grad((true_logps.sin() + true_entropies.cos()).sum(), wide)
    error = float((entropies - true_entropies).detach().abs().max())
    yield Measure("entropies", error, LOGP_BOUND, "nats")
    yield Measure("gradient of log-probs and entropies", relative(grad, true_grad), GRADIENT_BOUND[torch.float32])


@contextmanager
def tf32_allowed(precision: str) -> Iterator[None]:
    """PyTorch's switch for less precise float32 products, for all libraries."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_tf32(place: Place) -> Measures:
    """Results with TF32 products allowed, compared with those without."""
    shape = place.size((4, 64, 1024, 32_000), (2, 5, 64, 1003))
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        inputs = make_inputs(shape, torch.float32, place.device)
        for name, dtype in zip(("hidden", "weight"), dtypes, strict=True):
            inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
        results = []
        for precision in ("highest", "high", "medium"):
            with tf32_allowed(precision):
                output = linear_expo_loss(**inputs)
                results.append((output.logps, *gradients(output.loss, inputs)))
        label = f"hidden {_name(dtypes[0])}, weight {_name(dtypes[1])}"
        truth = linear_expo_loss(**to_float64(inputs))
        for precision, result in zip(("high", "medium"), results[1:], strict=True):
            same = all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))
            yield Measure(f"{label}: results change at precision {precision}", float(not same), 0.0)
        error = float((results[-1][0] - truth.logps).abs().max())
        yield Measure(f"{label}: error of log-probs at precision medium", error, LOGP_BOUND, "nats")


def check_compiled(place: Place) -> Measures:
    """Compiled (fullgraph=True) and eager steps with varying sizes and beta."""
    compiled = torch.compile(linear_expo_loss, fullgraph=True)
    difference = 0.0
    for step in range(place.size(6, 2)):
        inputs = make_inputs((4, 17 + step, 64, 1024), torch.bfloat16, place.device, seed=step)
        beta = torch.full((), step / 10, device=place.device)
        losses = [run(**inputs, beta=beta).loss * 3.0 for run in (compiled, linear_expo_loss)]
        pairs = zip(*((loss.detach(), *gradients(loss, inputs)) for loss in losses), strict=True)
        difference = max(difference, *(float((one - other).abs().max()) for one, other in pairs))
    yield Measure("compiled and eager results differ by", difference, 0.0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS = {
    "self-check": Check("every op agrees with its float64 reference", check_self, seconds=120),
    "numerics": Check(
        "log-probs within 2e-5 nats, gradients within 1e-5 (float32), 2e-3 (bfloat16)", check_numerics, 180
    ),
    "tf32": Check("TF32 switches do not change results", check_tf32),
    "compiled": Check("torch.compile(fullgraph=True) gives the bits of eager mode", check_compiled, seconds=120),
}
