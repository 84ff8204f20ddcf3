"""Recompilations and synchronizations over 100 steps in which beta changes, as with accuracy-conditioned KL.

Counts graphs of torch.compile and, on a GPU only, compiled Triton binaries and waits for the device. The first step,
which compiles once, is counted separately.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import (
    OURS,
    liger_linear_loss,
    liger_triton_loss,
    log_softmax_logps,
    one_position_more,
    our_linear_loss,
)
from benchmarks.events import counted
from benchmarks.inputs import Inputs, make_inputs, policy_loss
from benchmarks.shapes import TINY, Case
from expo_kernels import linear_expo_loss

NUM_STEPS = 100
Step = Callable[[Inputs, Tensor], Tensor]  # inputs and a beta [] on the device to the loss


def compiled_eager() -> Step:
    compiled = torch.compile(lambda inputs, beta: policy_loss(log_softmax_logps(inputs), inputs, beta))
    return lambda inputs, beta: compiled(inputs, float(beta))


def ours_compiled() -> Step:
    compiled = torch.compile(linear_expo_loss, fullgraph=True)
    return lambda inputs, beta: our_linear_loss(inputs, beta, compiled).loss


# a function that creates the step; the contender with the same requirements
STEPS: dict[str, tuple[Callable[[], Step], str]] = {
    OURS: (lambda: lambda inputs, beta: our_linear_loss(inputs, beta).loss, OURS),
    f"{OURS} under torch.compile": (ours_compiled, OURS),
    "eager under torch.compile": (compiled_eager, "torch.compile"),
    "Liger fused linear, compiled": (
        lambda: lambda inputs, beta: liger_linear_loss(inputs, compiled=True, beta=float(beta)),
        "Liger fused linear, compiled",
    ),
    "Liger Triton": (
        lambda: lambda inputs, beta: liger_triton_loss(one_position_more(inputs), inputs, float(beta)),
        "Liger Triton",
    ),
}
VARYING = {"beta": (16,), "beta and length": (16, 13, 11, 7)}  # the lengths T of successive steps


@pytest.mark.parametrize("varying", VARYING)
@pytest.mark.parametrize("name", STEPS)
def test_steadiness(name, varying, machine, table, is_tiny, obstacle_of):
    make_step, required = STEPS[name]
    obstacle = obstacle_of(required)
    if obstacle is not None:
        pytest.skip(obstacle)
    torch._dynamo.reset()
    step, inputs = make_step(), make_inputs(Case(TINY), machine.device)
    parts = [first_positions(inputs, length) for length in VARYING[varying]]
    with counted(machine.device) as first:
        step(parts[0], torch.full((), 0.01, device=machine.device)).backward()
    num_steps = 4 if is_tiny else NUM_STEPS
    betas = torch.linspace(0.01, 0.02, num_steps, device=machine.device)
    with counted(machine.device) as later:
        for index in range(num_steps):
            step(parts[index % len(parts)], betas[index]).backward()
    on_gpu = {"binaries": later.binaries, "waits": later.waits} if machine.is_gpu else {}
    table.append(
        {"case": varying, "contender": name, "steps": num_steps, "first_graphs": first.graphs, "graphs": later.graphs}
        | on_gpu
    )


def first_positions(inputs: Inputs, length: int) -> Inputs:
    """The first `length` positions of every sequence."""
    cut = {name: getattr(inputs, name)[:, :length].contiguous() for name in ("ids", "mask", "old_logps", "ref_logps")}
    hidden = inputs.hidden.detach()[:, :length].contiguous().requires_grad_()
    return Inputs(inputs.case, hidden, inputs.weight, advantages=inputs.advantages, **cut)
