"""Times and memory against the targets: row kernels at copy speed, the loss close to its three products."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.contenders import our_linear_loss
from benchmarks.floors import device_copy, three_products
from benchmarks.gpu.check import Check, Measure, Measures, Place
from benchmarks.inputs import make_inputs
from benchmarks.machine import Machine
from benchmarks.row_launch import GRADIENT_BOUND, gradient_of, moved_bytes, row_loss
from benchmarks.shapes import Case, Shape
from benchmarks.truth import relative_error

LEAST_SHARE_OF_COPY = 0.8
MOST_TIMES_PRODUCTS = 1.2
FIXED_MIB = 640.0  # of logits, beside dHidden and the float32 dWeight
ROUNDS = 15
HEAD_START_CYCLES = 4_000_000  # about 2 ms, in which the host launches all that is timed

ROWS, VOCAB_SIZE = 1024, 151_936
NUM_CHECKED = 8  # rows whose gradient is compared with float64
DTYPES = (
    ("float32", torch.float32, torch.float32),
    ("bfloat16", torch.bfloat16, torch.bfloat16),
    ("float32 to bfloat16", torch.float32, torch.bfloat16),
)
SHAPES = (Shape("8B head", 8, 1024, 4096, VOCAB_SIZE), Shape("1.5B head", 8, 1024, 1536, VOCAB_SIZE))
TINY = Shape("tiny", 2, 4, 64, 512)


def device_ms(runs: dict[str, Callable[[], Any]], machine: Machine, rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each run on the device, all runs in every round, without the time of their launches."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            machine.cool()
            torch.cuda._sleep(HEAD_START_CYCLES)
            start = machine.mark()
            run()
            ms = machine.ms(start, machine.mark())
            if index >= 2:
                times[name].append(ms)
    return {name: median(of_run) for name, of_run in times.items()}


def check_rows(place: Place) -> Measures:
    """The bandwidth of one launch of the loss kernel, compared with a copy of the same memory."""
    num_rows, vocab_size = place.size((ROWS, VOCAB_SIZE), (2, 512))
    machine = Machine(place.device)
    for label, dtype, grad_dtype in DTYPES:
        memory = torch.randn(num_rows, vocab_size, device=place.device).to(dtype)
        truth = gradient_of(memory[:NUM_CHECKED])
        run, gradient = row_loss(memory, grad_dtype)
        run()
        error = relative_error(gradient[:NUM_CHECKED], truth)
        yield Measure(f"{label}: error of the gradient", error, GRADIENT_BOUND[grad_dtype])
        if place.is_rehearsal:
            continue
        ms = device_ms({"rows": run, "copy": device_copy(memory)}, machine)
        rows_gbs = moved_bytes(memory, grad_dtype) / ms["rows"] / 1e6
        copy_gbs = 2 * memory.numel() * memory.element_size() / ms["copy"] / 1e6
        yield Measure(f"{label}: copy", copy_gbs, unit="GB/s")
        yield Measure(f"{label}: row kernel", rows_gbs, unit="GB/s")
        share = rows_gbs / copy_gbs
        yield Measure(f"{label}: row kernel / copy", share, LEAST_SHARE_OF_COPY, is_minimum=True)
    place.require_gpu("times of kernels")


def check_loss(place: Place) -> Measures:
    """Time of the linear loss over the three products alone in bfloat16, and its peak memory."""
    machine = Machine(place.device)
    for shape in place.size(SHAPES, (TINY,)):
        inputs = make_inputs(Case(shape, "bfloat16"), place.device)

        def loss(inputs: Any = inputs) -> None:
            inputs.clear()
            our_linear_loss(inputs).loss.backward()

        products = three_products(inputs)
        loss()
        products()
        if place.is_rehearsal:
            continue
        ms = device_ms({"loss": loss, "products": products}, machine)
        operations = 6 * shape.num_tokens * shape.hidden_size * shape.vocab_size
        yield Measure(f"{shape.name}: three products", ms["products"], unit="ms")
        yield Measure(f"{shape.name}: three products", operations / ms["products"] / 1e9, unit="TFLOP/s")
        yield Measure(f"{shape.name}: loss and gradients", ms["loss"], unit="ms")
        yield Measure(f"{shape.name}: loss / products", ms["loss"] / ms["products"], MOST_TIMES_PRODUCTS)
        inputs.clear()
        peak = machine.extra_peak_mib(loss)
        results = 2 * shape.num_tokens * shape.hidden_size + 4 * shape.vocab_size * shape.hidden_size
        yield Measure(f"{shape.name}: extra peak memory", peak, results / 2**20 + FIXED_MIB, "MiB")
        inputs.clear()
    place.require_gpu("times of kernels")


CHECKS = {
    "row-speed": Check("row kernels reach 80 % of the bandwidth of a copy", check_rows, seconds=60),
    "loss-speed": Check(
        "linear loss at most 1.2 x its three products; memory dX + 4VH + 640 MiB", check_loss, seconds=90
    ),
}
