"""Every private API of PyTorch that the package uses, each behind one function that gives the reason."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def assert_on_device(is_true: Tensor, message: str) -> None:
    """Fail if a 0-dim tensor is False; on a GPU by an assertion on the device, for which the host does not wait."""
    torch._assert_async(is_true, message)


def autograd_inside_an_op() -> AbstractContextManager[Any]:
    """Let autograd record inside a custom op, where its dispatch key is excluded.

    `torch.func.grad` would need no such guard, but it fails inside an op under a dispatch mode.
    """
    guard: AbstractContextManager[Any] = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    return guard


def graph_is_kept() -> bool:
    """Whether the current backward pass retains its graph, so that it may run again."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def numbers_on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Float32 numbers, [len(values)], which reach the device as arguments of a kernel and not by a copy.

    A copy would need pinned memory to be asynchronous, which must not be allocated while a CUDA graph is captured.
    """
    made = torch.zeros(len(values), dtype=torch.float32, device=device)
    torch._foreach_add_(list(made.unbind()), list(values))
    return made


def is_being_traced(tensor: Tensor) -> bool:
    """Whether torch.compile traces a backward pass, in which tensors are stand-ins without memory of their own."""
    return type(tensor) is not Tensor


def has_onednn_linear() -> bool:
    """Whether this build of PyTorch has oneDNN's linear operator."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [n, K] @ right [m, K].T + bias [m] by oneDNN; `right` must be dense, row-major or column-major."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of that name: an op cannot take a group as an argument, only its name."""
    from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
        GroupName,
        _resolve_process_group,
    )

    group: dist.ProcessGroup = _resolve_process_group(GroupName(name))
    return group


def all_gather(out: Tensor, values: Tensor, group: dist.ProcessGroup) -> None:
    """Write the flat `values` of all ranks to the flat `out`, in rank order; PyTorch 2.13 renamed the function."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, values, group=group)
