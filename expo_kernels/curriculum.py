"""`CurriculumTable`: smoothed pass rates of all questions, and the draw by Gaussian weight (GCS).

Source: FG-ExPO (arXiv 2605.11403), eq. 6 (smoothing) and eq. 7 (weights, Pr proportional to w).
Letters: Q questions, K of them in a call. State is float32, drawing is float64.
"""

from typing import Any

import torch
from torch import Tensor

from expo_kernels import _launch, reference
from expo_kernels import _validate as validate

MIN_STD = 1e-6  # pass rates are float32: a narrower window could not tell two of them apart
ESTIMATES = ("ema", "counted")
_SETTINGS = ("num_questions", "mean", "std", "momentum", "initial_pass_rate", "estimate")


class CurriculumTable:
    """Which questions to draw next: the nearer a question's smoothed pass rate to `mean`, the likelier.

    Args:
        num_questions: Q, > 0.
        mean: pass rate in [0, 1] with the greatest weight.
        std: >= 1e-6, width of the window in units of pass rate; large: uniform, small: sharp.
        momentum: in [0, 1): share of the old pass rate that an update keeps.
        initial_pass_rate: in [0, 1], of every question before its first update.
        estimate: how pass rates are smoothed. "ema" (the paper's): an update keeps `momentum` of the old rate, so one
            visit says little: after ten at 0.9, a third of `initial_pass_rate` is still in it. "counted" (ours): the
            mean of all visits until there are 1 / (1 - momentum) of them, the moving average after; a share
            min(momentum, visits / (visits + 1)) is kept, and `initial_pass_rate` counts before the first visit only.
        device: where the table lives.

    Raises:
        ValueError: a setting out of range.
        TypeError: a setting of the wrong type.
    """

    def __init__(
        self,
        num_questions: int,
        *,
        mean: float = 0.5,
        std: float = 0.35,
        momentum: float = 0.9,
        initial_pass_rate: float = 0.5,
        estimate: str = "ema",
        device: torch.device | str = "cpu",
    ) -> None:
        validate.whole_number("num_questions", num_questions, low=1)
        validate.number("mean", mean, low=0.0, high=1.0)
        validate.number("std", std, low=MIN_STD)
        validate.number("momentum", momentum, low=0.0, high=1.0)
        if momentum == 1:
            raise ValueError("momentum is 1, so that no pass rate would ever move; expected a number < 1")
        validate.number("initial_pass_rate", initial_pass_rate, low=0.0, high=1.0)
        validate.choice("estimate", estimate, ESTIMATES)
        self.num_questions, self.estimate = num_questions, estimate
        self.mean, self.std, self.momentum = float(mean), float(std), float(momentum)
        self.initial_pass_rate = float(initial_pass_rate)
        self._pass_rates = torch.full((num_questions,), self.initial_pass_rate, dtype=torch.float32, device=device)
        self._visits = torch.zeros(num_questions, dtype=torch.int64, device=device)
        self._log_weights = self._log_weights_of(self._pass_rates)
        settings = (self.momentum, self.mean, self.std, float(estimate == "counted"))
        self._settings = torch.tensor(settings, dtype=torch.float64, device=device)  # for ops, which read no settings

    @property
    def pass_rates(self) -> Tensor:
        """Smoothed pass rates, [Q] float32 in [0, 1]: the table's own memory, read only."""
        return self._pass_rates

    @property
    def visits(self) -> Tensor:
        """Number of updates in which each question took part, [Q] int64: the table's own memory, read only."""
        return self._visits

    @property
    def weights(self) -> Tensor:
        """Eq. 7, not normalised: [Q] float32 in [0, 1]."""
        return self._log_weights.exp()

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum w)^2 / sum w^2, 0-dim float32, in [1, Q]: Q when all weights are equal."""
        log_weights = self._log_weights.double()
        return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().float()

    def update(self, question_ids: Tensor, pass_rates: Tensor) -> None:
        """Smooth the pass rates of the given questions in place (eq. 6, or as `estimate` says); all others keep theirs.

        Args:
            question_ids: [K] integers in [0, Q). Ids that repeat count as one update with the mean of their rates,
                whatever their order.
            pass_rates: [K] in [0, 1], mean reward of each question's rollouts.

        Raises:
            ValueError: shapes that differ, ids or rates out of range (read on CPU).
            TypeError: an argument of the wrong type.
        """
        validate.integers("question_ids", question_ids)
        validate.floating("pass_rates", pass_rates)
        if question_ids.dim() != 1:
            raise ValueError(f"question_ids has shape {list(question_ids.shape)}; expected [K]")
        validate.same_shape("pass_rates", pass_rates, "question_ids", question_ids.shape)
        table = (self._pass_rates, self._visits, self._log_weights)
        _update(question_ids, pass_rates.detach(), *table, self._settings)

    def sample(self, k: int, *, generator: torch.Generator | None = None, replacement: bool = False) -> Tensor:
        """Draw k question ids, [k] int64 on the device, each draw with Pr proportional to w among those left.

        They stand in the order drawn: the first j of k are a draw of j, and the same one that a call for j would make.

        Args:
            k: >= 1, and at most Q without replacement.
            generator: of the table's device; None: the device's default.
            replacement: whether a question may come twice.

        Raises:
            ValueError: k out of range.
            TypeError: k is not a whole number.
        """
        validate.whole_number("k", k, low=1)
        if replacement:
            return self._sample_with_replacement(k, generator)
        if k > self.num_questions:
            raise ValueError(
                f"k is {k}, but there are {self.num_questions} questions; "
                "draw at most that many, or with replacement=True"
            )
        if _launch.use_kernels(self._log_weights):
            seed = torch.randint(2**62, (1,), dtype=torch.int64, device=self._pass_rates.device, generator=generator)
            keys: Tensor = _race(self._log_weights, seed)
            return keys.topk(k).indices
        # exponential race: the k first arrivals of rates w are a draw without replacement. In logs, so that
        # tiny weights still race, and in float64: float32 has too few distinct uniforms for a million racers
        race = self._uniforms(self.num_questions, generator).neg_().log1p_().neg_().log_().neg_()
        return race.add_(self._log_weights).topk(k).indices

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs: copies of the tensors, and the settings."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {**settings, "pass_rates": self._pass_rates.clone(), "visits": self._visits.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a table with the same settings; one without an `estimate`, older than it, is of "ema".

        Raises:
            ValueError: an entry missing or unknown, a setting or shape that differs from this table's.
            TypeError: an entry of the wrong type.
        """
        state = {"estimate": "ema", **state}
        expected = {*_SETTINGS, "pass_rates", "visits"}
        if set(state) != expected:
            raise ValueError(f"state holds {sorted(state)}; expected {sorted(expected)}")
        for name in _SETTINGS:
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"state has {name}={state[name]}, but this table {getattr(self, name)}; "
                    "make the table with the settings it was saved with"
                )
        validate.floating("state['pass_rates']", state["pass_rates"])
        validate.integers("state['visits']", state["visits"])
        for name, mine in (("pass_rates", self._pass_rates), ("visits", self._visits)):
            validate.same_shape(f"state[{name!r}]", state[name], "this table", mine.shape)
        validate.within("state['pass_rates']", state["pass_rates"], 0.0, 1.0)
        self._pass_rates.copy_(state["pass_rates"])
        self._visits.copy_(state["visits"])
        self._log_weights = self._log_weights_of(self._pass_rates)

    def _log_weights_of(self, pass_rates: Tensor) -> Tensor:
        return reference.log_curriculum_weights(pass_rates, self.mean, self.std)

    def _uniforms(self, count: int, generator: torch.Generator | None) -> Tensor:
        return torch.rand(count, dtype=torch.float64, device=self._pass_rates.device, generator=generator)

    def _sample_with_replacement(self, k: int, generator: torch.Generator | None) -> Tensor:
        # torch.multinomial takes at most 2^24 categories and sums in float32
        weights = (self._log_weights - self._log_weights.max()).double().exp()
        cumulative = weights.cumsum(0)
        below_total = torch.nextafter(cumulative[-1], torch.zeros_like(cumulative[-1]))
        points = torch.minimum(self._uniforms(k, generator) * cumulative[-1], below_total)
        # the first sum above the point: a question of weight 0 raises no sum and is never it
        return torch.searchsorted(cumulative, points, right=True)


@torch.library.custom_op("expo_kernels::update_curriculum", mutates_args={"pass_rates", "visits", "log_weights"})
def _update(
    question_ids: Tensor, new_rates: Tensor, pass_rates: Tensor, visits: Tensor, log_weights: Tensor, settings: Tensor
) -> None:
    """`CurriculumTable.update`; `settings` are momentum, mean, std and whether the estimate is counted, [4] float64."""
    validate.ids_in_range("question_ids", question_ids, pass_rates.numel(), "num_questions")
    validate.finite("pass_rates", new_rates)
    validate.within("pass_rates", new_rates, 0.0, 1.0)
    ids, rates = question_ids.to(pass_rates.device).long(), new_rates.to(pass_rates.device).double()
    if _launch.use_kernels(pass_rates):
        from expo_kernels._triton import curriculum as kernels

        kernels.launch_update(ids, rates, pass_rates, visits, log_weights, settings)
        return
    momentum, mean, std, is_counted = settings
    ids, means = _mean_by_id(ids, rates)
    momentum = torch.where(is_counted != 0, reference.counted_momentum(visits[ids].double(), momentum), momentum)
    smoothed = reference.smoothed_pass_rates(pass_rates[ids].double(), means, momentum).float()
    pass_rates[ids] = smoothed
    visits[ids] += 1
    log_weights[ids] = reference.log_curriculum_weights(smoothed, mean, std)


@torch.library.custom_op("expo_kernels::race", mutates_args=())
def _race(log_weights: Tensor, seed: Tensor) -> Tensor:
    """Keys of the kernels' draw, [Q] float64: the k largest are drawn. `seed` is [1] int64."""
    from expo_kernels._triton import curriculum as kernels

    return kernels.launch_race(log_weights, seed)


@_race.register_fake
def _(log_weights: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(log_weights, dtype=torch.float64)


def _mean_by_id(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids in rising order and the mean value of each; equal bits for any order of the pairs."""
    order = values.argsort(stable=True)
    order = order[ids[order].argsort(stable=True)]
    distinct, inverse, counts = torch.unique_consecutive(ids[order], return_inverse=True, return_counts=True)
    sums = values.new_zeros(distinct.numel()).index_add(0, inverse, values[order])
    return distinct, sums / counts
