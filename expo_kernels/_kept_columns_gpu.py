"""The columns that the gradient products need with a gradient tolerance, chosen on a GPU.

The method and its bounds are those of `_kept_columns.py`; docs/gradient-tolerance.md derives them. Here nothing is read
on the host to choose: one kernel computes the squared norm of each column of G = dL/dlogits, which sorts the columns
into levels; one product of G with their distances by level gives dHidden's bound for all levels at once. In a row of G
all columns but the chosen one have the same sign, so that the magnitude of such a sum is the sum of magnitudes. This
does not hold with gradients of entropies.

Sums are over one axis, or products: no atomic additions, so that every run gives equal bits.

Letters: n rows of a chunk, V vocabulary, H hidden, L levels, w the row of the head that stands for dropped columns.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from expo_kernels._kept_columns import (
    LEVEL_RATIO,
    MOST_KEPT,
    NUM_LEVELS,
    ROWS_IN_MEAN,
    SAFETY,
    WEIGHT_SHARE,
    rounding_of_squares,
)
from expo_kernels._plans import HostCopy
from expo_kernels._products_gpu import product

# Of the estimated norm of dHidden, until that of a chunk is known. A bound that does not hold costs a second pass, so
# it is half of what the CPU path takes, which adds columns instead.
FIRST_HIDDEN_SHARE = 0.25
BOUND_SLACK = 1.001  # for the rounding errors of float32 sums
DISTANCE_SLACK = 1 + 2.0**-7  # distances are rounded up to bfloat16
LEAST_UNIT = 2.0**-120  # for gradients that are all 0


class Choice(NamedTuple):
    """Which columns of a chunk to keep."""

    columns: Tensor  # [V] int64: every column; those to keep come first
    num_kept: HostCopy  # of one integer: V if the dense products are faster
    row_sums: Tensor  # [n] float32: of dL/dlogits
    hidden_bound: Tensor  # 0-dim float64, of the errors' Frobenius norms
    weight_bound: Tensor
    hidden_norm: Tensor  # 0-dim float64: dHidden's, if the rows W_j - w were orthogonal


class DeviceColumns:
    """Chooses the columns of each chunk, and adds up the bounds of a call, on the device."""

    def __init__(self, weight: Tensor, tolerance: float, wants_grad: tuple[bool, bool], num_chunks: int) -> None:
        """`tolerance`: the largest relative error of dHidden and dWeight; `wants_grad`: which of them are computed;
        `num_chunks`: how many chunks will share dWeight's error."""
        self.tolerance, self._wants_grad, self._num_chunks = tolerance, wants_grad, num_chunks
        self.mean_row, self._distances = _distances_from_mean(weight)
        self._hidden_share = _zero(weight.device) + FIRST_HIDDEN_SHARE
        self._squared_hidden_bound, self._squared_hidden_norm, self._weight_bound = (
            _zero(weight.device) for _ in range(3)
        )
        self._rows_seen = self._rows_kept = 0.0
        self.is_exact = True  # whether all columns were kept until now

    def choose(self, grad_logits: Tensor, hidden: Tensor, chosen_ids: Tensor) -> Choice:
        """The choice for dL/dlogits [n, V], hidden [n, H] and the chosen column of each row [n]."""
        vocab_size, levels = grad_logits.shape[1], torch.arange(NUM_LEVELS, device=grad_logits.device)
        chosen = grad_logits.gather(1, chosen_ids.unsqueeze(1)).squeeze(1).float()
        # in units of the largest, squares of small probabilities do not underflow
        unit = chosen.abs().amax().clamp_(min=LEAST_UNIT)
        squares = _column_squares(grad_logits, unit)
        num_shares = len(chosen) if self._wants_grad[1] else 1
        highest = self.tolerance**2 * (chosen / unit).square().sum() / num_shares
        level = (highest / squares).log_().div_(math.log(LEVEL_RATIO)).ceil_().nan_to_num_(nan=NUM_LEVELS)
        level_of = torch.nn.functional.pad(level.clamp_(0, NUM_LEVELS - 1), (0, 1)).to(torch.uint8)
        # equal stores: their order does not matter; rows without a gradient store behind the columns
        level_of.scatter_(0, torch.where(chosen != 0, chosen_ids, vocab_size), 0)
        level_of = level_of[:vocab_size]
        is_on = level_of == levels.unsqueeze(1)  # [L, V]

        unit = unit.double()
        sums_from = torch.ones(NUM_LEVELS, NUM_LEVELS, dtype=torch.float64, device=unit.device).tril()
        per_level = torch.where(is_on, squares, 0.0).sum(dim=1, dtype=torch.float64)
        weight_bounds = (per_level @ sums_from).sqrt() * (unit * BOUND_SLACK * _spectral_norm_bound(hidden))
        row_sums, magnitudes = _sums_by_level(grad_logits, is_on, self._distances)
        hidden_bounds = torch.linalg.vector_norm(magnitudes.double() @ sums_from, dim=0) * BOUND_SLACK
        num_kept = vocab_size - is_on.sum(dim=1).double() @ sums_from  # if the columns from a level on are dropped

        hidden_norm = unit * (squares * self._distances.square()).sum(dtype=torch.float64).sqrt()
        weight_norm = unit * (squares.sum(dtype=torch.float64) * hidden.double().square().sum() / len(hidden)).sqrt()
        fits = (levels > 0) & (num_kept <= MOST_KEPT * vocab_size)
        if self._wants_grad[0]:
            fits &= hidden_bounds <= self.tolerance * self._hidden_share * hidden_norm
        if self._wants_grad[1]:
            fits &= weight_bounds <= self.tolerance * WEIGHT_SHARE / math.sqrt(self._num_chunks) * weight_norm
        lowest, is_sparse = fits.to(torch.uint8).argmax().view(1), fits.any()

        def at_lowest(values: Tensor, if_dense: float) -> Tensor:
            return torch.where(is_sparse, values.gather(0, lowest), if_dense)

        return Choice(
            torch.sort(level_of, stable=True).indices,
            HostCopy(at_lowest(num_kept, vocab_size).long()),
            row_sums,
            at_lowest(hidden_bounds, 0.0).squeeze(0),
            at_lowest(weight_bounds, 0.0).squeeze(0),
            hidden_norm,
        )

    def record(self, choice: Choice, grad_hidden: Tensor | None, num_rows: int, share: float) -> None:
        """Add a chunk's norm, bounds, and the share of its columns that were kept."""
        self._rows_seen += num_rows
        self._rows_kept += num_rows * share
        self.is_exact &= share == 1.0
        self._squared_hidden_bound += choice.hidden_bound.square()
        self._weight_bound += choice.weight_bound
        if grad_hidden is not None:
            norm = torch.linalg.vector_norm(grad_hidden, dtype=torch.float64)
            self._squared_hidden_norm += norm.square()
            is_known = choice.hidden_norm > 0.0
            self._hidden_share = torch.where(is_known, SAFETY * norm / choice.hidden_norm, self._hidden_share)

    def error_bound(self, grad_weight: tuple[Tensor, ...] | None) -> Tensor:
        """The larger of the bounds on the relative errors of dHidden and dWeight (in Frobenius norms), 0-dim."""
        bound = _zero(self.mean_row.device)
        if self._wants_grad[0]:
            bound = _relative(self._squared_hidden_bound.sqrt(), self._squared_hidden_norm.sqrt())
        if self._wants_grad[1] and grad_weight is not None:
            squares = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in grad_weight]
            norm = torch.stack(squares).sum().sqrt()
            bound = torch.maximum(bound, _relative(self._weight_bound, norm))
        return bound

    @property
    def kept_share(self) -> float:
        """Mean share of the vocabulary's columns in the gradient products."""
        return self._rows_kept / self._rows_seen if self._rows_seen else 0.0


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device)


def _relative(bound: Tensor, norm: Tensor) -> Tensor:
    """The bound over the least norm of the exact gradient, given the norm of one that is off by at most `bound`."""
    relative = torch.where(norm > bound, bound / (norm - bound), math.inf)
    return torch.where(bound == 0.0, 0.0, relative)


def _column_squares(grad_logits: Tensor, unit: Tensor) -> Tensor:
    from expo_kernels._triton.columns import launch_column_squares

    return launch_column_squares(grad_logits, unit)


def _sums_by_level(grad_logits: Tensor, is_on: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of each row of grad_logits, [n], and of |grad_logits_ij| * distance_j over the columns of each level,
    [n, L] with 0 for level 0, which has the chosen columns and is never dropped; in one product."""
    is_narrow = grad_logits.dtype == torch.bfloat16
    rounded_up = distances * DISTANCE_SLACK if is_narrow else distances
    weights = torch.where(is_on, rounded_up, 0.0).to(grad_logits.dtype)  # [L, V]
    weights[0] = 1.0
    made = torch.empty(len(grad_logits), len(weights), dtype=torch.float32, device=grad_logits.device)
    made = product(made, grad_logits, weights.T, is_first=True)
    row_sums = made[:, 0].clone()
    made[:, 0] = 0.0
    return row_sums, made.abs_()


def _distances_from_mean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """About the mean of the rows of weight [V, H], [H] float32, and the distance of each row from it, [V] float32.

    The bounds hold for any row. It is rounded to the weight's dtype, which makes one exact product of the distances.
    """
    mean = weight[:: max(1, len(weight) // ROWS_IN_MEAN)].float().mean(dim=0).to(weight.dtype)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()
    dots = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    dots = product(dots, weight, mean.unsqueeze(1), is_first=True).squeeze(1)
    mean = mean.float()
    mean_square = mean.square().sum()
    slack = (squares + mean_square).mul_(rounding_of_squares(weight.shape[1], torch.float32))
    return mean, (squares - 2.0 * dots + mean_square).clamp_(min=0.0).add_(slack).sqrt_()


def _spectral_norm_bound(rows: Tensor) -> Tensor:
    """A bound on the largest singular value: the square root of the Frobenius norm of the Gram matrix."""
    left, right = (rows.T, rows) if rows.shape[0] > rows.shape[1] else (rows, rows.T)
    gram = torch.empty(left.shape[0], left.shape[0], dtype=torch.float32, device=rows.device)
    squared: Tensor = torch.linalg.vector_norm(product(gram, left, right, is_first=True), dtype=torch.float64)
    return squared.sqrt()
