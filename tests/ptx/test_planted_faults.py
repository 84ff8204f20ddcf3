"""The emulator reports faults that are planted into copies of the kernels, and nothing in an unchanged copy."""

import contextlib
import itertools
import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from expo_kernels import CurriculumTable, linear_token_logps
from tests.kernels.interpreter.batches import SEQUENCE_LEVEL
from tests.ptx import emulator
from tests.ptx.checks import IN_TWO_ORDERS, check_linear_loss, check_logps, check_loss, kernels_as_ptx
from tests.ptx.edited_kernels import Edit, edited_kernels
from tests.ptx.launch import TranslatedKernel
from tests.ptx.report import ORDER_DEPENDENT, OUT_OF_BOUNDS, RACE, SAME_STORE

pytestmark = pytest.mark.medium  # compiles and emulates kernels


def update_a_small_table():
    generator = torch.Generator().manual_seed(1)
    ids, rates = torch.randint(0, 5, (600,), generator=generator), torch.rand(600, generator=generator)
    CurriculumTable(5).update(ids, rates)


def with_exponentials(check):
    with mock.patch.dict(os.environ, {"EXPO_KERNELS_EXPONENTIALS": "1"}):
        check()


def differentiate_rising_rows():
    """Log-probs of rows whose second tile exceeds the first one by so much that exponentials are scaled."""
    hidden, weight = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((4, 16), (5000, 16))
    )
    bias = torch.where(torch.arange(5000) == 4500, 100.0, 0.0)
    ids = 500 + 1000 * torch.arange(4)  # of several warps
    logps = linear_token_logps(hidden.bfloat16().requires_grad_(), weight.bfloat16(), ids, bias=bias)
    logps.sum().backward()


CASES = {
    "loss": lambda: check_loss(V=1000, advantages="token"),
    "in place": lambda: check_loss(T=2, V=4112, advantages="token", inplace=True),
    "in place, bfloat16": lambda: check_loss(T=2, V=9000, dtype=torch.bfloat16, advantages="sequence", inplace=True),
    "in place, small": lambda: check_loss(V=1000, advantages="token", inplace=True),
    "float32 head": lambda: check_linear_loss(V=4112, T=2, dtype=torch.float32, advantages="sequence"),
    "bfloat16 head": lambda: check_linear_loss(V=33_000, T=2),
    "exponentials": lambda: with_exponentials(lambda: check_linear_loss(V=5000, T=2)),
    "rising exponentials": lambda: with_exponentials(differentiate_rising_rows),
    "logs of exponentials": lambda: with_exponentials(lambda: check_linear_loss(V=5000, T=2, entropy_bonus=0.2)),
    "gradient": lambda: check_logps(V=1000, dtype=torch.float32),
    "sequences": lambda: check_loss(objective=SEQUENCE_LEVEL["gspo"]),
    "scale": lambda: check_loss(V=130, loss_scale=3.0),
    "curriculum": update_a_small_table,
}
# name -> what is edited, the cases that show it, and the kinds of findings that must be among those reported
PLANTED = {
    "no barrier before gradients overwrite the chosen logit": (
        Edit("no warp may overwrite it before all have read it", "tl.debug_barrier()", "pass"),
        ["in place", "in place, bfloat16", "float32 head"],
        {RACE},
    ),
    "no barrier before narrow gradients overwrite float32 rows": (
        Edit("overwrite the front of the same row", "tl.debug_barrier()", "pass"),
        ["bfloat16 head"],
        {RACE, ORDER_DEPENDENT},
    ),
    "no barrier before the chosen column is stored again": (
        Edit("def write_grad_logits", "tl.debug_barrier()  # another", "pass  # another"),
        ["loss", "in place"],
        {RACE},
    ),
    "a gradient is written one column beyond its row": (
        Edit("def write_grad_logits", "    temperature =", "    vocab_size += 1\n    temperature ="),
        ["loss", "gradient"],
        {OUT_OF_BOUNDS, RACE},
    ),
    "a row is read one column beyond its end": (
        Edit("def read_row", "    scale =", "    vocab_size += 1\n    scale ="),
        ["loss"],
        {OUT_OF_BOUNDS},
    ),
    "no barrier before two columns of scaled exponentials are set to 0": (
        Edit("def exponential_grads_kernel", "tl.debug_barrier()", "pass"),
        ["rising exponentials"],
        {RACE},
    ),
    "no barrier before two columns of gradients are set to 0": (
        Edit("def log_grads_kernel", "tl.debug_barrier()", "pass"),
        ["logs of exponentials"],
        {RACE},
    ),
    "exponentials are written beyond their row": (
        Edit("def exponentials_kernel", "in_row = columns < num_columns", "in_row = columns < 1 + num_columns"),
        ["exponentials"],
        {OUT_OF_BOUNDS},
    ),
    "the ids of other rows are read": (
        Edit("tl.load(ids_ptr + position, mask=keep, other=-1)", "position", "position + 12"),
        ["loss"],
        {OUT_OF_BOUNDS},
    ),
    "two programs process the same rows": (
        Edit("def row_loss_kernel", "range(tl.program_id(0)", "range(0"),
        ["loss", "in place"],
        {RACE},
    ),
    "the counter of finished programs has no memory order": (
        Edit("tl.atomic_add(counter_ptr, 1)", "counter_ptr, 1", 'counter_ptr, 1, sem="relaxed"'),
        ["loss", "sequences"],
        {RACE},
    ),
    "a sequence writes the first position of the next one": (
        Edit("in_range = within < num_positions", "<", "<="),
        ["sequences"],
        {RACE, OUT_OF_BOUNDS},
    ),
    "one value too many is scaled": (
        Edit("def scale_kernel", "    factor =", "    num_values += 1\n    factor ="),
        ["scale"],
        {OUT_OF_BOUNDS},
    ),
    "every pair of a question updates it": (
        Edit("& (question != before)", "& (question != before)", ""),
        ["curriculum"],
        {RACE, SAME_STORE},
    ),
}


def findings(case, *, results_matter):
    """What is reported while a case runs; a fault may also make its results wrong, which is not what is tested."""
    may_fail = contextlib.nullcontext() if results_matter else contextlib.suppress(AssertionError)
    with kernels_as_ptx(schedules=IN_TWO_ORDERS) as report, may_fail:
        CASES[case]()
    assert report.launches
    return report


@pytest.mark.parametrize(
    ("fault", "case"), [(fault, case) for fault, (_, cases, _) in PLANTED.items() for case in cases]
)
def test_a_planted_fault_is_reported(tmp_path, fault, case):
    edit, _, kinds = PLANTED[fault]
    with edited_kernels(tmp_path, edit):
        assert kinds <= findings(case, results_matter=False).errors


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_reported_in_an_unchanged_copy(tmp_path, case):
    with edited_kernels(tmp_path):
        report = findings(case, results_matter=True)
    assert not report.errors, report.lines()


def test_a_kernel_without_one_of_its_barriers_has_a_race():
    barrier, num_barriers, reported = "bar.sync \t0;", 0, 0

    def translated_without(missing):
        def translated(kernel):
            nonlocal num_barriers
            ptx = kernel.asm["ptx"]
            if kernel.metadata.name == "row_loss_kernel":
                parts = ptx.split(barrier)
                num_barriers = len(parts) - 1
                ptx = barrier.join(parts[: missing + 1]) + barrier.join(parts[missing + 1 :])
            return TranslatedKernel(ptx, kernel.metadata.num_warps, kernel.metadata.shared)

        return translated

    for missing in itertools.count():
        with mock.patch.object(emulator, "_translated", translated_without(missing)):
            reported += bool(findings("in place, small", results_matter=False).errors)
        if missing + 1 == num_barriers:
            break
    assert num_barriers > 8
    # Triton places a few barriers that are redundant: the first one, and those around the atomic of one thread
    assert reported >= num_barriers - 5, f"{reported} of {num_barriers}"
