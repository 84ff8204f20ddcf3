"""Lower bounds of the time: the head's three matrix products alone, and a copy of the logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from expo_kernels import _launch, _products

ROWS_AT_ONCE_ON_GPU = 8192  # logits of 2.5 GB in bfloat16 at V = 151,936; more rows are not faster


def three_products(inputs: Inputs) -> Callable[[], None]:
    """The products for logits, dHidden and dWeight of the unmasked tokens: 6NHV operations, 4NHV without dWeight.

    On a CPU they go through the faster of PyTorch's two libraries, as in expo_kernels (`_products.py`), in chunks of
    the same size.
    """
    return _products_of(inputs, with_gradients=True)


def one_product(inputs: Inputs) -> Callable[[], None]:
    """The product for the logits of the unmasked tokens: 2NHV operations."""
    return _products_of(inputs, with_gradients=False)


def _products_of(inputs: Inputs, *, with_gradients: bool) -> Callable[[], None]:
    hidden, weight = inputs.hidden.detach()[inputs.mask], inputs.weight.detach()
    run = _on_gpu if hidden.device.type == "cuda" else _on_cpu
    with_weight = with_gradients and inputs.weight.requires_grad
    return lambda: run(hidden, weight, with_hidden=with_gradients, with_weight=with_weight)


def _on_gpu(hidden: Tensor, weight: Tensor, *, with_hidden: bool, with_weight: bool) -> None:
    for rows in hidden.split(ROWS_AT_ONCE_ON_GPU):
        logits = rows @ weight.T
        if with_hidden:
            logits @ weight
        if with_weight:
            logits.T @ rows


def _on_cpu(hidden: Tensor, weight: Tensor, *, with_hidden: bool, with_weight: bool) -> None:
    vocab_size, hidden_size = weight.shape
    sizes = {"itemsize": 4, "buffers": 1, "hidden_size": hidden_size}
    most = _launch.most_rows(vocab_size, budget_mb=None, device=hidden.device, **sizes)
    num_rows = _launch.chunk_rows(len(hidden), most)
    logits = _products.empty_rows(num_rows, vocab_size, hidden.dtype, hidden.device)
    grad_hidden = torch.zeros_like(hidden) if with_hidden else None
    grad_weight = torch.empty_like(weight) if with_weight else None
    for start in range(0, len(hidden), num_rows):
        rows = hidden[start : start + num_rows]
        part = logits[: len(rows)]
        _products.write_logits(part, rows, weight, None, 1.0)
        if grad_hidden is not None:
            _products.add_to_hidden(grad_hidden[start : start + num_rows], part, weight)
        if grad_weight is not None:
            _products.add_to_weight(grad_weight, part, rows, is_first=start == 0)


def device_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """A copy of `tensor`: one read and one write of its memory."""
    target = torch.empty_like(tensor)
    return lambda: target.copy_(tensor)
