"""Forward and backward of the linear policy loss on a CPU, side by side with eager PyTorch and, if installed, Liger.

    python -m benchmarks.cpu_loss [--repeats 7] [--threads 2] [--out FILE.json]

Times are interleaved in one process: every repeat runs each implementation once, in turn. Extra peak memory is the
growth of the peak resident set over what the inputs took, in a fresh process for each implementation. Float32;
gradients of hidden states and head. Every implementation's gradients are checked against eager float64 first.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.shapes import CPU_SHAPES, Shape
from benchmarks.stamp import installed_version, provenance, write_results
from expo_kernels import Objective, linear_expo_loss

BETA, CLIP = 0.02, 0.2


class Inputs:
    """Random inputs of one shape; log-ratios of 0.1 nats, so that some tokens are clipped."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (shape.num_sequences, shape.length)
        hidden = torch.randn(*size, shape.hidden_size, generator=generator)
        weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) / shape.hidden_size**0.5
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_()
        self.ids = torch.randint(shape.vocab_size, size, generator=generator)
        self.mask = torch.ones(size, dtype=torch.bool)
        self.advantages = torch.randn(shape.num_sequences, generator=generator).to(dtype)
        noise = 0.1 * torch.randn(2, *size, generator=generator)
        with torch.no_grad():
            rows = (hidden.view(-1, shape.hidden_size) @ weight.T).log_softmax(-1)
            logps = rows.gather(1, self.ids.view(-1, 1)).view(size)
        self.old_logps, self.ref_logps = (logps + noise[0]).to(dtype), (logps + noise[1]).to(dtype)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def ours(inputs: Inputs) -> torch.Tensor:
    objective = Objective(clip_low=CLIP, clip_high=CLIP, aggregation="sequence")
    return linear_expo_loss(
        inputs.hidden, inputs.weight, inputs.ids, inputs.mask, advantages=inputs.advantages,
        old_logps=inputs.old_logps, ref_logps=inputs.ref_logps, beta=BETA, objective=objective,
    ).loss  # fmt: skip


def eager(inputs: Inputs) -> torch.Tensor:
    logps = (inputs.hidden @ inputs.weight.T).log_softmax(-1).gather(-1, inputs.ids[..., None]).squeeze(-1)
    return _loss_of(logps, inputs)


def eager_logsumexp(inputs: Inputs) -> torch.Tensor:
    logits = inputs.hidden @ inputs.weight.T
    logps = logits.gather(-1, inputs.ids[..., None]).squeeze(-1) - logits.logsumexp(-1)
    return _loss_of(logps, inputs)


def _loss_of(logps: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    ratio, advantages = (logps - inputs.old_logps).exp(), inputs.advantages[:, None]
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    drift = inputs.ref_logps - logps
    losses = -surrogate + BETA * (drift.exp() - drift - 1)
    return ((losses * inputs.mask).sum(1) / inputs.mask.sum(1)).mean()


def liger(inputs: Inputs) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=BETA, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo", compiled=False)
    return loss(
        inputs.hidden, inputs.weight, inputs.ids, inputs.mask, inputs.advantages,
        ref_per_token_logps=inputs.ref_logps, old_per_token_logps=inputs.old_logps,
    )[0]  # fmt: skip


def implementations() -> dict:
    found = {"expo_kernels": ours, "eager log_softmax": eager, "eager logsumexp": eager_logsumexp}
    if installed_version("liger-kernel") is None:
        sys.stderr.write("liger-kernel is not installed: left out (pip install liger-kernel==0.8.5)\n")
        return found
    return {**found, "liger (compiled=False)": liger}


def gradient_errors(shape: Shape) -> dict:
    """Relative Frobenius error of dHidden and dWeight against eager float64, on the same numbers."""
    inputs, exact = Inputs(shape), Inputs(shape, torch.float64)
    exact.hidden, exact.weight = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    exact.old_logps, exact.ref_logps = inputs.old_logps.double(), inputs.ref_logps.double()
    exact.advantages = inputs.advantages.double()
    eager(exact).backward()
    errors = {}
    for name, run in implementations().items():
        inputs.clear()
        run(inputs).backward()
        errors[name] = {
            "hidden": float((inputs.hidden.grad - exact.hidden.grad).norm() / exact.hidden.grad.norm()),
            "weight": float((inputs.weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm()),
        }
    return errors


def times(shape: Shape, repeats: int) -> dict:
    """Milliseconds of each repeat, after one that is thrown away."""
    inputs, runs = Inputs(shape), implementations()
    found: dict = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            inputs.clear()
            started = time.perf_counter()
            run(inputs).backward()
            if repeat:
                found[name].append(1e3 * (time.perf_counter() - started))
        sys.stderr.write(f"{shape.name}: repeat {repeat} of {repeats}\n")
    return found


def peak_mib(shape: Shape, name: str) -> float:
    """Extra peak resident MiB of one forward and backward in this, fresh, process."""
    inputs = Inputs(shape)
    # large enough to load every library that the measured call runs through
    warm = Inputs(Shape("warm", 4, 32, 64, 1024, 1))
    implementations()[name](warm).backward()
    before = _resident_mib()
    # the peak so far includes making the inputs: fill up to it, so that only growth beyond counts as growth
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    implementations()[name](inputs).backward()
    return _peak_mib() - before


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(shape: Shape, repeats: int, threads: int) -> dict:
    errors, milliseconds = gradient_errors(shape), times(shape, repeats)
    result = {}
    for name, values in milliseconds.items():
        command = [sys.executable, "-m", "benchmarks.cpu_loss", "--threads", str(threads), "--peak", shape.name, name]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        result[name] = {
            "ms": {"min": min(values), "median": statistics.median(values), "all": values},
            "extra_peak_mib": peak,
            "gradient_error": errors[name],
        }
    return result


def table(shape: Shape, result: dict) -> str:
    base_ms, base_mib = result["expo_kernels"]["ms"], result["expo_kernels"]["extra_peak_mib"]
    lines = [f"{shape.name}: N = {shape.num_tokens}, H = {shape.hidden_size}, V = {shape.vocab_size}, float32"]
    lines.append(
        f"{'':24}{'min ms':>9}{'median':>9}{'ours/it':>9}{'MiB':>8}{'ours/it':>9}{'dHidden':>10}{'dWeight':>10}"
    )
    for name, row in result.items():
        ms, mib, error = row["ms"], row["extra_peak_mib"], row["gradient_error"]
        lines.append(
            f"{name:24}{ms['min']:10.0f}{ms['median']:10.0f}{base_ms['min'] / ms['min']:10.2f}{mib:10.0f}"
            f"{base_mib / mib:10.2f}{error['hidden']:10.1e}{error['weight']:10.1e}"
        )
    return "\n".join(lines)


def environment() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        **provenance(("torch", "liger-kernel")),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("SHAPE", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = {shape.name: shape for shape in CPU_SHAPES}
    if options.peak:
        print(peak_mib(shapes[options.peak[0]], options.peak[1]))
        return
    report = {"environment": environment(), "shapes": {}}
    for shape in CPU_SHAPES:
        result = measure(shape, options.repeats, options.threads)
        report["shapes"][shape.name] = result
        print(table(shape, result), flush=True)
    if options.out:
        write_results(options.out, report)


if __name__ == "__main__":
    main()
