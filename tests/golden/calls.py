"""One call of each public function; each returns all results and gradients by name."""

from typing import Any

import torch
from torch import Tensor

from expo_kernels import (
    CurriculumTable,
    Objective,
    expo_loss,
    expo_loss_from_logps,
    linear_expo_loss,
    linear_token_logps,
    token_logps,
)
from tests.golden.inputs import Batch, packed


def given(batch: Batch, objective: Objective) -> dict[str, Any]:
    """The arguments of a typical call."""
    rollout = {"rollout_logps": batch.rollout_logps} if objective.rollout_correction else {}
    named = {"advantages": batch.advantages, "old_logps": batch.old_logps, "ref_logps": batch.ref_logps}
    return {**named, "beta": 0.2, "objective": objective, **rollout}


def made(output: Any, scale: float = 1.0, **leaves: Tensor) -> dict[str, Tensor]:
    """All results of a loss call: loss, metrics, log-probs, and the gradient of scale * loss for each leaf."""
    grads = torch.autograd.grad(output.loss, list(leaves.values()), torch.full_like(output.loss, scale))
    named = {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"loss": output.loss, **output.metrics, "logps": output.logps, **named}


def leaf(tensor: Tensor) -> Tensor:
    """A copy that requires a gradient."""
    return tensor.clone().requires_grad_()


def from_logps(batch: Batch, **options: Any) -> dict[str, Tensor]:
    """The loss from log-probs."""
    logps = leaf(batch.logps)
    return made(expo_loss_from_logps(logps, batch.mask, **options), logps=logps)


def from_logits(batch: Batch, *, scale: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """The loss from logits."""
    logits = leaf(batch.logits)
    return made(expo_loss(logits, batch.ids, batch.mask, **options), scale, logits=logits)


def in_place(batch: Batch, **options: Any) -> dict[str, Tensor]:
    """The loss from logits, which their gradient overwrites."""
    source = leaf(batch.logits)
    logits = source.clone()
    output = expo_loss(logits, batch.ids, batch.mask, inplace=True, **options)
    return {**made(output, 0.75, logits=source), "overwritten logits": logits}


def from_hidden(
    batch: Batch, *, num_rows: int | None = None, bias: bool = True, frozen: bool = False, **options: Any
) -> dict[str, Tensor]:
    """The loss from hidden states, in chunks of about `num_rows` rows of float32 logits."""
    leaves = {"hidden": leaf(batch.hidden)}
    head = {"weight": batch.weight, **({"bias": batch.bias} if bias else {})}
    if not frozen:
        head = {name: leaf(tensor) for name, tensor in head.items()}
        leaves |= head
    itemsize = 8 if batch.hidden.dtype == torch.float64 else 4
    budget_mb = None if num_rows is None else num_rows * batch.weight.shape[0] * itemsize / 2**20
    options |= {"bias": head.get("bias"), "logits_budget_mb": budget_mb}
    return made(linear_expo_loss(leaves["hidden"], head["weight"], batch.ids, batch.mask, **options), 0.75, **leaves)


def of_packed(batch: Batch, level: str, objective: Objective) -> dict[str, Tensor]:
    """The loss of packed sequences, from log-probs, logits or hidden states."""
    tokens, cu_seqlens = packed(batch)
    options = {**given(batch, objective), "cu_seqlens": cu_seqlens}
    options |= {name: tokens[name] for name in options if name in tokens}
    start, ids, mask = leaf(tokens[level]), tokens["ids"], tokens["mask"]
    if level == "logps":
        return made(expo_loss_from_logps(start, mask, **options), logps=start)
    if level == "logits":
        return made(expo_loss(start, ids, mask, **options), logits=start)
    weight = leaf(batch.weight)
    output = linear_expo_loss(start, weight, ids, mask, logits_budget_mb=5 * len(weight) * 4 / 2**20, **options)
    return made(output, hidden=start, weight=weight)


def log_probs(batch: Batch, level: str, **options: Any) -> dict[str, Tensor]:
    """Log-probs and entropies with gradients through both."""
    if level == "logits":
        leaves = {"logits": leaf(batch.logits)}
        logps, entropies = token_logps(leaves["logits"], batch.ids, mask=batch.mask, return_entropy=True, **options)
    else:
        leaves = {name: leaf(getattr(batch, name)) for name in ("hidden", "weight", "bias")}
        hidden, weight, bias = leaves.values()
        logps, entropies = linear_token_logps(
            hidden, weight, batch.ids, bias=bias, mask=batch.mask, return_entropy=True, **options
        )
    weights = [batch.token_advantages.to(logps.dtype), batch.token_advantages.flip(0).to(logps.dtype)]
    grads = torch.autograd.grad((logps, entropies), list(leaves.values()), weights)
    named = {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"logps": logps, "entropies": entropies, **named}


def curriculum(estimate: str) -> dict[str, Tensor]:
    """A table after three updates with repeated ids, and samples from it."""
    table = CurriculumTable(300, std=0.3, momentum=0.8, initial_pass_rate=0.25, estimate=estimate)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        ids = torch.randint(0, 300, (150,), generator=generator)
        table.update(ids, torch.randint(0, 9, (150,), generator=generator).float() / 8)
    drawn = {f"draw {k}": table.sample(k, generator=generator) for k in (1, 32, 300)}
    drawn["draw with replacement"] = table.sample(64, generator=generator, replacement=True)
    state = {name: value for name, value in table.state_dict().items() if isinstance(value, Tensor)}
    return {**state, "weights": table.weights, "size": table.effective_sample_size, **drawn}
