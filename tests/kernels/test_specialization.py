"""Values that change from step to step cause no compilation: Triton's compile key of every launch stays the same."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

import triton
import triton.language as tl

from expo_kernels._inputs import Tokens
from expo_kernels._triton import launch as kernels
from expo_kernels._triton import launch_exponentials as exponentials
from expo_kernels.objective import Objective
from tests.kernels import compiling
from tests.kernels.chunks import make_chunk, make_exponential_chunk

pytestmark = pytest.mark.medium  # compiles kernels

CPU = torch.device("cpu")
TARGET = compiling.TARGETS["sm_90"]
VOCAB_SIZE = 64


def unaligned(tensor):
    """The same numbers at an address that is not a multiple of 16 bytes."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    moved.copy_(tensor)
    assert moved.data_ptr() % 16
    return moved


def run_step(objective, num_sequences, length, group_size, num_rows, first_row, place):
    positions = num_sequences * length
    tokens = Tokens(
        ids=place(torch.zeros(positions, dtype=torch.int64)),
        mask=torch.ones(positions, dtype=torch.bool),
        objective=objective,
        num_sequences=num_sequences,
        tokens_per_sequence=length,
        advantages=place(torch.zeros(num_sequences)),
        advantages_are="rewards",
        group_size=group_size,
        old_logps=place(torch.zeros(positions)),
        ref_logps=place(torch.zeros(positions)),
        lengths=place(torch.zeros(num_sequences, dtype=torch.int64)),
        beta=place(torch.zeros(1)),
        normalizer=place(torch.zeros(1)),
        entropy_bonus=place(torch.zeros(1)),
    )
    order, out = place(torch.zeros(positions, dtype=torch.int64)), place(torch.zeros(positions))
    logits = torch.zeros(num_rows, VOCAB_SIZE)
    chunk = make_chunk(logits, logits, order=order, first_row=first_row, residual=place(torch.zeros(num_rows)))
    sums = kernels.make_sums(CPU)
    kernels.launch_row_loss(chunk, tokens, sums, out, return_entropy=False)
    kernels.launch_logps(chunk, tokens, out, entropies=out, row_max=out, sum_exp=out)
    kernels.launch_grad_logits(chunk, tokens, row_max=out, sum_exp=out, grad_logps=out)
    kernels.launch_sequence_loss(tokens, sums, out, out, entropies=out, grad_entropies=out)
    rows = {"row_max": out, "sum_exp": out, "grad_logps": out}
    kept = make_exponential_chunk(VOCAB_SIZE, num_rows, order=order)
    exponentials.launch_exponentials(kept, tokens, has_entropy=True, stores_logs=False)
    exponentials.launch_combine_tiles(kept, tokens, out, entropies=out, row_max=out, sum_exp=out)
    exponentials.launch_exponential_grads(kept, tokens, **rows)
    exponentials.launch_log_grads(kept, tokens, **rows, entropies=out, grad_entropies=out)


def test_a_thousand_different_steps_have_one_compile_key_each():
    objectives = [
        Objective(temperature=temperature, clip_low=clip_low, clip_high=0.5 - clip_low, log_ratio_clamp=10 + clip_low)
        for temperature in (0.6, 1.0, 16.0)
        for clip_low in (0.1, 0.2)
    ]
    sizes = (1, 2, 3, 16, 17, 48)  # Triton would specialise 1 and multiples of 16
    steps = itertools.product(
        objectives, sizes, (1, 16, 33), (1, 2, 16, 64), sizes, (0, 1, 16), (torch.clone, unaligned)
    )
    with compiling.launches(TARGET, compiles=False) as launched:
        # every 7th of all combinations: about 2,200 steps, which contain each value of each setting
        for step in itertools.islice(steps, 0, None, 7):
            run_step(*step)
    assert len(launched.keys) > 8 * 1000
    assert len(set(launched.keys)) == 8


def test_a_specialised_size_changes_the_key():
    @triton.jit
    def careless_kernel(out_ptr, num_rows):
        tl.store(out_ptr, num_rows)

    with compiling.launches(TARGET, compiles=False) as launched:
        for num_rows in (1, 2, 16):
            careless_kernel[(1,)](torch.zeros(4), num_rows)
    assert len(set(launched.keys)) == 3


def test_different_switches_have_different_keys():
    with compiling.launches(TARGET, compiles=False) as launched:
        for objective in (Objective(), Objective(kl="k2"), Objective(surrogate="sapo"), Objective(dual_clip=3.0)):
            run_step(objective, 2, 3, 2, 5, 0, torch.clone)
    assert len({key for name, key in launched.keys if name == "row_loss_kernel"}) == 4
