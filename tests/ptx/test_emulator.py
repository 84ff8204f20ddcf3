"""The emulator and its checks on small kernels written in PTX: two warps, 256 bytes of shared memory."""

import ctypes
import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from expo_kernels._triton import launch as kernels
from tests.kernels import compiling
from tests.ptx import arithmetic, report
from tests.ptx.emulator import emulated_launches
from tests.ptx.launch import LOCKSTEP, REVERSED, Launch, Schedule, TranslatedKernel
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import EmulatorError

NUM_THREADS = 64
# %r1: thread; %r2: address of its word of shared memory; %rd3: address of its word of the tensor at %rd1
KERNEL = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{{
    .reg .pred %p<9>;
    .reg .b32 %r<19>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd1, %rd2;
    {body}
}}
"""
SCHEDULES = [Schedule("forward"), REVERSED, Schedule("shuffled", seed=1), Schedule("random", seed=2), LOCKSTEP]


def execute(body, *, schedule=REVERSED, grid=1, values=None):
    """What the kernel leaves in its tensor, and the report."""
    values = torch.zeros(NUM_THREADS, dtype=torch.int32) if values is None else values
    kernel = TranslatedKernel(KERNEL.format(body="\n    ".join(body)), NUM_THREADS // 32, 256)
    found = report.Report()
    memory = GlobalMemory([("values", values)])
    Launch(kernel, [values.data_ptr()], grid, memory, schedule, found).run()
    return values, found


STORE_OWN = ["st.global.b32 [%rd3], %r1;", "ret;"]
# the thread of the other warp with the same lane
OTHER = "xor.b32 %r3, %r2, 128;"
EXCHANGE = [
    OTHER,
    "st.shared.b32 [%r2], %r1;",
    "bar.sync 0;",
    "ld.shared.b32 %r4, [%r3];",
    "st.global.b32 [%rd3], %r4;",
    "ret;",
]
COUNT = ["mov.b32 %r5, 1;", "setp.eq.s32 %p1, %r1, 0;", "@%p1 atom.global.gpu.{order}.add.u32 %r6, [%rd1+252], %r5;"]
# block 0 writes word 1 and then increments the counter in word 63; the other block, if it comes second, reads word 1
MESSAGE = [
    "mov.u32 %r7, %ctaid.x;",
    "setp.ne.s32 %p2, %r7, 0;",
    "setp.ne.s32 %p3, %r1, 0;",
    "@%p3 ret;",
    "mov.b32 %r8, 7;",
    "@!%p2 st.global.b32 [%rd1+4], %r8;",
    *COUNT,
    "@%p2 ld.global.b32 %r9, [%rd1+4];",
    "@%p2 st.global.b32 [%rd1+8], %r9;",
    "ret;",
]
IF_EVEN = ["and.b32 %r3, %r1, 1;", "setp.eq.b32 %p1, %r3, 0;", "mov.b32 %r4, 5;", "@%p1 bra $even;"]
FAULTS = {
    "a barrier is missing": ([line for line in EXCHANGE if not line.startswith("bar")], report.SHARED_RACE),
    "shared memory is not written": (["ld.shared.b32 %r4, [%r2];", *STORE_OWN], report.UNINITIALISED),
    "a shared address is out of bounds": (["st.shared.b32 [%r2+4], %r1;", *STORE_OWN], report.OUT_OF_BOUNDS),
    "a read is out of bounds": (["ld.global.b32 %r4, [%rd3+4];", "ret;"], report.OUT_OF_BOUNDS),
    "a read before the tensor": (["ld.global.b32 %r4, [%rd3+-4];", "ret;"], report.OUT_OF_BOUNDS),
    "a wide read is not aligned": (["ld.global.v2.b32 {%r4, %r5}, [%rd1+4];", "ret;"], report.MISALIGNED),
    "two warps write one address": (["st.global.b32 [%rd1], %r1;", "ret;"], report.RACE),
    "two lanes of one store write one address": (["st.global.b32 [%rd1], %r1;", "ret;"], report.SAME_STORE),
    "a warp leaves before a barrier": (
        ["setp.lt.u32 %p1, %r1, 32;", "@%p1 ret;", "bar.sync 0;", *STORE_OWN],
        report.MISSED_BARRIER,
    ),
    "a shuffle is in divergent code": (
        [*IF_EVEN, "bra $end;", "$even:", "shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", "$end:", *STORE_OWN],
        report.DIVERGENT,
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_threads_exchange_values_through_shared_memory(schedule):
    values, found = execute(EXCHANGE, schedule=schedule)
    assert values.tolist() == [(thread + 32) % NUM_THREADS for thread in range(NUM_THREADS)]
    assert not found.findings


@pytest.mark.parametrize("schedule", [REVERSED, LOCKSTEP], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(fault, schedule):
    body, kind = FAULTS[fault]
    assert kind in execute(body, schedule=schedule)[1].errors


def test_nothing_is_written_out_of_bounds():
    memory = torch.zeros(3 * NUM_THREADS, dtype=torch.int32)
    values = memory[NUM_THREADS : 2 * NUM_THREADS]
    _, found = execute(["st.global.b32 [%rd3+128], %r1;", "ret;"], values=values)
    assert found.errors == {report.OUT_OF_BOUNDS}
    assert not memory[2 * NUM_THREADS :].any()
    assert values[32:].tolist() == list(range(32))


def test_columns_beside_a_strided_tensor_are_out_of_bounds():
    memory = torch.zeros(8, 12, dtype=torch.int32)
    _, found = execute(STORE_OWN, values=memory[:, :11])
    assert found.errors == {report.OUT_OF_BOUNDS}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_an_atomic_orders_memory_only_with_acquire_and_release(schedule):
    ordered, relaxed = (
        execute([line.format(order=order) for line in MESSAGE], grid=2, schedule=schedule)[1]
        for order in ("acq_rel", "relaxed")
    )
    assert report.RACE in relaxed.errors
    if schedule.order == "forward":  # block 0 came first
        assert not ordered.errors


def test_lanes_of_a_warp_are_ordered_by_a_warp_barrier():
    shift = ["st.global.b32 [%rd3], %r1;", "and.b32 %r3, %r1, 31;", "setp.eq.s32 %p1, %r3, 0;"]
    read = ["@!%p1 ld.global.b32 %r4, [%rd3+-4];", "ret;"]
    assert {kind for kind, *_ in execute([*shift, *read])[1].findings} == {report.WITHIN_A_WARP}
    assert not execute([*shift, "bar.warp.sync -1;", *read])[1].findings


def test_a_barrier_that_only_some_lanes_of_a_warp_reach_is_refused():
    with pytest.raises(EmulatorError, match="must be reached by all lanes"):
        execute(["setp.lt.u32 %p1, %r1, 16;", "@%p1 ret;", "bar.sync 0;", "ret;"])


def test_lanes_that_diverge_meet_again():
    odd, even = ["mov.b32 %r4, 6;", "bra $end;"], ["$even:", "add.s32 %r4, %r4, 2;"]
    values, found = execute([*IF_EVEN, *odd, *even, "$end:", "st.global.b32 [%rd3], %r4;", "ret;"])
    assert values.tolist() == [7, 6] * 32
    assert not found.findings


@pytest.mark.parametrize(
    ("mode", "operand", "expected"),
    [
        ("bfly", "5, 31", lambda lane: lane ^ 5),
        ("idx", "9, 31", lambda lane: 9),
        ("up", "3, 0", lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", "3, 31", lambda lane: lane + 3 if lane < 29 else lane),
    ],
)
def test_shuffles(mode, operand, expected):
    values, _ = execute([f"shfl.sync.{mode}.b32 %r4, %r1, {operand}, -1;", "st.global.b32 [%rd3], %r4;", "ret;"])
    assert values.tolist() == [thread // 32 * 32 + expected(thread % 32) for thread in range(NUM_THREADS)]


# each lane has the address of a row of 8 numbers of 16 bits; word w of shared memory holds w
ROWS_OF_MATRICES = ["st.shared.b32 [%r2], %r1;", "bar.sync 0;", "and.b32 %r3, %r1, 15;", "shl.b32 %r3, %r3, 4;"]


def test_matrices_are_loaded_from_shared_memory():
    load = "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r4, %r5}, [%r3];"
    for register, first in (("%r4", 0), ("%r5", 32)):
        values, found = execute([*ROWS_OF_MATRICES, load, f"st.global.b32 [%rd3], {register};", "ret;"])
        assert values.tolist() == [first + lane for lane in range(32)] * 2
        assert not found.findings


def test_matrices_are_transposed():
    load = "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r3];"
    values, found = execute([*ROWS_OF_MATRICES, load, "st.global.b32 [%rd3], %r4;", "ret;"])
    matrix = [[(8 * row + column) // 2 if column % 2 == 0 else 0 for column in range(8)] for row in range(8)]
    expected = [matrix[2 * (lane % 4)][lane // 4] + (matrix[2 * (lane % 4) + 1][lane // 4] << 16) for lane in range(32)]
    assert values.tolist() == expected * 2
    assert not found.findings


def test_faults_of_loads_of_matrices_are_reported():
    load = ["ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3];", "ret;"]
    unordered = [line for line in ROWS_OF_MATRICES if not line.startswith("bar")]
    assert report.SHARED_RACE in execute([*unordered, *load])[1].errors
    assert report.UNINITIALISED in execute([*unordered[1:], *load])[1].errors
    assert report.MISALIGNED in execute([*ROWS_OF_MATRICES, "add.s32 %r3, %r3, 4;", *load])[1].errors


@pytest.mark.parametrize(
    "line", ["ex2.approx.f64 %rd4, %rd4;", "cp.async.ca.shared.global [%r2], [%rd1], 16;", "call foo, ();"]
)
def test_what_is_not_implemented_is_refused(line):
    with pytest.raises(EmulatorError, match="is not implemented"):
        execute([line, "ret;"])


def test_kernels_without_machine_code_are_cached_apart(monkeypatch, tmp_path):
    def scale():
        kernels.launch_scale(torch.ones(32), torch.tensor(2.0))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with emulated_launches() as found:
        scale()
    assert found.launches == {"scale_kernel": 1}
    with compiling.launches(compiling.TARGETS["sm_90"]) as launched:
        scale()
    assert launched.kernels[0].asm["cubin"]


# --- arithmetic

FLOATS = np.random.default_rng(0).standard_normal((3, 20_000)).astype(np.float32)
FLOATS[:, :64] *= np.float32(2.0**-120)


def test_a_fused_multiply_add_is_rounded_once():
    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b, c = FLOATS
    for addend in (c, -a * b, -a * b * np.float32(1 + 2.0**-20)):  # the latter two cancel
        expected = [fmaf(*numbers) for numbers in zip(a.tolist(), b.tolist(), addend.tolist(), strict=True)]
        np.testing.assert_array_equal(arithmetic.fma32(a, b, addend), np.array(expected, np.float32))


def test_bfloat16_is_rounded_as_by_pytorch():
    halfway = np.arange(0x3F800000, 0x3F840000, 0x8000, dtype=np.uint32).view(np.float32)
    for given in (FLOATS[0], halfway, np.array([np.inf, -np.inf, 3.4e38, 0.0, -0.0], np.float32)):
        expected = torch.from_numpy(given).bfloat16()
        made = arithmetic.to_bfloat16(given)
        np.testing.assert_array_equal(made, expected.view(torch.int16).numpy().view(np.uint16))
        np.testing.assert_array_equal(arithmetic.from_bfloat16(made), expected.float().numpy())


def test_approximate_instructions_are_off_by_two_units_in_the_last_place():
    powers = FLOATS[0, 64:]
    ulps = arithmetic.approximate_ex2(powers).view(np.int32) - np.exp2(powers.astype(float)).astype(np.float32).view(
        np.int32
    )
    assert set(ulps.tolist()) == {-2, -1, 0, 1, 2}
    assert arithmetic.approximate_ex2(np.zeros(4, np.float32)).tolist() == [1.0] * 4
    np.testing.assert_array_equal(arithmetic.approximate_div(powers, np.full_like(powers, 0.25)), powers * 4)


def test_integer_division_rounds_towards_zero():
    a, b = (array.ravel() for array in np.meshgrid(np.arange(-9, 10), [-4, -3, -1, 1, 2, 5]))
    np.testing.assert_array_equal(arithmetic.quotient(a, b), np.trunc(a / b))
    np.testing.assert_array_equal(arithmetic.remainder(a, b), np.fmod(a, b))
