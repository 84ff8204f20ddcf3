"""The precision of matrix products: switches of the process must not lower it, and not every GPU build has float32
results of 16-bit operands.

`torch.set_float32_matmul_precision`, `torch.backends.*.fp32_precision` and `allow_tf32` replace float32 products by
TF32 or bfloat16 ones, with errors of 1e-2 to 1e-1 nats. `allow_fp16_accumulation` sums float16 products in float16. The
switches that allow reduced-precision reductions only concern 16-bit results, and the products here have float32 ones.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

_FULL = ("none", "ieee")  # "none": the default of products, which is "ieee" on every backend
_SETTINGS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


class _Switches(NamedTuple):
    legacy: str  # as set by torch.set_float32_matmul_precision and allow_tf32
    fp32_precisions: tuple[str, ...]  # of `_SETTINGS`
    fp16_accumulation: bool


# the switches are of the whole process: the first of several threads saves them, the last one restores them
_lock = threading.Lock()
_guard = SimpleNamespace(depth=0, saved=None)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products inside have full precision; the switches are changed only if they lower it, and restored afterwards."""
    with _lock:
        is_needed = _guard.depth > 0 or _is_lowered()
        if is_needed:
            if _guard.depth == 0:
                _guard.saved = _raise_precision()
            _guard.depth += 1
    try:
        yield
    finally:
        if is_needed:
            with _lock:
                _guard.depth -= 1
                if _guard.depth == 0:
                    _restore(_guard.saved)


def _is_lowered() -> bool:
    is_lowered = any(setting.fp32_precision not in _FULL for setting in _SETTINGS)
    return is_lowered or torch.backends.cuda.matmul.allow_fp16_accumulation


def _raise_precision() -> _Switches:
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch refuses to read it while it contradicts `fp32_precision`, which then counts
        legacy = "highest"
    precisions = tuple(setting.fp32_precision for setting in _SETTINGS)
    saved = _Switches(legacy, precisions, torch.backends.cuda.matmul.allow_fp16_accumulation)
    # PyTorch reads either of the two, and refuses to if they contradict each other: the old setter sets both
    torch.set_float32_matmul_precision("highest")
    if saved.fp16_accumulation:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    return saved


def _restore(saved: _Switches) -> None:
    torch.set_float32_matmul_precision(saved.legacy)
    for setting, precision in zip(_SETTINGS, saved.fp32_precisions, strict=True):
        # a value that came from `torch.backends.fp32_precision` follows it again
        setting.fp32_precision = "none"
        if setting.fp32_precision != precision:
            setting.fp32_precision = precision
    if saved.fp16_accumulation:
        torch.backends.cuda.matmul.allow_fp16_accumulation = True


@functools.cache
def has_float32_results(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of operands of a 16-bit dtype can have a float32 result on that device, decided once.

    CUDA builds have them; ROCm builds are tried, because some refuse them.
    """
    if device.type != "cuda" or torch.version.hip is None:
        return True
    operand = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        product = torch.mm(operand, operand, out_dtype=torch.float32)
        torch.addmm(product, operand, operand, out_dtype=torch.float32, out=product)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True
