"""The memory layout of rows and their gradients, run by Triton's interpreter.

Run through `test_interpreter.py`.
"""

import dataclasses

import pytest
import torch

from expo_kernels import _launch, _narrowing, linear_expo_loss, linear_token_logps
from expo_kernels._triton import launch as kernels
from expo_kernels._triton.rows import scale_kernel
from expo_kernels.objective import Objective
from tests import numerics
from tests.kernels.chunks import make_chunk
from tests.kernels.interpreter.batches import (
    CPU,
    GRAD_ERROR,
    assert_matches,
    expected,
    make_batch,
    nan_like,
    outcome,
    relative_error,
    run_token_level,
    spoil,
    tokens_of,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in.*:RuntimeWarning"
)  # skipped rows hold numbers that are never used


def test_rows_of_a_chunk_are_found_by_order_and_launches_add_up():
    batch = make_batch(B=4, T=5, V=33)
    whole = run_token_level(spoil(batch), Objective())
    spoilt = spoil(batch)
    order = torch.sort((~batch.mask).view(-1).to(torch.int8), stable=True).indices
    flat = spoilt.logits.view(-1, 33)
    tokens, sums = tokens_of(spoilt, Objective()), kernels.make_sums(CPU)
    logps, grad = nan_like(batch.mask, dtype=torch.float32).view(-1), nan_like(flat)
    for first in range(0, 20, 7):
        chunk = flat[order[first : first + 7]]
        rows = make_chunk(chunk, chunk, order=order, first_row=first)
        kernels.launch_row_loss(rows, tokens, sums, logps, return_entropy=True)
        grad[order[first : first + 7]] = chunk
    given = outcome(sums, logps, grad.view(batch.shape), batch.shape)
    assert torch.equal(given.grad, whole.grad)
    assert torch.equal(given.logps, whole.logps)
    assert torch.allclose(given.loss, whole.loss, rtol=1e-6)
    assert torch.equal(given.metrics["tokens"], whole.metrics["tokens"])


@pytest.mark.parametrize("V", [48, 4099])
def test_bfloat16_gradients_over_the_front_of_their_own_rows(V):
    batch = make_batch(V=V)
    truth = expected(batch, Objective())
    padded = torch.full((12, V + 13), float("nan"))[:, :V]
    padded.copy_(spoil(batch).logits.view(-1, V))
    rows_of_bfloat16 = padded.untyped_storage()
    grad = torch.empty(0, dtype=torch.bfloat16).set_(rows_of_bfloat16, 0, (12, V), (2 * padded.stride(0), 1))
    residual = torch.full((12,), float("nan"))
    kernels.launch_row_loss(
        make_chunk(padded, grad, residual=residual),
        tokens_of(spoil(batch), Objective()),
        kernels.make_sums(CPU),
        torch.empty(12),
        return_entropy=False,
    )
    assert relative_error(grad.view(batch.shape), truth.grad) <= GRAD_ERROR[torch.bfloat16]
    # adding the rounding residual of the chosen column restores it exactly
    rows = torch.arange(12)[batch.mask.view(-1)]
    chosen = grad[rows, batch.ids.view(-1)[rows]].double() + residual[rows].double()
    exact = truth.grad.view(-1, V)[rows, batch.ids.view(-1)[rows]]
    assert torch.allclose(chosen, exact, rtol=1e-5, atol=1e-9)


def test_strided_logits_are_read_and_may_be_overwritten():
    batch = make_batch(T=4, V=32)
    truth = expected(batch, Objective())
    memory = torch.full((4, 6, 48), float("nan"))
    view = memory[:, 1:5, :32]
    view.copy_(spoil(batch).logits)
    given = run_token_level(dataclasses.replace(spoil(batch), logits=view), Objective(), grad=view)
    assert_matches(given, truth)
    assert bool(torch.isnan(memory[:, [0, 5]]).all())


def test_rows_beyond_2_to_the_31_elements_are_found(tmp_path):
    batch = make_batch(B=4, T=5, V=32)
    truth = expected(batch, Objective())
    stride = 2**27 + 16  # the last of 20 rows begins at 2.55e9; the file has holes where nothing is written
    memory = torch.from_file(str(tmp_path / "logits"), shared=True, size=20 * stride, dtype=torch.float32)
    view = memory.as_strided((4, 5, 32), (5 * stride, stride, 1))
    assert view[-1, -1].storage_offset() > 2**31
    view.copy_(spoil(batch).logits)
    given = run_token_level(dataclasses.replace(spoil(batch), logits=view), Objective(), grad=view)
    assert_matches(given, truth)


def test_values_beyond_2_to_the_31_are_scaled():
    # one of many programs is run; it reads only the first values, whatever num_values is
    tile = _launch.flat_tile()
    values, num_values = torch.ones(tile.block), 2**31 + 16
    scale_kernel[(1,)](values, torch.tensor(3.0), num_values // 16, ALIGNMENT=16, BLOCK=tile.block)
    assert values.eq(3.0).all()


def narrow_gradients(loss_of, batch, **options):
    """Gradients of bfloat16 hidden states and weight, for a third of the loss."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight))
    (loss_of(hidden, weight) / 3).backward(**options)
    return hidden.grad, weight.grad


def test_a_weight_gradient_that_is_narrowed_in_place_is_the_same_kept_or_compiled():
    batch = numerics.make_batch(2, 5, 16, 257, dtype=torch.bfloat16)
    assert len(_narrowing.part_shapes(batch.weight)) == 2

    def loss_of(hidden, weight):
        inputs = batch.loss_inputs(Objective())
        return linear_expo_loss(hidden, weight, batch.completion_ids, batch.completion_mask, **inputs).loss

    made = narrow_gradients(loss_of, batch)
    kept = narrow_gradients(loss_of, batch, retain_graph=True)
    compiled = narrow_gradients(torch.compile(loss_of, fullgraph=True, backend="aot_eager"), batch)
    for one, same, another in zip(made, kept, compiled, strict=True):
        assert torch.equal(one, same)
        assert torch.equal(one, another)
    # half of the rows in float32, rounded up to a multiple of 64
    assert made[1].untyped_storage().nbytes() == 192 * 16 * 4


def test_the_backward_pass_of_log_probs_narrows_a_weight_gradient_in_place():
    batch = numerics.make_batch(2, 5, 16, 257, dtype=torch.bfloat16)

    def sum_of_logps(hidden, weight):
        return linear_token_logps(hidden, weight, batch.completion_ids, mask=batch.completion_mask).sum()

    def exact(hidden, weight):
        logps = torch.log_softmax(hidden @ weight.T, dim=-1)
        ids = batch.completion_ids.clamp(0, 256).unsqueeze(-1)
        return (logps.gather(-1, ids).squeeze(-1) * batch.completion_mask).sum()

    made = narrow_gradients(sum_of_logps, batch)
    wide = dataclasses.replace(batch, hidden=batch.hidden.double(), weight=batch.weight.double())
    for gradient, truth in zip(made, narrow_gradients(exact, wide), strict=True):
        assert relative_error(gradient, truth) <= GRAD_ERROR[torch.bfloat16]
    assert made[1].untyped_storage().nbytes() == 192 * 16 * 4
