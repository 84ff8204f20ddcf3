"""All checks of the kernels that need a GPU, in one command: `python -m benchmarks.gpu_check`.

On small inputs it checks the kernels against float64, that a thousand varying steps compile nothing, that no step
synchronizes with the device, that a captured CUDA graph replays with a new beta, and that results under torch.compile
are bitwise equal. Exit code 1 if a check fails. Results go to `benchmarks/results/`; `make gpu-bench` measures times.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.stamp import RESULTS, stamp, write_results
from expo_kernels import Objective, expo_loss, linear_expo_loss, linear_token_logps, reference, token_logps

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
SHAPES = [(4, 1, 64, 2), (4, 33, 64, 17), (4, 33, 128, 1003), (2, 70, 64, 151_936)]  # B, T, H, V


def make_inputs(B: int, T: int, H: int, V: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """The arguments of one call on the GPU; masked positions contain NaN and invalid ids."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    mask = torch.rand(B, T, generator=generator, device="cuda") < 0.75
    hidden, weight = normal(B, T, H).to(dtype), (2 * normal(V, H) / H**0.5).to(dtype)
    ids = torch.randint(0, V, (B, T), generator=generator, device="cuda")
    logps = linear_token_logps(hidden, weight, ids)
    return {
        "hidden": hidden.masked_fill(~mask.unsqueeze(-1), math.nan).requires_grad_(),
        "weight": weight.requires_grad_(),
        "completion_ids": ids.masked_fill(~mask, -100),
        "completion_mask": mask,
        "rewards": torch.arange(B, device="cuda").remainder(2).float(),
        "group_size": 2,
        "old_logps": logps + 0.3 * normal(B, T),
        "ref_logps": logps + 0.3 * normal(B, T),
    }


def to_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64, for which the PyTorch path is used."""
    wide = {name: value.double() if _is_float(value) else value for name, value in inputs.items()}
    for name in ("hidden", "weight"):
        wide[name] = inputs[name].detach().double().requires_grad_()
    return wide


def numeric_checks() -> Iterator[tuple[str, float, float]]:
    """Name, error against float64, and bound for each op at awkward sizes."""
    for B, T, H, V in SHAPES:
        for dtype, gradient_bound in GRADIENT_BOUND.items():
            inputs = make_inputs(B, T, H, V, dtype)
            wide = to_float64(inputs)
            for name, objective in OBJECTIVES.items():
                label = f"{name}, T {T}, V {V:,}, {str(dtype).removeprefix('torch.')}"
                output = linear_expo_loss(**inputs, objective=objective, logits_budget_mb=1.0)
                truth = linear_expo_loss(**wide, objective=objective)
                yield f"log-probs: {label}", float((output.logps - truth.logps).abs().max()), LOGP_BOUND
                gradients = zip(_gradients(output.loss, inputs), _gradients(truth.loss, wide), strict=True)
                yield f"gradients: {label}", max(_relative(*pair) for pair in gradients), gradient_bound
    logits = (4 * torch.randn(3, 5, 4099, device="cuda")).requires_grad_()
    ids = torch.randint(0, 4099, (3, 5), device="cuda")
    logps, entropies = token_logps(logits, ids, temperature=0.7, return_entropy=True)
    wide_logits = logits.detach().double().requires_grad_()
    true_logps = reference.token_logps(wide_logits, ids, 0.7)
    true_entropies = reference.token_entropies(wide_logits, 0.7)
    (grad,) = torch.autograd.grad((logps.sin() + entropies.cos()).sum(), logits)
    (true_grad,) = torch.autograd.grad((true_logps.sin() + true_entropies.cos()).sum(), wide_logits)
    yield "entropies", float((entropies - true_entropies).abs().max()), LOGP_BOUND
    yield "gradient of log-probs and entropies", _relative(grad, true_grad), GRADIENT_BOUND[torch.float32]
    loss_inputs = {name: value for name, value in make_inputs(4, 5, 8, 64, torch.bfloat16).items() if name != "weight"}
    del loss_inputs["hidden"]
    existing_logits = torch.randn(4, 5, 64, device="cuda")
    runs = [expo_loss(existing_logits.clone().requires_grad_(), **loss_inputs) for _ in range(2)]
    yield "two runs differ by", float((runs[0].loss - runs[1].loss).abs()), 0.0


def num_compiled() -> int:
    """The number of binaries that Triton has compiled so far."""
    from triton.runtime.jit import JITFunction

    from expo_kernels._triton import curriculum, rows, sequences

    modules = (rows, sequences, curriculum)
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def check_compilations() -> tuple[str, float, float]:
    """The number of new binaries over 1,000 steps in which shapes and hyper-parameters change."""
    before = None
    for step in range(1010):
        if step == 10:
            before = num_compiled()
        B, T = 2 * (1 + step % 8), 1 + step % 37
        objective = Objective(temperature=0.5 + step % 9 / 8, clip_low=0.1 + step % 3 / 10)
        inputs = make_inputs(B, T, 64, 1024, torch.bfloat16, seed=step)
        beta = torch.full((), step / 1000, device="cuda")
        output = linear_expo_loss(**inputs, objective=objective, beta=beta, normalizer=float(B + step))
        output.loss.backward()
    assert before is not None
    return "binaries compiled over 1,000 varying steps", float(num_compiled() - before), 0.0


def check_synchronizations() -> tuple[str, float, float]:
    """1 if PyTorch reports a synchronization with the device in a step, else 0."""
    inputs = make_inputs(4, 33, 64, 1024, torch.bfloat16)
    linear_expo_loss(**inputs).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_expo_loss(**inputs, beta=0.03, normalizer=7.0).loss.backward()
    except RuntimeError as error:
        print(f"  {error}")
        return "synchronizations", 1.0, 0.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "synchronizations", 0.0, 0.0


def check_graph() -> tuple[str, float, float]:
    """The largest difference between a captured step, replayed with another beta, and an eager step."""
    inputs = make_inputs(4, 33, 64, 1024, torch.bfloat16)
    beta = torch.full((), 0.02, device="cuda")

    def run() -> tuple[Tensor, ...]:
        loss = linear_expo_loss(**inputs, beta=beta, logits_budget_mb=0.2).loss
        return loss.detach(), *_gradients(loss, inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    beta.fill_(0.5)
    graph.replay()
    difference = max(float((one - other).abs().max()) for one, other in zip(captured, run(), strict=True))
    return "graph replayed with a new beta differs by", difference, 0.0


def check_compiled() -> tuple[str, float, float]:
    """The largest difference between compiled (fullgraph=True) and eager steps with varying sizes and beta."""
    compiled = torch.compile(linear_expo_loss, fullgraph=True)
    difference = 0.0
    for step in range(6):
        inputs = make_inputs(4, 17 + step, 64, 1024, torch.bfloat16, seed=step)
        beta = torch.full((), step / 10, device="cuda")
        losses = [run(**inputs, beta=beta).loss * 3.0 for run in (compiled, linear_expo_loss)]
        pairs = zip(*((loss.detach(), *_gradients(loss, inputs)) for loss in losses), strict=True)
        difference = max(difference, *(float((one - other).abs().max()) for one, other in pairs))
    return "torch.compile(fullgraph=True) differs by", difference, 0.0


def _gradients(loss: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (inputs["hidden"], inputs["weight"]))


def _relative(tensor: Tensor, truth: Tensor) -> float:
    return float((tensor.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def main() -> int:
    """Run all checks and write the results; returns 0, 1 if a check fails, or 2 without a GPU."""
    if not torch.cuda.is_available():
        print("no GPU found: gpu_check needs a CUDA or HIP device for which torch.cuda.is_available() is true")
        return 2
    results: dict[str, Any] = {"stamp": stamp(torch.device("cuda")), "checks": []}
    num_failed = 0
    single_checks = (check_compilations, check_synchronizations, check_graph, check_compiled)
    for name, error, bound in (*numeric_checks(), *(check() for check in single_checks)):
        is_ok = error <= bound
        num_failed += not is_ok
        results["checks"].append({"name": name, "error": error, "bound": bound, "ok": is_ok})
        print(f"{'ok    ' if is_ok else 'FAILED'}  {name}: {error:.2e}, bound {bound:.0e}")
    name = results["stamp"]["machine"].replace(" ", "-").replace("/", "-")
    path = RESULTS / f"gpu_check_{name}.json"
    write_results(path, results)
    print(f"{'all checks passed' if num_failed == 0 else f'{num_failed} checks failed'}; written to {path}")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
