"""In the compiled code of gradients that overwrite their logits, all warps read the chosen logit before any writes."""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)


from expo_kernels import Objective
from expo_kernels._inputs import Tokens
from expo_kernels._triton import launch as kernels
from tests.kernels import compiling
from tests.kernels.chunks import make_chunk

pytestmark = pytest.mark.medium  # compiles kernels

N, V = 4, 4096


def make_tokens(advantages_are):
    objective = Objective()
    return Tokens(
        ids=torch.zeros(N, dtype=torch.int64),
        mask=torch.ones(N, dtype=torch.bool),
        objective=objective,
        num_sequences=2,
        tokens_per_sequence=N // 2,
        advantages=torch.zeros(N),
        advantages_are=advantages_are,
        beta=torch.zeros(()),
        normalizer=torch.ones(()),
    )


def run_loss(logits, grad, advantages_are):
    sums = kernels.make_sums(torch.device("cpu"))
    chunk, tokens = make_chunk(logits, grad), make_tokens(advantages_are)
    kernels.launch_row_loss(chunk, tokens, sums, torch.zeros(N), return_entropy=False)


def run_grad_logits(logits, grad, _):
    out = torch.zeros(N)
    chunk = make_chunk(logits, grad)
    kernels.launch_grad_logits(chunk, make_tokens("token"), row_max=out, sum_exp=out, grad_logps=out)


def has_barrier_before_overwriting(launch, logits, grad, advantages_are, target):
    """Whether a barrier is between the last scalar load and the first wide store, which is the gradient's."""
    with compiling.launches(compiling.TARGETS[target]) as launched:
        launch(logits, grad, advantages_are)
    (kernel,) = launched.kernels
    before, store, _ = re.split(r"(st\.global\.v\d)", kernel.asm["ptx"], maxsplit=1)
    assert store
    *_, after_the_chosen_logit = re.split(r"ld\.global\.b(?:16|32)", before)
    return "bar.sync" in after_the_chosen_logit


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("launch", "advantages_are"),
    [(run_loss, "sequence"), (run_loss, "token"), (run_loss, "rewards"), (run_grad_logits, "")],
)
def test_no_warp_overwrites_the_chosen_logit_before_all_have_read_it(launch, advantages_are, dtype, target):
    logits = torch.zeros(N, V, dtype=dtype)
    assert has_barrier_before_overwriting(launch, logits, logits, advantages_are, target)


def test_a_gradient_in_its_own_memory_needs_no_barrier():
    logits = torch.zeros(N, V)
    assert not has_barrier_before_overwriting(run_grad_logits, logits, torch.zeros(N, V), "", "sm_90")
