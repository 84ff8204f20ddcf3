"""The products of the output head around the kernels: 16-bit operands, float32 sums and results.

| hidden states, weight | logits | dHidden, dWeight |
| --- | --- | --- |
| both bfloat16 | one product | one product each; dL/dlogits are bfloat16 (`NarrowProducts`) |
| both float16 | one product | bfloat16 halves (`SplitProducts`) |
| any others | float16 halves (`SplitProducts`) | bfloat16 halves |

Tensor cores multiply 16-bit operands some 15 times as fast as float32 ones. A float32 value is the sum of two 16-bit
halves and a rest: of two bfloat16 halves, the rest is up to 2^-17 of the value, which keeps gradients within 1e-5, but
not log-probs within 2e-5 nats; of two float16 halves it is up to 2^-23, which keeps these. float16 has a narrow range:
hidden states and weight are scaled by opposite powers of two, which changes neither their product nor their digits.
The product of the two lower halves is left out. Halves are made for a block of the vocabulary at a time.

Letters: n rows of a chunk, V vocabulary, H hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from expo_kernels import _launch
from expo_kernels._precision import has_float32_results
from expo_kernels._products import WideProducts

# with fewer columns the rounding of one column is visible, and float32 products cost nothing
LEAST_NARROW_COLUMNS = 128
LOWER_HALF = 2.0**11  # lower float16 halves of a weight are stored times this, above the range of subnormal numbers
MOST_HIDDEN = 2.0**15  # magnitude of scaled hidden states; the largest float16 is 65,504
LEAST_UNIT = 2.0**-100  # for a weight of zeros


class KernelProducts(WideProducts):
    """Float32 products; rows of logits as the kernels read them."""

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def empty_logits(self, num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
        """Memory whose rows start on multiples of 16 elements, so that every access can be 128 bits wide."""
        return torch.empty(num_rows, -(-vocab_size // 16) * 16, dtype=torch.float32, device=device)[:, :vocab_size]


class NarrowProducts(KernelProducts):
    """Products of bfloat16 operands; dL/dlogits are bfloat16 too and overwrite the front of their float32 rows.

    The chosen column holds half of a row's norm or more: its rounding residual is added back, so that gradients stay
    within 2e-3.
    """

    def grad_memory(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The front of each row, and memory for `rounding_residual` [n]."""
        num_rows, vocab_size = logits.shape
        front = logits.view(torch.bfloat16)[:, :vocab_size]
        return front, torch.empty(num_rows, dtype=torch.float32, device=logits.device)

    def operand(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def write_logits(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        """out [n, V] = hidden [n, H] @ weight [V, H].T + bias [V]; the kernels apply the scale."""
        assert scale == 1.0
        product(out, hidden, weight.T, is_first=True)
        if bias is not None:
            out.add_(bias)

    def grad_hidden(self, grad_logits: Tensor, weight: Tensor) -> Tensor:
        """grad_logits [n, V] @ weight [V, H]."""
        made = torch.empty(grad_logits.shape[0], weight.shape[1], dtype=torch.float32, device=weight.device)
        return product(made, grad_logits, weight, is_first=True)

    def add_grad_weight(self, total: Tensor, grad_logits: Tensor, hidden: Tensor, *, is_first: bool) -> None:
        """total [V, H] += grad_logits [n, V].T @ hidden [n, H]; `is_first` overwrites what `total` holds."""
        product(total, grad_logits.T, hidden.to(grad_logits.dtype), is_first=is_first)


class SplitProducts(KernelProducts):
    """Products of 16-bit halves; dL/dlogits are float32, and their halves overwrite them."""

    def __init__(self, weight: Tensor, *, is_half: bool) -> None:
        """`is_half`: hidden states and weight have the same 16-bit dtype, so that logits are one product."""
        super().__init__()
        self._is_half = is_half
        self._unit = None if is_half else _power_above(weight).clamp_(min=LEAST_UNIT)

    def operand(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def write_logits(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        """out [n, V] = hidden [n, H] @ weight [V, H].T + bias [V]; the kernels apply the scale."""
        assert scale == 1.0
        if self._unit is None:
            product(out, hidden, weight.T, is_first=True)
        else:
            self._write_split_logits(out, hidden, weight, self._unit)
        if bias is not None:
            out.add_(bias)

    def _write_split_logits(self, out: Tensor, hidden: Tensor, weight: Tensor, unit: Tensor) -> None:
        """(hidden * unit) @ (weight / unit).T by float16 halves; magnitudes of weight / unit are at most 1."""
        limit = _power_above(hidden) * unit
        # hidden states that would overflow float16 are scaled less, and the weight more
        unit = unit / torch.where(limit > MOST_HIDDEN, limit / MOST_HIDDEN, 1.0)
        wide = hidden.float().mul_(unit) if hidden.dtype != torch.float32 else hidden * unit
        upper = wide.half()
        lower = torch.sub(wide, upper, out=torch.empty_like(upper)) if hidden.dtype == torch.float32 else None
        del wide
        if weight.dtype == torch.float32:
            # next to each other, both halves of the weight need one product
            upper = torch.cat([upper, upper / LOWER_HALF], dim=1)
        for block, upper_weight, both in _float16_halves(weight, unit):
            product(out[:, block], upper, both.T, is_first=True)
            if lower is not None:
                product(out[:, block], lower, upper_weight.T, is_first=False)

    def grad_operand(self, grad_logits: Tensor) -> Tensor:
        """Upper and lower halves of dL/dlogits [n, V], bfloat16 [n, 2, V], in the same memory."""
        num_rows, vocab_size = grad_logits.shape
        stride = grad_logits.stride(0)
        halves = grad_logits.view(torch.bfloat16).as_strided((num_rows, 2, vocab_size), (2 * stride, stride, 1))
        step = _launch.split_rows(vocab_size)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            wide = grad_logits[rows].clone()
            halves[rows, 0] = wide
            torch.sub(wide, halves[rows, 0], out=halves[rows, 1])
        return halves

    def grad_hidden(self, grad_logits: Tensor, weight: Tensor) -> Tensor:
        """dL/dlogits, as `grad_operand` returned them, times weight [V, H]."""
        made = torch.empty(grad_logits.shape[0], weight.shape[1], dtype=torch.float32, device=weight.device)
        for block, upper, lower in _bfloat16_halves(weight):
            product(made, grad_logits[:, 0, block], upper, is_first=block.start == 0)
            product(made, grad_logits[:, 1, block], upper, is_first=False)
            if lower is not None:
                product(made, grad_logits[:, 0, block], lower, is_first=False)
        return made

    def add_grad_weight(self, total: Tensor, grad_logits: Tensor, hidden: Tensor, *, is_first: bool) -> None:
        """total [V, H] += dL/dlogits.T @ hidden [n, H]; `is_first` overwrites what `total` holds."""
        upper, lower = _halves(hidden)
        # one product over 2n rows: the two halves of each row of dL/dlogits, times the same hidden states
        product(total, grad_logits.flatten(0, 1).T, upper.repeat_interleave(2, dim=0), is_first=is_first)
        if lower is not None:
            product(total, grad_logits[:, 0].T, lower, is_first=False)


def make_products(hidden: Tensor, weight: Tensor) -> KernelProducts:
    """The products for hidden states and a weight of these dtypes on this device."""
    if are_narrow(hidden.dtype, weight.dtype, weight):
        return NarrowProducts()
    may_split = splits(hidden.dtype, weight.dtype) and weight.shape[0] >= LEAST_NARROW_COLUMNS
    if not may_split or not all(has_float32_results(weight.device, dtype) for dtype in (torch.bfloat16, torch.float16)):
        return KernelProducts()
    return SplitProducts(weight, is_half=hidden.dtype == weight.dtype == torch.float16)


def are_narrow(hidden_dtype: torch.dtype, weight_dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether `NarrowProducts` are for hidden states and a weight [V, H] that is rounded to `weight_dtype`."""
    if splits(hidden_dtype, weight_dtype) or weight.shape[0] < LEAST_NARROW_COLUMNS:
        return False
    return has_float32_results(weight.device, torch.bfloat16)


def splits(hidden: torch.dtype, weight: torch.dtype) -> bool:
    """Whether `SplitProducts` are for these dtypes."""
    return not hidden == weight == torch.bfloat16


def scaled_row_sum(rows: Tensor, scale: Tensor) -> Tensor:
    """rows [n, V].T @ scale [n], bfloat16 times float32, as products with the two bfloat16 halves of the scale."""
    upper = scale.bfloat16()
    halves = torch.stack([upper, (scale - upper).bfloat16()], dim=1)
    made = torch.empty(rows.shape[1], 2, dtype=torch.float32, device=rows.device)
    return product(made, rows.T, halves, is_first=True).sum(dim=1)


def product(out: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> Tensor:
    """out = left @ right, or out += left @ right unless `is_first`; operands of one dtype, float32 results."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out) if is_first else out.addmm_(left, right)
    if left.device.type == "cpu":  # where products of 16-bit operands have 16-bit results; only tests come here
        left, right = left.float(), right.float()
        return torch.mm(left, right, out=out) if is_first else out.addmm_(left, right)
    if is_first:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.addmm(out, left, right, out_dtype=torch.float32, out=out)


def _power_above(values: Tensor) -> Tensor:
    """A power of two that no magnitude exceeds, 0-dim float32, on the values' device."""
    low, high = torch.aminmax(values)
    largest = torch.maximum(-low, high).float()
    return torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 0.0)


def _halves(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Two bfloat16 tensors whose sum is `values` but for 2^-17; no second one if the first is exact."""
    if values.dtype == torch.bfloat16:
        return values, None
    upper = values.bfloat16()
    return upper, torch.sub(values, upper, out=torch.empty_like(upper))


def _bfloat16_halves(weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The two halves of a weight, block by block of the vocabulary; a bfloat16 weight is one block."""
    for block in _blocks(weight, weight.shape[0] if weight.dtype == torch.bfloat16 else None):
        yield block, *_halves(weight[block])


def _float16_halves(weight: Tensor, unit: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Upper halves of weight / unit, [columns, H], and both halves, [columns, 2H], or the upper one again if exact."""
    hidden_size = weight.shape[1]
    for block in _blocks(weight, None):
        wide = weight[block].float() / unit
        if weight.dtype != torch.float32:
            upper = wide.half()
            yield block, upper, upper
            continue
        both = torch.empty(wide.shape[0], 2 * hidden_size, dtype=torch.float16, device=weight.device)
        upper, lower = both[:, :hidden_size], both[:, hidden_size:]
        upper.copy_(wide)
        torch.mul(wide.sub_(upper), LOWER_HALF, out=lower)
        del wide
        yield block, upper, both


def _blocks(weight: Tensor, step: int | None) -> Iterator[slice]:
    """Slices of the vocabulary, of `step` columns or as many as halves are made of at once."""
    vocab_size, hidden_size = weight.shape
    step = _launch.split_rows(hidden_size) if step is None else step
    for start in range(0, vocab_size, step):
        yield slice(start, min(start + step, vocab_size))
