"""`CurriculumTable`: smoothed pass rates of all questions, and sampling by Gaussian weight (GCS).

Source: FG-ExPO (arXiv 2605.11403), eq. 6 (smoothing) and eq. 7 (weights, Pr proportional to w); MoPPS (arXiv
2507.04632) for the draws from a posterior.
Letters: Q questions, K of them in a call. The state is float32; sampling uses float64.
"""

from typing import Any

import torch
from torch import Tensor

from expo_kernels import _launch, reference
from expo_kernels import _validate as validate

MIN_STD = 1e-6  # pass rates are float32: a narrower window is below their resolution
ESTIMATES = ("ema", "counted", "posterior")
_SETTINGS = ("num_questions", "mean", "std", "momentum", "initial_pass_rate", "estimate")


class CurriculumTable:
    """Samples questions: those whose smoothed pass rate is close to `mean` are the most likely.

    Args:
        num_questions: Q, > 0.
        mean: in [0, 1], the pass rate with the largest weight.
        std: >= 1e-6, width of the window in units of pass rate; a large std is close to uniform sampling.
        momentum: in [0, 1): share of the old pass rate that an update keeps.
        initial_pass_rate: in [0, 1], the pass rate of every question before its first update.
        estimate: how pass rates are smoothed. "ema" (the paper's): an update keeps `momentum` of the old rate, so that
            one visit changes little: after ten visits at 0.9, `initial_pass_rate` still has a weight of a third.
            "counted" (ours): the mean of all visits until there are 1 / (1 - momentum) of them, then the moving
            average; an update keeps min(momentum, visits / (visits + 1)) of the old rate, so that `initial_pass_rate`
            matters only before the first visit. "posterior" (MoPPS): pass rates as with "counted", but each draw weighs
            a question by a pass rate drawn from its Beta posterior, so that seldom visited questions are tried.
        group_size: > 0, replies that each pass rate given to `update` is the mean of; only "posterior" uses it.
        device: the device of the table.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting has the wrong type.
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
        group_size: int = 1,
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
        validate.whole_number("group_size", group_size, low=1)
        self.num_questions, self.estimate, self.group_size = num_questions, estimate, group_size
        self.mean, self.std, self.momentum = float(mean), float(std), float(momentum)
        self.initial_pass_rate = float(initial_pass_rate)
        self._pass_rates = torch.full((num_questions,), self.initial_pass_rate, dtype=torch.float32, device=device)
        self._visits = torch.zeros(num_questions, dtype=torch.int64, device=device)
        self._log_weights = self._log_weights_of(self._pass_rates)
        settings = (self.momentum, self.mean, self.std, float(estimate != "ema"))
        self._settings = torch.tensor(settings, dtype=torch.float64, device=device)  # as the op takes them

    @property
    def pass_rates(self) -> Tensor:
        """Smoothed pass rates, [Q] float32 in [0, 1]; the table's own memory, do not modify."""
        return self._pass_rates

    @property
    def visits(self) -> Tensor:
        """Number of updates of each question, [Q] int64; the table's own memory, do not modify."""
        return self._visits

    @property
    def weights(self) -> Tensor:
        """Sampling weights by eq. 7 of the smoothed pass rates, not normalised, [Q] float32 in [0, 1]."""
        return self._log_weights.exp()

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum w)^2 / sum w^2, 0-dim float32, in [1, Q]; Q if all weights are equal."""
        log_weights = self._log_weights.double()
        return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().float()

    def update(self, question_ids: Tensor, pass_rates: Tensor) -> None:
        """Update the smoothed pass rates of the given questions in place (eq. 6, or as `estimate` says).

        Args:
            question_ids: [K] integers in [0, Q). Repeated ids count as one update with the mean of their rates, in any
                order.
            pass_rates: [K] in [0, 1], mean reward of each question's rollouts.

        Raises:
            ValueError: shapes differ, or ids or rates are out of range (checked on CPU).
            TypeError: an argument has the wrong type.
        """
        validate.integers("question_ids", question_ids)
        validate.floating("pass_rates", pass_rates)
        if question_ids.dim() != 1:
            raise ValueError(f"question_ids has shape {list(question_ids.shape)}; expected [K]")
        validate.same_shape("pass_rates", pass_rates, "question_ids", question_ids.shape)
        table = (self._pass_rates, self._visits, self._log_weights)
        _update(question_ids, pass_rates.detach(), *table, self._settings)

    def sample(self, k: int, *, generator: torch.Generator | None = None, replacement: bool = False) -> Tensor:
        """Draw k question ids, [k] int64 on the device, each with Pr proportional to w among those not yet drawn.

        The ids are in the order of the draws: the first j of k are those that a call with k = j returns.

        Args:
            k: >= 1, and at most Q without replacement.
            generator: a generator on the table's device; None: the device's default.
            replacement: whether a question may be drawn twice.

        Raises:
            ValueError: k is out of range.
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
        log_weights = self._drawn_log_weights(generator)
        if _launch.use_kernels(log_weights):
            seed = torch.randint(2**62, (1,), dtype=torch.int64, device=self._pass_rates.device, generator=generator)
            keys: Tensor = _race(log_weights, seed)
            return keys.topk(k).indices
        # exponential race: the k first arrivals at rates w are a sample without replacement. In logs, so that tiny
        # weights do not underflow, and in float64: float32 has too few distinct uniforms for a million questions
        race = self._uniforms(self.num_questions, generator).neg_().log1p_().neg_().log_().neg_()
        return race.add_(log_weights).topk(k).indices

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes: copies of the tensors, and the settings."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {**settings, "pass_rates": self._pass_rates.clone(), "visits": self._visits.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a table with the same settings; an old state without `estimate` is read as "ema".

        Raises:
            ValueError: an entry is missing or unknown, or a setting or shape differs from this table's.
            TypeError: an entry has the wrong type.
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

    def _drawn_log_weights(self, generator: torch.Generator | None) -> Tensor:
        """The log-weights of one call of `sample`, [Q] float32: those of the smoothed pass rates, or of drawn ones."""
        if self.estimate != "posterior":
            return self._log_weights
        parameters = reference.beta_posterior(self._pass_rates, self._visits, self.momentum, self.group_size)
        right, wrong = (torch._standard_gamma(each, generator=generator) for each in parameters)
        return self._log_weights_of((right / (right + wrong)).float())

    def _uniforms(self, count: int, generator: torch.Generator | None) -> Tensor:
        return torch.rand(count, dtype=torch.float64, device=self._pass_rates.device, generator=generator)

    def _sample_with_replacement(self, k: int, generator: torch.Generator | None) -> Tensor:
        # torch.multinomial takes at most 2^24 categories and sums in float32
        log_weights = self._drawn_log_weights(generator)
        weights = (log_weights - log_weights.max()).double().exp()
        cumulative = weights.cumsum(0)
        below_total = torch.nextafter(cumulative[-1], torch.zeros_like(cumulative[-1]))
        points = torch.minimum(self._uniforms(k, generator) * cumulative[-1], below_total)
        # the first cumulative sum above the point; a question of weight 0 adds nothing to it and is never drawn
        return torch.searchsorted(cumulative, points, right=True)


@torch.library.custom_op("expo_kernels::update_curriculum", mutates_args={"pass_rates", "visits", "log_weights"})
def _update(
    question_ids: Tensor, new_rates: Tensor, pass_rates: Tensor, visits: Tensor, log_weights: Tensor, settings: Tensor
) -> None:
    """`CurriculumTable.update`; `settings` are momentum, mean, std and whether visits are counted, [4] float64."""
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
    """Keys of the kernels' exponential race, [Q] float64; the k largest win. `seed` is [1] int64."""
    from expo_kernels._triton import curriculum as kernels

    return kernels.launch_race(log_weights, seed)


@_race.register_fake
def _(log_weights: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(log_weights, dtype=torch.float64)


def _mean_by_id(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids in ascending order and the mean value of each; equal bits for any order of the pairs."""
    order = values.argsort(stable=True)
    order = order[ids[order].argsort(stable=True)]
    distinct, inverse, counts = torch.unique_consecutive(ids[order], return_inverse=True, return_counts=True)
    sums = values.new_zeros(distinct.numel()).index_add(0, inverse, values[order])
    return distinct, sums / counts
