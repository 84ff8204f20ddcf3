"""The loss on existing logits, with its gradient: the memory bandwidth that the row kernels reach."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from benchmarks.contenders import OURS, contender, liger_triton_loss, our_inplace_loss_on, our_loss_on
from benchmarks.floors import device_copy
from benchmarks.inputs import Inputs, make_inputs, policy_loss
from benchmarks.machine import Machine, RoundRobin, total_time
from benchmarks.row_launch import GRADIENT_BOUND as LAUNCH_BOUND
from benchmarks.row_launch import gradient_of, moved_bytes, row_loss
from benchmarks.shapes import TINY, Case, Shape, dtype_for
from benchmarks.truth import relative_error

NUM_TOKENS = {"cpu": 256, "cuda": 4096}
VOCAB_SIZES = {"cpu": 32_768, "cuda": 151_936}
LAUNCHES = {
    "float32 in place": (torch.float32, torch.float32),
    "bfloat16 in place": (torch.bfloat16, torch.bfloat16),
    "float32 to bfloat16": (torch.float32, torch.bfloat16),
}
LAUNCH_ROWS = 1024
GRADIENT_BOUND = {"float32": 1e-4, "bfloat16": 2e-2}  # relative Frobenius norm of the error against eager float64


def eager(logits, inputs):
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logps = wide.log_softmax(-1).gather(-1, inputs.ids.unsqueeze(-1)).squeeze(-1)
    return policy_loss(logps, inputs)


LOSSES = {
    OURS: our_loss_on,
    f"{OURS}, in place": our_inplace_loss_on,
    "eager log_softmax": eager,
    "Liger Triton": liger_triton_loss,
}


def obstacle(name: str, machine: Machine) -> str | None:
    """The reason why a contender cannot run."""
    return contender(name).obstacle(machine.device) if name == "Liger Triton" else None


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


def dtypes_of(device: str, *, tiny: bool) -> list[str]:
    """The dtypes of existing logits: both on a GPU."""
    return ["bfloat16", "float32"] if device == "cuda" and not tiny else [dtype_for(device)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        options = metafunc.config.getoption
        metafunc.parametrize("dtype", dtypes_of(options("--device"), tiny=options("--tiny")))


def test_rows(dtype, machine: Machine, table, rounds, is_tiny):
    kind = machine.device.type
    shape = Shape("rows", 8, NUM_TOKENS[kind] // 8, 64, VOCAB_SIZES[kind])
    inputs = make_inputs(Case(TINY if is_tiny else shape, dtype), machine.device)
    logits = (inputs.hidden @ inputs.weight.T).detach()
    contenders, notes = {}, {}
    for name in LOSSES:
        notes[name] = obstacle(name, machine)
        if notes[name] is None:
            contenders[name] = checked(name, logits, inputs)
    runs = {name: total_time(machine, run) for name, (run, _) in contenders.items()}
    num_bytes = logits.numel() * logits.element_size()
    case = "rows" if kind == "cpu" else f"rows, {dtype}"
    for name, times in rounds(RoundRobin(machine, runs, device_copy(logits))).items():
        described = {"case": case, "settings": asdict(inputs.case), "contender": name, "num_bytes": num_bytes}
        table.append({**described, **times, "errors": {"gradient": contenders[name][1]}})
    if machine.is_gpu:
        table += [{"case": case, "contender": name, "note": note} for name, note in notes.items() if note is not None]


@pytest.mark.parametrize("label", LAUNCHES)
def test_launch(label, machine: Machine, table, rounds, is_tiny):
    """One launch of the loss kernel, as the linear loss makes it for each chunk."""
    if not machine.is_gpu:
        pytest.skip("kernels run on GPUs only")
    dtype, grad_dtype = LAUNCHES[label]
    num_rows, vocab_size = (8, 512) if is_tiny else (LAUNCH_ROWS, VOCAB_SIZES["cuda"])
    memory = torch.randn(num_rows, vocab_size, device=machine.device).to(dtype)
    truth = gradient_of(memory[:8])
    run, gradient = row_loss(memory, grad_dtype)
    run()
    error = relative_error(gradient[:8], truth)
    assert error <= LAUNCH_BOUND[grad_dtype]
    robin = RoundRobin(machine, {OURS: total_time(machine, run)}, device_copy(memory))
    sizes = {"num_bytes": memory.numel() * memory.element_size(), "moved_bytes": moved_bytes(memory, grad_dtype)}
    described = {"case": f"one launch, {label}", "contender": OURS, **sizes}
    table.append({**described, **rounds(robin)[OURS], "errors": {"gradient": error}})
