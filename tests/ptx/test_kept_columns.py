"""The columns that a gradient tolerance leaves out, chosen by compiled kernels, as PTX, against float64."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from expo_kernels._triton.columns import launch_column_squares
from tests.kernels.interpreter.check_kept_columns import check
from tests.kernels.test_gradient_tolerance import peaked_batch
from tests.ptx.checks import IN_EVERY_ORDER, IN_TWO_ORDERS, no_errors

pytestmark = pytest.mark.medium  # compiles and emulates kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 17), (40, 1501), (130, 264)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_column_squares_in_every_order(num_rows, vocab_size, dtype):
    wider = torch.randn(num_rows, vocab_size + 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads, unit = wider[:, :vocab_size], torch.tensor(0.37)
    with no_errors(schedules=IN_EVERY_ORDER) as report:
        squares = launch_column_squares(grads, unit)
    assert report.launches["column_squares_kernel"] == 1
    torch.testing.assert_close(squares.double(), (grads.double() / 0.37).square().sum(0), rtol=1e-5, atol=1e-9)


def test_losses_in_several_chunks():
    dtypes = (torch.bfloat16, torch.bfloat16)
    with no_errors(schedules=IN_TWO_ORDERS) as report:
        out, _ = check(peaked_batch(V=1500, dtype=torch.float32), 3e-2, dtypes=dtypes, rows=20)
    assert report.launches["column_squares_kernel"] > 1
    assert 0 < out.metrics["kept_columns"] < 0.5
