"""One launch of the loss kernel on rows of logits, as `linear_expo_loss` makes it for each chunk."""

from collections.abc import Callable

import torch
from torch import Tensor

from expo_kernels import Objective
from expo_kernels._head import Chunk, Span
from expo_kernels._inputs import Tokens

BETA = 0.02
# relative; a bfloat16 has 8 significant bits, and one column holds most of a row's gradient
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
OLD_LOGP = -1.0  # nats: more than the log-probs of random logits, so that no ratio is clipped


def row_loss(memory: Tensor, grad_dtype: torch.dtype) -> tuple[Callable[[], None], Tensor]:
    """A function that turns the logits in `memory` [n, V] into their gradient, and the gradient's memory [n, V].

    A narrower gradient is stored in the front of each row. Later calls read a gradient as logits: the same work.
    """
    from expo_kernels._triton import launch as kernels  # not on every machine is there a Triton

    num_rows, vocab_size = memory.shape
    device = memory.device
    is_narrower = grad_dtype != memory.dtype
    grad = memory.view(grad_dtype)[:, :vocab_size] if is_narrower else memory
    residual = torch.empty(num_rows, device=device) if is_narrower else None
    chunk = Chunk(Span(slice(0, num_rows), None), memory, grad, rounding_residual=residual)
    logps = torch.full((num_rows,), OLD_LOGP, device=device)
    tokens = Tokens(
        ids=torch.arange(num_rows, device=device).remainder(vocab_size),
        mask=torch.ones(num_rows, dtype=torch.bool, device=device),
        objective=Objective(aggregation="token"),
        num_sequences=num_rows,
        advantages=torch.ones(num_rows, device=device),
        old_logps=logps,
        ref_logps=logps,
        beta=torch.full((), BETA, device=device),
        normalizer=torch.ones((), device=device),
    )
    sums, out = kernels.make_sums(device), torch.zeros(num_rows, device=device)
    return lambda: kernels.launch_row_loss(chunk, tokens, sums, out, return_entropy=False), grad


def gradient_of(memory: Tensor) -> Tensor:
    """The gradient in float64 that `row_loss` computes from the logits in `memory`, by eager PyTorch."""
    logits = memory.detach().double().requires_grad_()
    ids = torch.arange(len(logits), device=logits.device).remainder(logits.shape[1])
    log_ratio = logits.log_softmax(-1).gather(-1, ids[:, None]) - OLD_LOGP
    losses = BETA * ((-log_ratio).exp() + log_ratio - 1) - log_ratio.exp()
    return torch.autograd.grad(losses.sum(), logits)[0]


def moved_bytes(memory: Tensor, grad_dtype: torch.dtype) -> int:
    """Bytes that the launch moves: every logit is read twice and its gradient written once."""
    return memory.numel() * (2 * memory.element_size() + grad_dtype.itemsize)
