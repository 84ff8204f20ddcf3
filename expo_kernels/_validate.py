"""Argument checks, one function per fact; each error says what was given, what was expected and what to do.

Shapes and types are always checked. Checks that read values always run for CPU tensors. On other devices, where each
costs a synchronisation, they run only under `debug_checks` or EXPO_KERNELS_DEBUG=1. They are called inside registered
ops, so that torch.compile traces no value; in a compiled graph they run when the graph runs.
"""

import math
import os
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace, TracebackType

import torch
from torch import Tensor

_switch = SimpleNamespace(reads_any_device=os.environ.get("EXPO_KERNELS_DEBUG", "0") not in ("", "0"))


class debug_checks:  # noqa: N801 - used like a function: debug_checks(True), or `with debug_checks(True):`
    """Enable or disable the checks that cost a device synchronisation, from now on or within a `with` block.

    Args:
        enabled: True to read values on every device; False to read them on CPU tensors only.
    """

    def __init__(self, enabled: bool) -> None:
        self._before = _switch.reads_any_device
        _switch.reads_any_device = bool(enabled)

    def __enter__(self) -> "debug_checks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch.reads_any_device = self._before


def may_read(tensor: Tensor) -> bool:
    """Whether values may be read: always on a CPU; on other devices, which must synchronise, only if enabled."""
    return tensor.device.type == "cpu" or bool(_switch.reads_any_device)


def is_tensor(name: str, value: object) -> None:
    """`value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")


def floating(name: str, tensor: Tensor) -> None:
    """`tensor` holds real floating-point numbers."""
    is_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point tensor")


def product_dtype(name: str, dtype: torch.dtype) -> None:
    """`dtype` is one that operands of products may have."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is {dtype!r}; expected a torch.dtype, such as torch.bfloat16")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{name} is {dtype}; expected torch.bfloat16, torch.float16 or torch.float32")


def real(name: str, tensor: Tensor) -> None:
    """`tensor` holds real numbers, integers or verdicts (bool)."""
    is_tensor(name, tensor)
    if tensor.is_complex():
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected real numbers, such as torch.float32")


def integers(name: str, tensor: Tensor) -> None:
    """`tensor` holds integers that can index."""
    is_tensor(name, tensor)
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected integers, such as torch.int64")


def same_device(**tensors: Tensor | None) -> None:
    """All given tensors are on the device of the first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in given.items())
    for name, tensor in given.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but {first} on {device}; move {name} to {device}")


def same_shape(name: str, tensor: Tensor, other_name: str, shape: torch.Size) -> None:
    """`tensor` has the shape that the argument `other_name` requires."""
    if tensor.shape != shape:
        given, expected = list(tensor.shape), list(shape)
        raise ValueError(
            f"{name} has shape {given}, but {other_name} needs {expected}; give {name} of shape {expected}"
        )


def per_token(name: str, tensor: Tensor, ids_name: str, shape: torch.Size) -> None:
    """`tensor` has one value for each token of the argument `ids_name`, which has the given shape."""
    is_tensor(name, tensor)
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but {ids_name} needs {list(shape)}, one value per token: "
            f"{_how_to_align(name, tensor.shape, ids_name, shape)}"
        )


def _how_to_align(name: str, given: torch.Size, ids_name: str, expected: torch.Size) -> str:
    has_equal_sizes = [size for size in given if size != 1] == [size for size in expected if size != 1]
    if has_equal_sizes or (given.numel() == expected.numel() and 1 in (len(given), len(expected))):
        return f"use {name}.view({', '.join(map(str, expected))})"
    if len(given) != len(expected) or len(given) == 0:
        return f"give it {len(expected)} dimensions"
    if len(given) == 2 and given == expected[::-1]:
        return f"use {name}.T"
    if len(given) == 2 and given[0] != expected[0]:
        return f"give the {expected[0]} sequences of {ids_name} in the same order"
    missing = expected[-1] - given[-1]
    if missing > 0:
        where = " of each sequence" if len(given) == 2 else ""
        return f"{missing} tokens{where} have none; compute it for all of them, without padding"
    if len(given) == 2:
        return f"use {name}[:, {-expected[1]}:] if {name} starts with the prompt's tokens"
    return "leave out those of other tokens, such as the prompts'"


def predicts(name: str, tensor: Tensor, ids_name: str, ids: Tensor) -> None:
    """Row t of `tensor` [..., H or V] predicts id t of `ids` [...]."""
    integers(ids_name, ids)
    rows, places = tensor.shape[:-1], ids.shape
    if rows == places:
        return
    shapes = f"{name} has shape {list(tensor.shape)} and {ids_name} {list(places)}"
    if len(rows) == 1:
        how = f"expected one row per id, [{', '.join(map(str, places))}, {tensor.shape[-1]}]"
        raise ValueError(
            f"{shapes}; row n predicts {ids_name}[n], the token after that of row n: {how}; from each packed sequence "
            "take the rows before the tokens of the completion, never its last row"
        )
    raise ValueError(f"{shapes}; row t predicts {ids_name}[:, t], so {_how_to_predict(name, rows, ids_name, places)}")


def _how_to_predict(name: str, rows: torch.Size, ids_name: str, places: torch.Size) -> str:
    if len(places) != 2:
        shape = f"[{rows[0]}, {rows[1]}]"
        is_flat = places.numel() == rows.numel()
        return f"use {ids_name}.view({rows[0]}, {rows[1]})" if is_flat else f"give {ids_name} of shape {shape}"
    if rows[0] != places[0]:
        if (rows[1], rows[0]) == places:
            return f"use {name}.transpose(0, 1)"
        return f"give both the same sequences: {name} has {rows[0]} and {ids_name} {places[0]}"
    extra = rows[1] - places[1]
    if extra == 1:
        return f"use {name}[:, :-1]: its last row predicts a token that is not there"
    if extra > 1:
        rows_before = f"{name}[:, {-places[1] - 1}:-1]"
        return f"use {rows_before}, the rows before the completion's tokens, if {name} starts with the prompt"
    return f"use {ids_name}[:, {-extra}:] (its mask and log-probs too), the tokens after those that {name} starts with"


def ids_and_mask(
    name: str, tensor: Tensor, ids: Tensor, mask_name: str, mask: Tensor | None, ids_name: str = "completion_ids"
) -> None:
    """`ids` [...] and `mask` fit the positions of `tensor` [..., H or V]."""
    predicts(name, tensor, ids_name, ids)
    if mask is not None:
        per_token(mask_name, mask, ids_name, ids.shape)
    same_device(**{name: tensor, ids_name: ids, mask_name: mask})


def dimensions(name: str, tensor: Tensor, letters: str) -> None:
    """`tensor` has one dimension per letter."""
    if tensor.dim() != len(letters):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; expected {len(letters)} dimensions [{', '.join(letters)}]"
            " (packed input also takes cu_seqlens)"
        )


def head_fits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`weight` [V, H] and `bias` [V] fit `hidden` [..., H]."""
    floating("hidden", hidden)
    floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected [V, H]")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has {hidden.shape[-1]} features and weight {weight.shape[1]}; "
            "expected hidden [..., H] and weight [V, H] (under ZeRO-3, gather weight first)"
        )
    if bias is not None:
        floating("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {list(bias.shape)}; expected [V] = [{weight.shape[0]}]")


def mask_values(name: str, mask: Tensor) -> None:
    """`mask` holds only 0 and 1."""
    if mask.dtype == torch.bool or not may_read(mask):
        return
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name} holds values other than 0 and 1; expected a bool or 0/1 mask")


def ids_in_range(name: str, ids: Tensor, size: int, size_name: str) -> None:
    """Every id (of valid tokens) is in [0, size)."""
    if ids.numel() == 0 or not may_read(ids):
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} holds {wrong}; expected 0 <= id < {size} ({size_name}) wherever it counts")


def cumulative_lengths(cu_seqlens: Tensor) -> None:
    """`cu_seqlens` is [B + 1] integers."""
    is_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; expected [B + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected torch.int32")


def cumulative_length_values(cu_seqlens: Tensor, num_tokens: int) -> None:
    """`cu_seqlens` is non-decreasing from 0 to the number of tokens."""
    if not may_read(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != num_tokens or any(b < a for a, b in pairwise(ends)):
        raise ValueError(
            f"cu_seqlens runs from {ends[0]} to {ends[-1]}; expected non-decreasing numbers from 0 to "
            f"{num_tokens}, the number of packed tokens"
        )


def lengths_on_host(name: str, lengths: Tensor, num_sequences: int | None) -> None:
    """`lengths` is a CPU tensor of one integer per sequence (`num_sequences` None: any number of them)."""
    integers(name, lengths)
    if lengths.device.type != "cpu":
        raise ValueError(f"{name} is on {lengths.device}; expected a CPU tensor; count on the host, or leave it out")
    if lengths.dim() != 1 or (num_sequences is not None and lengths.numel() != num_sequences):
        expected = "B" if num_sequences is None else f"{num_sequences}"
        raise ValueError(f"{name} has shape {list(lengths.shape)}; expected [{expected}], one number per sequence")


def equal_lengths(name: str, lengths: Tensor, counted: Tensor) -> None:
    """`lengths` are the numbers of valid tokens that the mask has."""
    given, expected = lengths.tolist(), counted.tolist()
    if given != expected:
        raise ValueError(f"{name} is {given}, but the mask has {expected} valid tokens; count those of the mask")


def finite(name: str, tensor: Tensor) -> None:
    """`tensor` holds neither NaN nor infinity."""
    if may_read(tensor) and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} holds {bad} non-finite values; expected numbers only (count and drop failures)")


def within(name: str, tensor: Tensor, low: float, high: float) -> None:
    """Every value is in [low, high]."""
    if tensor.numel() == 0 or not may_read(tensor):
        return
    smallest, largest = (float(value) for value in tensor.aminmax())
    if not (low <= smallest and largest <= high):
        raise ValueError(f"{name} ranges over [{smallest:g}, {largest:g}]; expected values in [{low:g}, {high:g}]")


def positive(name: str, tensor: Tensor) -> None:
    """Every value is finite and > 0."""
    if tensor.numel() == 0 or not may_read(tensor):
        return
    smallest, largest = (float(value) for value in tensor.aminmax())
    if not (smallest > 0.0 and largest < math.inf):
        raise ValueError(f"{name} ranges over [{smallest:g}, {largest:g}]; expected finite numbers > 0")


def number(name: str, value: float, *, low: float, above: bool = False, high: float = math.inf) -> None:
    """`value` is a finite Python number in range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a number")
    # only comparisons: they keep the number symbolic in a trace, and NaN fails them
    if not (low <= value <= high and value < math.inf) or (above and value == low):
        bounds = f"{'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
        raise ValueError(f"{name} is {value}; expected a finite number {bounds}")


def gradient_tolerance(value: float, *, is_sharded: bool) -> None:
    """`value` is in [0, 1], and 0 if the head is sharded."""
    number("gradient_tolerance", value, low=0.0, high=1.0)
    if is_sharded and value > 0.0:
        raise ValueError(
            f"gradient_tolerance is {value:g}, but the head is vocabulary-parallel; expected 0.0: each rank would have "
            "to know the bounds of the others"
        )


def whole_number(name: str, value: int, *, low: int) -> None:
    """`value` is an int, at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a whole number")
    if value < low:
        raise ValueError(f"{name} is {value}; expected a whole number >= {low}")


def scalar(name: str, value: float | Tensor, *, above_zero: bool = False) -> None:
    """`value` is a finite number >= 0 (or > 0), or a 0-dim tensor, whose value `scalar_value` checks."""
    if not isinstance(value, Tensor):
        number(name, value, low=0.0, above=above_zero)
        return
    if value.dim() != 0:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected a number or a 0-dim tensor")


def scalar_value(name: str, value: Tensor, *, above_zero: bool = False) -> None:
    """The 0-dim tensor `value` holds a finite number >= 0 (or > 0)."""
    if may_read(value):
        number(name, float(value), low=0.0, above=above_zero)


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """`value` is one of the allowed strings."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def group_size_divides(batch: int, group_size: int) -> None:
    """The batch consists of whole groups of at least two."""
    whole_number("group_size", group_size, low=1)
    if group_size == 1:
        raise ValueError(
            "group_size is 1; expected a whole number >= 2: the advantage of a rollout without another to compare it "
            "with is always 0; sample several rollouts per question, or give advantages of your own"
        )
    if batch % group_size:
        raise ValueError(
            f"group_size is {group_size}, which does not divide the batch of {batch}; "
            "rewards of one question are adjacent, all groups whole"
        )


def callable_or_choice(name: str, value: str | Callable[[Tensor], Tensor], allowed: tuple[str, ...]) -> None:
    """`value` is a function, or one of the allowed strings."""
    if not callable(value):
        choice(name, value, allowed)
