"""The loss on existing logits, with its gradient: the memory bandwidth that the row kernels reach."""

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
GRADIENT_BOUND = {"float32": 1e-4, "bfloat16": 2e-2}  # relative Frobenius norm of the error against eager float64


def eager(logits, inputs):
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logps = wide.log_softmax(-1).gather(-1, inputs.ids.unsqueeze(-1)).squeeze(-1)
    return policy_loss(logps, inputs)


LOSSES = {
    OURS: our_loss_on,
    "eager log_softmax": eager,
    "Liger Triton": liger_triton_loss,
}


def checked(name: str, original: torch.Tensor, inputs: Inputs) -> tuple[Callable[[], None], float]:
    """The function that one contender runs in a round, and the error of its gradient."""
    # Liger's function takes one more position and drops it
    extra_rows = original[:, :1] if name == "Liger Triton" else original[:, :0]
    logits = torch.cat([original, extra_rows], dim=1)
    rows = logits.clone().requires_grad_()
    gradient = torch.autograd.grad(LOSSES[name](rows, inputs), rows)[0][:, : original.shape[1]]
    wide = original.double().requires_grad_()
    (truth,) = torch.autograd.grad(eager(wide, inputs), wide)
    error = relative_error(gradient, truth)
    assert error <= GRADIENT_BOUND[inputs.case.dtype], name

    def run() -> None:
        # later rounds reuse the buffer, which then contains a gradient: other values, the same work
        loss = LOSSES[name](logits.requires_grad_(), inputs)
        loss.backward()
        logits.grad = None

    return run, error


def test_rows(machine: Machine, table, rounds, is_tiny):
    kind = machine.device.type
    shape = Shape("rows", 8, NUM_TOKENS[kind] // 8, 64, VOCAB_SIZES[kind])
    inputs = make_inputs(Case(TINY if is_tiny else shape, dtype_for(kind)), machine.device)
    logits = (inputs.hidden @ inputs.weight.T).detach()
    contenders = {name: checked(name, logits, inputs) for name in LOSSES if machine.is_gpu or name != "Liger Triton"}
    runs = {name: whole(machine, run) for name, (run, _) in contenders.items()}
    num_bytes = logits.numel() * logits.element_size()
    for name, times in rounds(RoundRobin(machine, runs, device_copy(logits))).items():
        described = {"case": "rows", "settings": asdict(inputs.case), "contender": name, "num_bytes": num_bytes}
        table.append({**described, **times, "errors": {"gradient": contenders[name][1]}})
