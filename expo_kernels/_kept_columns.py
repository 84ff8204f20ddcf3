"""The columns of the output head that the gradient products need, for a gradient within a relative error.

In a row of a language model almost all probability lies on few columns. With G = dL/dlogits [n, V] of a chunk, S the
columns that are kept, D the others, and w the mean row of the head,

    dHidden_i = sum over S of G_ij W_j + (sum over D of G_ij) w,   off by at most   b_i = sum over D of |G_ij| |W_j - w|
    dWeight_j = sum_i G_ij h_i for j in S, else 0,                 off by at most   |G_D|_F |h|_2

by the triangle inequality; the Frobenius norm of dHidden's error is at most that of b. Columns are dropped by their
norm |G_j|, the least first: one pass over G computes these norms, which sort the columns into levels, and another sums
b_i for one level, which a few rows or the chunk before suggest. The lowest level tried is dropped whose bounds stay
below the tolerance times the norms of the gradients. These norms are estimated before the products and known after
them: then columns are added if the estimate was too large.

Letters: n rows of a chunk, V vocabulary, H hidden, K kept columns, L levels.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expo_kernels import _launch, _products

NUM_LEVELS = 24  # they reach from columns that alone would use up the bound to those of which all together do not
LEVEL_RATIO = 2.0  # of the squared norms of columns on adjacent levels: about a fifth more columns a level
MOST_KEPT = 0.5  # share of the columns; with more, the dense products are faster
COLUMNS_AT_ONCE = 4096  # of the kept ones in one product, which bounds its memory
WEIGHT_SHARE, FIRST_HIDDEN_SHARE = 0.6, 0.5  # of the estimated norms of dWeight, and of dHidden in the first chunk
ROWS_IN_MEAN = 4096  # at least, and less than twice as many
ROWS_IN_ESTIMATE = 32  # likewise, of the bounds that suggest a level
# with at least this share of the columns kept, those of one level cost as much time as trying to drop it
TRIED_FROM_SHARE = 1 / 16
UNIT = 2.0**90  # of the squares, which are at most V^2
SAFETY = 0.95  # of the share that the chunk before has shown


class Levels:
    """The columns of a chunk in levels 0 (kept in any case) to L - 1, by falling norm, and the bounds for each."""

    def __init__(self, grads: "ChunkGrads", highest: float, distances: Tensor, *, wants_weight: bool) -> None:
        """`highest`: the squared norm of a column from which on it is kept in any case; `distances` [V]: |W_j - w|."""
        self._grads, self._distances = grads, distances
        # only dWeight's bound needs Euclidean norms; a pass for the sums takes a third of the time
        norms = grads.column_squares().sqrt_() if wants_weight else grads.column_sums()
        halvings = norms.log2().mul_(-2.0).add_(math.log2(highest) if highest > 0.0 else -math.inf)
        level = halvings.div_(math.log2(LEVEL_RATIO)).ceil_().nan_to_num_(nan=NUM_LEVELS)
        self.level_of = level.clamp_(0, NUM_LEVELS - 1).long()  # [V]
        self.level_of[grads.chosen_ids[grads.scale != 0]] = 0
        self._num_kept = [0, *torch.bincount(self.level_of, minlength=NUM_LEVELS).cumsum(0).tolist()]
        self._hidden_bounds: dict[int, float] = {NUM_LEVELS: 0.0}
        self._weight_bounds = [0.0] * (NUM_LEVELS + 1)
        # for orthogonal rows of the head and of hidden
        self.hidden_norm = float(torch.linalg.vector_norm(norms * distances, dtype=torch.float64))
        self.weight_norm = 0.0
        if wants_weight:
            per_level = norms.new_zeros(NUM_LEVELS).index_add_(0, self.level_of, norms.square())
            self._weight_bounds = (_sums_from(per_level).sqrt() * _spectral_norm_bound(grads.hidden)).tolist()
            mean_square = float(grads.hidden.double().square().sum()) / max(len(grads.hidden), 1)
            self.weight_norm = float(torch.linalg.vector_norm(norms)) * math.sqrt(mean_square)

    def lowest(self, most_hidden: float, most_weight: float, guess: int | None = None) -> int | None:
        """The lowest level tried that can be dropped, given the largest bounds; None if too few columns would be.

        dHidden's bound is tried from the guess on, or from the level that a few rows suggest: each is a pass over G.
        """
        level = 1
        while level < NUM_LEVELS and not self._weight_bounds[level] <= most_weight:
            level += 1
        if most_hidden < math.inf:
            level = self._suggested(level, most_hidden) if guess is None else max(level, guess)
            if self._is_worth(level) and not self.hidden_bound(level) <= most_hidden:
                level = self._suggested(level + 1, most_hidden)
            while self._is_worth(level) and not self.hidden_bound(level) <= most_hidden:
                level += 1
        return level if self._is_worth(level) else None

    def hidden_bound(self, level: int) -> float:
        """The bound on dHidden's error if the columns from `level` on are dropped."""
        if level not in self._hidden_bounds:
            weights = self._distances.masked_fill(self.level_of < level, 0.0)
            tails = self._grads.magnitudes_times(weights.unsqueeze(1))
            self._hidden_bounds[level] = float(torch.linalg.vector_norm(tails))
        return self._hidden_bounds[level]

    def weight_bound(self, level: int) -> float:
        """The bound on dWeight's error."""
        return float(self._weight_bounds[level])

    def num_kept(self, level: int) -> int:
        """How many columns are kept if those from `level` on are dropped."""
        return int(self._num_kept[level])

    def columns(self, first: int, end: int) -> Tensor:
        """The columns on levels first to end - 1, ascending."""
        return ((self.level_of >= first) & (self.level_of < end)).nonzero().squeeze(1)

    def _is_worth(self, level: int) -> bool:
        return level < NUM_LEVELS and self._num_kept[level] <= MOST_KEPT * len(self.level_of)

    def _suggested(self, first: int, most_hidden: float) -> int:
        """The lowest level from `first` on whose bound on dHidden's error, estimated from a few rows, is low enough."""
        if not self._is_worth(first):
            return first
        num_rows = len(self._grads.scale)
        some = self._grads.every_nth_row(max(1, num_rows // ROWS_IN_ESTIMATE))
        weights = self._distances.new_zeros(len(self.level_of), NUM_LEVELS - first)
        place = (self.level_of - first).clamp_(min=0).unsqueeze(1)
        weights.scatter_(1, place, self._distances.masked_fill(self.level_of < first, 0.0).unsqueeze(1))
        tails = _sums_from(some.magnitudes_times(weights).double())[:, :-1]
        estimates = torch.linalg.vector_norm(tails, dim=0) * math.sqrt(num_rows / max(len(some.scale), 1))
        is_low = estimates <= most_hidden
        return first + (int(is_low.int().argmax()) if bool(is_low.any()) else len(is_low))


@dataclass(frozen=True)
class ChunkGrads:
    """G = scale[:, None] * grad_logits of a chunk, with the hidden states and the chosen column of each row."""

    grad_logits: Tensor  # [n, V]
    scale: Tensor  # [n]
    hidden: Tensor  # [n, H]
    chosen_ids: Tensor  # [n] int64
    is_signed: bool  # whether numbers below 0 may stand in other columns than the chosen ones

    def every_nth_row(self, n: int) -> "ChunkGrads":
        """Rows 0, n, 2n and so on, as views."""
        return ChunkGrads(
            self.grad_logits[::n], self.scale[::n], self.hidden[::n], self.chosen_ids[::n], self.is_signed
        )

    def column_squares(self) -> Tensor:
        """The squared norm of each column of G, [V] float64."""
        num_rows, vocab_size = self.grad_logits.shape
        largest = self.scale.abs().amax() if num_rows else self.scale.new_zeros(())
        weights = (self.scale / largest).square_().nan_to_num_(nan=0.0)
        squares, zero = self.grad_logits.new_empty(vocab_size), self.scale.new_zeros(())
        for block in _products.column_blocks(self.grad_logits, max(num_rows, 1)):
            part = self.grad_logits[:, block]
            # squares of small probabilities would be subnormal numbers, with which a CPU is ten times slower
            squared = torch.addcmul(zero, part, part, value=UNIT)
            torch.mv(squared.T, weights, out=squares[block])
        return squares.double().mul_(largest.double().square() / UNIT)

    def column_sums(self) -> Tensor:
        """The sum of |G| over each column, [V]."""
        grad_logits, weights = self.grad_logits, self.scale.abs()
        if not self.is_signed:
            chosen = grad_logits.gather(1, self.chosen_ids.unsqueeze(1)).squeeze(1)
            sums = torch.mv(grad_logits.T, weights)
            return sums.index_add_(0, self.chosen_ids, (chosen.abs() - chosen).mul_(weights))
        sums = grad_logits.new_empty(grad_logits.shape[1])
        for block in _products.column_blocks(grad_logits, max(len(grad_logits), 1)):
            torch.mv(grad_logits[:, block].abs().T, weights, out=sums[block])
        return sums

    def magnitudes_times(self, weights: Tensor) -> Tensor:
        """|G| @ weights [V, k], where the chosen columns have weight 0; [n, k]."""
        grad_logits = self.grad_logits
        if self.is_signed:
            product = grad_logits.new_zeros(len(grad_logits), weights.shape[1])
            for block in _products.column_blocks(grad_logits, max(len(grad_logits), 1)):
                product.addmm_(grad_logits[:, block].abs(), weights[block])
        elif weights.shape[1] == 1:
            product = torch.mv(grad_logits, weights[:, 0]).unsqueeze(1)  # twice as fast as a product with one column
        else:
            product = grad_logits @ weights
        return product.mul_(self.scale.abs().unsqueeze(1))


class ProductMemory:
    """Operands of products with at most `COLUMNS_AT_ONCE` columns, in memory that all of them share: new memory costs
    as much time as such a product."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        kind: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        self._slopes = torch.empty(0, **kind)
        self._rows = torch.empty(min(COLUMNS_AT_ONCE, len(weight)), weight.shape[1], **kind)

    def columns(self, grad_logits: Tensor, columns: Tensor) -> Tensor:
        """grad_logits [n, V][:, columns], [n, k]."""
        num_rows, num_columns = len(grad_logits), len(columns)
        if self._slopes.numel() < num_rows * num_columns:
            self._slopes = self._slopes.new_empty(num_rows * len(self._rows))
        out = self._slopes[: num_rows * num_columns].view(num_rows, num_columns)
        return torch.gather(grad_logits, 1, columns.expand(num_rows, -1), out=out)

    def rows(self, weight: Tensor, columns: Tensor) -> Tensor:
        """weight [V, H][columns], [k, H]."""
        out = self._rows[: len(columns)]
        if weight.dtype == out.dtype:
            return torch.index_select(weight, 0, columns, out=out)
        return out.copy_(weight.index_select(0, columns))

    def sums(self, total: Tensor, columns: Tensor, is_written: Tensor) -> Tensor:
        """total [V, H][columns], [k, H], with zeros where `is_written` [k] is False.

        Memory that nobody has written yet is not read: the operating system would provide each page twice, first for
        the read and then for the write.
        """
        if not bool(is_written.any()):
            return self._rows[: len(columns)].zero_()
        written = columns[is_written.int().argmax()]
        rows = self.rows(total, torch.where(is_written, columns, written))
        return rows.index_fill_(0, (~is_written).nonzero().squeeze(1), 0.0)


class KeptColumns:
    """Chooses the columns of each chunk, and adds up the bounds of a call."""

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, tolerance: float, wants_grad: tuple[bool, bool], num_chunks: int
    ) -> None:
        """`tolerance`: the largest relative error of dHidden and dWeight; `wants_grad`: which of them are computed;
        `num_chunks`: how many chunks will share dWeight's error."""
        self.tolerance, self._wants_grad, self._num_chunks = tolerance, wants_grad, num_chunks
        self.mean_row, self._distances = _distances_from_mean(weight, dtype)  # [H], [V]
        self.memory = ProductMemory(weight, dtype)
        self._hidden_share = FIRST_HIDDEN_SHARE
        self._guess: int | None = None
        self._is_kept = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)  # in any chunk
        self._squared_hidden_bound = self._squared_hidden_norm = self._weight_bound = 0.0
        self._rows_seen = self._rows_kept = 0.0

    def choose(self, grads: ChunkGrads) -> tuple[Levels, int | None]:
        """Levels of a chunk, and the lowest one to drop (None: keep all columns)."""
        chosen = grads.grad_logits.gather(1, grads.chosen_ids.unsqueeze(1)).squeeze(1) * grads.scale
        num_shares = max(len(chosen), 1) if self._wants_grad[1] else 1
        highest = self.tolerance**2 * float(chosen.double().square().sum()) / num_shares
        levels = Levels(grads, highest, self._distances, wants_weight=self._wants_grad[1])
        most_hidden = self.tolerance * self._hidden_share * levels.hidden_norm if self._wants_grad[0] else math.inf
        # chunks whose gradients have nothing in common add up to the root of their number
        share = WEIGHT_SHARE / math.sqrt(self._num_chunks)
        most_weight = self.tolerance * share * levels.weight_norm if self._wants_grad[1] else math.inf
        level = levels.lowest(most_hidden, most_weight, self._guess)
        self._guess = None if level is None else self._next_guess(levels, level, most_hidden)
        return levels, level

    def _next_guess(self, levels: Levels, level: int, most_hidden: float) -> int:
        """The level to try first in the next chunk: one lower if it may be dropped, or if that would gain much."""
        has_slack = most_hidden < math.inf and levels.hidden_bound(level) <= 0.5 * most_hidden
        gains_much = levels.num_kept(level) >= TRIED_FROM_SHARE * len(levels.level_of)
        return max(level - 1, 1) if has_slack or gains_much else level

    def level_for(self, levels: Levels, level: int, grad_hidden: Tensor) -> int:
        """The lowest level that can be dropped now that the products have shown dHidden of the chunk [n, H] with
        `level` dropped: `level` if its bound holds, else a higher one (L: none)."""
        norm, bound = float(grad_hidden.norm()), levels.hidden_bound(level)
        if levels.hidden_norm > 0.0:
            self._hidden_share = SAFETY * norm / levels.hidden_norm
        if bound <= self.tolerance * (norm - bound):
            return level
        most = self.tolerance * max(norm - bound, 0.0) / (1.0 + self.tolerance)
        lowest = levels.lowest(most, math.inf)
        return NUM_LEVELS if lowest is None else max(lowest, level + 1)

    def were_kept(self, columns: Tensor) -> Tensor:
        """Whether an earlier chunk has kept each column, [k] bool."""
        return self._is_kept[columns]

    def record(
        self, grad_hidden: Tensor | None, num_rows: int, levels: Levels | None = None, level: int = NUM_LEVELS
    ) -> None:
        """Add a chunk's norm and its bounds; without `levels`, its products were dense."""
        if grad_hidden is not None:
            self._squared_hidden_norm += float(grad_hidden.norm()) ** 2
        self._rows_seen += num_rows
        if levels is None:
            self._rows_kept += num_rows
            self._is_kept.fill_(True)
            return
        self._is_kept.logical_or_(levels.level_of < level)
        self._rows_kept += num_rows * levels.num_kept(level) / len(levels.level_of)
        if self._wants_grad[0]:
            self._squared_hidden_bound += levels.hidden_bound(level) ** 2
        self._weight_bound += levels.weight_bound(level)

    def error_bound(self, grad_weight: Tensor | None) -> float:
        """The larger of the bounds on the relative errors of dHidden and dWeight (in Frobenius norms)."""
        bound = 0.0
        if self._wants_grad[0]:
            bound = _relative(math.sqrt(self._squared_hidden_bound), math.sqrt(self._squared_hidden_norm))
        if self._wants_grad[1] and grad_weight is not None and self._weight_bound > 0.0:
            kept = torch.split(self._is_kept.nonzero().squeeze(1), COLUMNS_AT_ONCE)
            norm = math.sqrt(sum(float(self.memory.rows(grad_weight, columns).norm()) ** 2 for columns in kept))
            bound = max(bound, _relative(self._weight_bound, norm))
        return bound

    @property
    def kept_share(self) -> float:
        """Mean share of the vocabulary's columns in the gradient products."""
        return self._rows_kept / self._rows_seen if self._rows_seen else 0.0


def _relative(bound: float, norm: float) -> float:
    """The bound over the least norm of the exact gradient, given the norm of one that is off by at most `bound`."""
    if bound == 0.0:
        return 0.0
    return bound / (norm - bound) if norm > bound else math.inf


def _distances_from_mean(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean [H] of some rows of weight [V, H], and the distance of each row from it [V], in `dtype`.

    The bounds hold for any row in place of the mean.
    """
    mean = weight[:: max(1, len(weight) // ROWS_IN_MEAN)].to(dtype).mean(dim=0)
    distances = []
    for _, part in _products.widened(weight, dtype):
        for rows in torch.split(part, _launch.rows_in_cache(part)):
            squares = torch.linalg.vector_norm(rows, dim=1).square_()
            slack = (squares + mean.dot(mean)).mul_(rounding_of_squares(weight.shape[1], dtype))
            squares = squares.addmv_(rows, mean, alpha=-2.0).add_(mean.dot(mean)).clamp_(min=0.0)
            distances.append(squares.add_(slack).sqrt_())
    return mean, torch.cat(distances)


def rounding_of_squares(hidden_size: int, dtype: torch.dtype) -> float:
    """The largest rounding error of |a|^2 - 2 a.b + |b|^2 over |a|^2 + |b|^2, for sums of H terms in any order."""
    return (hidden_size + 8) * torch.finfo(dtype).eps


def _spectral_norm_bound(rows: Tensor) -> float:
    """A bound on the largest singular value: the square root of the Frobenius norm of the Gram matrix."""
    gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    return math.sqrt(float(gram.double().norm()))


def _sums_from(values: Tensor) -> Tensor:
    """Sums of values [..., L] over levels k and above, [..., L + 1]."""
    return torch.nn.functional.pad(values.flip(-1).cumsum(-1).flip(-1), (0, 1))
