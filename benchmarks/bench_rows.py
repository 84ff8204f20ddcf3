"""The loss on logits that are ready, with its gradient: what the row kernels reach of the device's bandwidth."""

from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.contenders import OURS, liger_triton_loss, our_loss_on
from benchmarks.floors import device_copy
from benchmarks.inputs import Inputs, make_inputs, policy_loss
from benchmarks.machine import Machine, RoundRobin, whole
from benchmarks.shapes import TINY, Case, Shape, dtype_for
from benchmarks.truth import relative_error

NUM_TOKENS = {"cpu": 256, "cuda": 4096}
VOCAB_SIZES = {"cpu": 32_768, "cuda": 151_936}
GRADIENT_BOUND = {"float32": 1e-4, "bfloat16": 2e-2}  # relative Frobenius, from eager float64 on the same logits


def eager(logits, inputs):
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logps = wide.log_softmax(-1).gather(-1, inputs.ids.unsqueeze(-1)).squeeze(-1)
    return policy_loss(logps, inputs)


LOSSES = {
    OURS: our_loss_on,
    "eager log_softmax": eager,
    "Liger Triton": liger_triton_loss,
}


def checked(name: str, made: torch.Tensor, inputs: Inputs) -> tuple[Callable[[], None], float]:
    """What one contender runs in a round, and the error of its gradient."""
    extra_rows = made[:, :1] if name == "Liger Triton" else made[:, :0]  # it takes a position more, and drops it
    logits = torch.cat([made, extra_rows], dim=1)
    rows = logits.clone().requires_grad_()
    gradient = torch.autograd.grad(LOSSES[name](rows, inputs), rows)[0][:, : made.shape[1]]
    wide = made.double().requires_grad_()
    (truth,) = torch.autograd.grad(eager(wide, inputs), wide)
    error = relative_error(gradient, truth)
    assert error <= GRADIENT_BOUND[inputs.case.dtype], name

    def run() -> None:
        # on the same rows again, which by now hold a gradient: other numbers, the same work
        loss = LOSSES[name](logits.requires_grad_(), inputs)
        loss.backward()
        logits.grad = None

    return run, error


def test_rows(machine: Machine, table, rounds, is_tiny):
    kind = machine.device.type
    shape = Shape("rows", 8, NUM_TOKENS[kind] // 8, 64, VOCAB_SIZES[kind])
    inputs = make_inputs(Case(TINY if is_tiny else shape, dtype_for(kind)), machine.device)
    made = (inputs.hidden @ inputs.weight.T).detach()
    found = {name: checked(name, made, inputs) for name in LOSSES if machine.is_gpu or name != "Liger Triton"}
    runs = {name: whole(machine, run) for name, (run, _) in found.items()}
    num_bytes = made.numel() * made.element_size()
    for name, times in rounds(RoundRobin(machine, runs, device_copy(made))).items():
        named = {"case": "rows", "settings": asdict(inputs.case), "contender": name, "num_bytes": num_bytes}
        table.append({**named, **times, "errors": {"gradient": found[name][1]}})
