"""The row kernels reach a copy's bandwidth by the model in `row_model.py`. Run with -s to see the table."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from expo_kernels import _launch
from expo_kernels._triton import launch as kernels
from expo_kernels.objective import Objective
from tests.kernels import compiling, row_model
from tests.kernels.test_compile_budgets import chunk_with_gradient, compile_one, make_tokens, run_exponentials, run_loss

pytestmark = pytest.mark.medium  # compiles kernels

V, ROWS = 151_936, 1024
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"float32": (F32, F32), "float32 to bfloat16": (F32, BF16), "bfloat16": (BF16, BF16)}


def compile_loss(logits, grad, capability):
    return compile_one(lambda: run_loss(V, logits, grad, Objective()), capability)


@pytest.mark.parametrize("name", DTYPES)
def test_the_loss_kernel_reaches_85_percent_of_a_copy_on_an_h100_by_the_model(name):
    logits, grad = DTYPES[name]
    programs = kernels._programs(chunk_with_gradient(V, logits, grad), make_tokens(Objective()))
    print()
    for gpu_name, gpu in row_model.GPUS.items():
        kernel = compile_loss(logits, grad, gpu.capability)
        loops = row_model.passes(kernel)
        assert len(loops) == 2, [gpu_name, loops]
        found = row_model.predict(loops, gpu, programs=programs, itemsize=logits.itemsize, vocab_size=V, num_rows=ROWS)
        print(
            f"{name:20} {gpu_name:5} {compiling.usage(kernel).registers:4} registers, {programs} programs, "
            f"{[loop.instructions for loop in loops]} instructions, {[loop.barriers for loop in loops]} barriers, "
            f"{found.bytes_in_flight / 1024:.0f} KiB in flight, {found.bytes_per_logit:.0f} bytes a logit, "
            f"{100 * found.share_of_copy:.0f} % of a copy, bound by {found.bound}"
        )
        assert loops[0].barriers == loops[0].shuffles == loops[1].shuffles == 0
        if gpu_name in ("A100", "H100"):
            assert found.share_of_copy >= 0.85
            assert compiling.usage(kernel).registers <= _launch.most_registers(programs)


def test_exponentials_of_all_tiles_take_less_time_than_the_row_kernel_by_the_model():
    gpu, num_rows, columns = row_model.GPUS["H100"], 1024, _launch.EXPONENTIAL_COLUMNS
    kernel = compile_one(lambda: run_exponentials(V), gpu.capability)
    assert row_model.whole(kernel).loaded_bytes == 64  # 16 columns per thread
    parts = row_model.seconds_of_a_tile(kernel, gpu, num_rows=num_rows, columns=columns)
    num_launches = 8192 // num_rows * -(-V // columns)
    total = num_launches * (max(parts.values()) + row_model.NEXT_LAUNCH)
    print({name: f"{1e6 * seconds:.1f} us" for name, seconds in parts.items()}, f"{num_launches} launches")
    print(f"{1e3 * total:.1f} ms", row_model.whole(kernel))
    moved_by_the_row_kernel = 10 * 8192 * V
    assert total < moved_by_the_row_kernel / (gpu.bandwidth * row_model.COPY_SHARE)


def test_the_model_finds_a_kernel_with_too_few_loads_in_flight():
    gpu = row_model.GPUS["H100"]
    loops = row_model.passes(compile_loss(F32, BF16, "sm_90"))
    found = row_model.predict(loops, gpu, programs=1, itemsize=4, vocab_size=V, num_rows=ROWS)
    assert found.bound == "latency"
    assert found.share_of_copy < 0.85
