"""`python -m expo_kernels`: report versions and devices, and check every public op against its float64 reference.

The exit code is 1 if an op exceeds its bound. The bounds are those that the documentation states: log-probs in nats,
the rest relative.
"""

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from expo_kernels import (
    CurriculumTable,
    Objective,
    akl_beta,
    expo_loss,
    expo_loss_from_logps,
    group_advantages,
    linear_expo_loss,
    linear_token_logps,
    reference,
    token_logps,
)

B, T, H, V, GROUP_SIZE = 4, 33, 64, 1003, 2
LOGP_BOUND = 2e-5  # nats
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
CHUNK_MB = 0.1  # several chunks even at this size

Check = tuple[str, float, float]  # op, error, bound


def checks(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    """Run each op on random inputs of `dtype`; yield its name, its error against float64 and the bound."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    hidden, weight = normal(B, T, H).to(dtype), (normal(V, H) / H**0.5).to(dtype)
    ids = torch.randint(0, V, (B, T), generator=generator).to(device)
    mask = (torch.rand(B, T, generator=generator) < 0.8).to(device)
    rewards = torch.tensor([1.0, 0.0] * (B // 2), device=device)
    true_hidden, true_weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    true_logps = reference.token_logps(true_hidden @ true_weight.T, ids, 1.0)
    others = [true_logps.detach().float() + 0.3 * normal(B, T) for _ in range(2)]
    true_advantages = reference.group_advantages(rewards.double(), GROUP_SIZE, "group", 1e-6)
    truth = reference.expo_loss_from_logps(
        true_logps,
        mask,
        advantages=true_advantages,
        old_logps=others[0].double(),
        ref_logps=others[1].double(),
        rollout_logps=None,
        beta=torch.tensor(0.02, dtype=torch.float64, device=device),
        objective=Objective(),
    )
    true_grads = torch.autograd.grad(truth, (true_hidden, true_weight), retain_graph=True)

    logits = hidden.float() @ weight.float().T
    yield "token_logps", _largest(token_logps(logits, ids) - true_logps), LOGP_BOUND
    logps = linear_token_logps(hidden, weight, ids, logits_budget_mb=CHUNK_MB)
    yield "linear_token_logps", _largest(logps - true_logps), LOGP_BOUND
    yield "group_advantages", _relative(group_advantages(rewards, GROUP_SIZE), true_advantages), 1e-6

    inputs: dict[str, Any] = {
        "old_logps": others[0],
        "ref_logps": others[1],
        "rewards": rewards,
        "group_size": GROUP_SIZE,
    }
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]

    def against(loss: Tensor, tensors: list[Tensor], true_tensors: tuple[Tensor, ...]) -> float:
        grads = torch.autograd.grad(loss, tensors)
        return max(_relative(grad, true) for grad, true in zip(grads, true_tensors, strict=True))

    made = linear_expo_loss(leaves[0], leaves[1], ids, mask, logits_budget_mb=CHUNK_MB, **inputs)
    yield "linear_expo_loss, loss", _relative(made.loss, truth), 1e-4
    yield "linear_expo_loss, gradients", against(made.loss, leaves, true_grads), GRADIENT_BOUND[dtype]

    leaf = logits.requires_grad_()
    made = expo_loss(leaf, ids, mask, **inputs)
    (true_grad,) = torch.autograd.grad(made.loss, leaf)
    true_hidden_grad = true_grad.double() @ weight.double()
    yield "expo_loss, gradient", _relative(true_hidden_grad, true_grads[0]), GRADIENT_BOUND[torch.float32]

    leaf = true_logps.detach().float().requires_grad_()
    made = expo_loss_from_logps(leaf, mask, **inputs)
    (true_grad,) = torch.autograd.grad(truth, true_logps)
    yield "expo_loss_from_logps, gradient", against(made.loss, [leaf], (true_grad,)), GRADIENT_BOUND[torch.float32]


def table_checks(device: torch.device) -> Iterator[Check]:
    """Run the ops that take no logits; yield the same as `checks`."""
    accuracies = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    true_beta = 0.02 * reference.akl_scale(accuracies.double().mean(), "tanh")
    yield "akl_beta", _relative(akl_beta(accuracies), true_beta), 1e-6
    table = CurriculumTable(64, device=device)
    rates = torch.linspace(0, 1, 64, device=device)
    table.update(torch.arange(64, device=device), rates)
    smoothed = reference.smoothed_pass_rates(torch.full_like(rates, 0.5).double(), rates.double(), 0.9)
    true_weights = reference.log_curriculum_weights(smoothed, 0.5, 0.35).exp()
    yield "CurriculumTable, weights", _relative(table.weights, true_weights), 1e-6
    counted = CurriculumTable(64, estimate="counted", device=device)
    for visit_rates in (rates, rates.flip(0), rates):
        counted.update(torch.arange(64, device=device), visit_rates)
    true_means = (2 * rates.double() + rates.double().flip(0)) / 3
    yield "CurriculumTable, counted pass rates", _relative(counted.pass_rates, true_means), 1e-6
    yield "CurriculumTable, questions drawn twice", float(64 - torch.unique(table.sample(64)).numel()), 0.0


def all_checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """Run every check on a device; yield the name of the inputs' dtype and the check."""
    for check in table_checks(device):
        yield "float32", check
    for dtype in GRADIENT_BOUND:
        for check in checks(dtype, device):
            yield str(dtype).removeprefix("torch."), check


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


def _relative(tensor: Tensor, truth: Tensor) -> float:
    return float((tensor.double() - truth.double()).detach().norm() / truth.detach().double().norm())


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _verdicts(device: torch.device) -> int:
    """Print a line for each check; return how many exceed their bound."""
    num_off = 0
    for name, (op, error, bound) in all_checks(device):
        # NaN <= bound is False, so a NaN fails the check
        is_right = error <= bound
        num_off += not is_right
        print(f"  {'ok ' if is_right else 'OFF'}  {op}, {name}: error {error:.1e}, bound {bound:.0e}")
    return num_off


def main() -> int:
    """Print the report; return 1 if an op exceeds its bound, else 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    packages = "torch " + torch.__version__ + "".join(f", {name} {_installed(name)}" for name in ("triton", "expo-rl"))
    print(f"Python {platform.python_version()}, {packages}; {platform.system()}")
    print(f"device {device.type} ({device_name}), {torch.get_num_threads()} CPU threads")
    num_off = _verdicts(device)
    print(
        "every op agrees with its reference" if num_off == 0 else f"{num_off} checks are off: please report this text"
    )
    return int(num_off > 0)


if __name__ == "__main__":
    sys.exit(main())
