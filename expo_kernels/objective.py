"""`Objective`: every static choice of the policy loss, checked in its constructor."""

import ast
import functools
import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

RatioLevel = Literal["token", "sequence", "sequence_token"]
Surrogate = Literal["clip", "cispo", "sapo", "gmpo", "vespo", "dppo_tv", "clip_cov", "kl_cov"]
KlEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["sequence", "sum", "token", "constant", "none"]
RolloutCorrection = Literal["token", "sequence", "token_mask", "sequence_mask", "geometric_mask"]

# the surrogates that use a setting; the others accept only its default, since they would ignore any other value
READ_BY: dict[str, tuple[Surrogate, ...]] = {
    "clip_low": ("clip", "cispo", "gmpo", "dppo_tv", "clip_cov"),
    "clip_high": ("clip", "cispo", "gmpo", "dppo_tv", "clip_cov"),
    "dual_clip": ("clip",),
    "ratio": ("clip", "cispo", "sapo"),
    "sapo_tau_pos": ("sapo",),
    "sapo_tau_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
    "cov_ratio": ("clip_cov", "kl_cov"),
    "clip_cov_low": ("clip_cov",),
    "clip_cov_high": ("clip_cov",),
    "kl_cov_coef": ("kl_cov",),
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The static choices of the loss; what changes each step (beta, advantages, normalizer) is passed to the loss.

    Source: the clipped surrogate is FG-ExPO (arXiv 2605.11403) eq. 2 and the penalty is eq. 3; each field names the
    papers of its other choices.

    Raises:
        ValueError: a value is out of range, or a setting has no effect with the others.
    """

    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low. No unit, in [0, 1]; with surrogate "cispo" also above 1, which is no lower
    bound, as 1 is: verl's recipe has 10. With "dppo_tv" the bound of the probability's decrease. Default: PPO (arXiv
    1707.06347)."""

    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high. No unit, >= 0; with surrogate "cispo" > -1, where TRL's default is -0.8.
    DAPO (arXiv 2503.14476) uses 0.28. With "dppo_tv" the bound of the probability's increase."""

    dual_clip: float | None = None
    """For A < 0 the loss is capped at -dual_clip * A. No unit, > 1; None: no cap. Dual-clip PPO (arXiv 1912.09729) uses
    3. Only for surrogate "clip"."""

    ratio: RatioLevel = "token"
    """"token": exp(logp - old); "sequence": exp of the mean of logp - old over the sequence's tokens (GSPO, arXiv
    2507.18071 eq. 7); "sequence_token": the same value, with the gradient of the token's own log-prob (GSPO-token,
    eq. 14), which differs where the advantages of a sequence do. The surrogates "gmpo" and "vespo" define a sequence's
    ratio themselves; the weight of "cispo" has no gradient, so that it takes "token" or "sequence"."""

    log_ratio_clamp: float = 20.0
    """Log-ratios are clamped to +-log_ratio_clamp nats before exp, so that no log-prob can overflow; a clamped
    log-ratio has a gradient of 0. In (0, 80]."""

    surrogate: Surrogate = "clip"
    """"clip": PPO; "cispo": the clipped ratio as a constant weight (arXiv 2506.13585); "sapo": a smooth gate (arXiv
    2511.20347); "gmpo": the geometric mean of the sequence's clipped token ratios (arXiv 2507.20673); "vespo": a smooth
    function of the sequence's ratio as a constant weight (arXiv 2602.10693); "dppo_tv": 0 for a token whose probability
    has moved too far (DPPO's binary total variation, arXiv 2602.04879); "clip_cov": the clip, and 0 for tokens drawn
    from those of large covariance; "kl_cov": no clip, and a penalty for the tokens of the largest covariances (arXiv
    2505.22617). These two depend on all log-probs of the call, and are in `expo_loss_from_logps` only. "sapo", "vespo"
    and "kl_cov" have no clip range."""

    sapo_tau_pos: float = 1.0
    """Sharpness of SAPO's gate for A > 0. No unit, > 0. Default: the SAPO paper."""

    sapo_tau_neg: float = 1.05
    """Sharpness of SAPO's gate for A <= 0. No unit, > 0. Default: the SAPO paper."""

    vespo_k_pos: float = 2.0
    """Exponent of the sequence's ratio in VESPO's weight for A >= 0; it reduces the weight of small ratios. No unit,
    > 0. Default, like the next three: TRL's."""

    vespo_lambda_pos: float = 3.0
    """Decay rate of VESPO's weight for A >= 0; it reduces the weight of large ratios. No unit, > 0."""

    vespo_k_neg: float = 3.0
    """The exponent for A < 0. No unit, > 0."""

    vespo_lambda_neg: float = 2.0
    """The decay rate for A < 0. No unit, > 0."""

    cov_ratio: float = 2e-4
    """Share of the call's tokens that "clip_cov" draws, or that "kl_cov" penalizes, at least one token. In (0, 1].
    Default, like the next three: verl's."""

    clip_cov_low: float = 1.0
    """Clip-Cov draws from tokens whose covariance exceeds it: (logp - its mean) * (A - its mean), means over the call's
    tokens, in nats times the unit of A."""

    clip_cov_high: float = 5.0
    """Clip-Cov draws from tokens whose covariance is below it. > clip_cov_low."""

    kl_cov_coef: float = 1.0
    """Weight of KL-Cov's penalty per token, |logp - old|. > 0."""

    kl: KlEstimator = "k3"
    """Penalty per token in nats, with x = ref - logp: "k1" -x, "k2" x^2 / 2, "k3" exp(x) - x - 1 (Schulman's
    estimators; k3 is FG-ExPO eq. 3). Only k3 clamps x by log_ratio_clamp: the other two have no exp."""

    kl_importance_weighted: bool = False
    """Multiply the penalty by the token's ratio, gradient included (DeepSeek-V3.2, arXiv 2512.02556)."""

    aggregation: Aggregation = "sequence"
    """"sequence": mean over sequences of the mean over tokens (GRPO); "sum": mean over sequences of the sum over tokens
    (LUSPO, arXiv 2602.05261); "token": mean over all tokens (DAPO); "constant": sum over tokens / (sequences *
    max_completion_length) (Dr. GRPO, arXiv 2503.20783); "none": the loss of each token, for an aggregation of your own,
    only in `expo_loss_from_logps`: the other losses compute their gradient before they know a weight of each token."""

    max_completion_length: int | None = None
    """Number of tokens, > 0: the divisor of aggregation "constant". Only for that aggregation."""

    temperature: float = 1.0
    """Logits are divided by it before the softmax. > 0. It must be the temperature of the sampling; where
    replies or tokens had different ones, the `temperature` of the call."""

    logit_softcap: float | None = None
    """Logits become cap * tanh(logits / cap) before the temperature. > 0; None: no cap. Gemma 2 uses 30."""

    rollout_correction: RolloutCorrection | None = None
    """Constant weight of the surrogate, clamped to [rollout_floor, rollout_cap] (truncated importance sampling).
    "token": exp(old - rollout); "sequence": exp of the sum of old - rollout over the sequence. "token_mask" (IcePop,
    arXiv 2510.18855) and "sequence_mask": the weight is 0 outside these bounds instead. "geometric_mask": 1 if exp of
    the mean of old - rollout over the sequence, a geometric mean of ratios, is within these bounds, else 0 (Geo-RS of
    verl's `rollout_corr_helper.py`; Liu et al. 2025, richardli.xyz/rl-collapse)."""

    rollout_floor: float = 0.0
    """Lower bound of that weight. No unit, in [0, rollout_cap]. IcePop uses 0.5, Geo-RS 0.999."""

    rollout_cap: float = 2.0
    """Upper bound of that weight. No unit, > 0. Default: verl's. IcePop uses 5, Geo-RS 1.001."""

    def __post_init__(self) -> None:
        _one_of("ratio", self.ratio, get_args(RatioLevel))
        _one_of("surrogate", self.surrogate, get_args(Surrogate))
        _one_of("kl", self.kl, get_args(KlEstimator))
        _one_of("aggregation", self.aggregation, get_args(Aggregation))
        if self.rollout_correction is not None:
            _one_of("rollout_correction", self.rollout_correction, get_args(RolloutCorrection))
        # a ratio is > 0, so any bound <= 0 is none; with other surrogates a large value is more likely a mistake
        is_cispo = self.surrogate == "cispo"
        _in_range("clip_low", self.clip_low, 0.0, math.inf if is_cispo else 1.0)
        _in_range("clip_high", self.clip_high, -1.0 if is_cispo else 0.0, math.inf, above=is_cispo)
        if self.clip_high < -self.clip_low:
            raise ValueError(
                f"clip_high is {self.clip_high} and clip_low is {self.clip_low}; expected 1 + clip_high, the ratio's "
                "upper bound, to be no lower than 1 - clip_low"
            )
        _in_range("log_ratio_clamp", self.log_ratio_clamp, 0.0, 80.0, above=True)
        for name in ("temperature", "rollout_cap", *(name for name in READ_BY if name.startswith(("sapo", "vespo")))):
            _in_range(name, getattr(self, name), 0.0, math.inf, above=True)
        _in_range("cov_ratio", self.cov_ratio, 0.0, 1.0, above=True)
        _in_range("kl_cov_coef", self.kl_cov_coef, 0.0, math.inf, above=True)
        _in_range("clip_cov_low", self.clip_cov_low, -math.inf, math.inf)
        _in_range("clip_cov_high", self.clip_cov_high, self.clip_cov_low, math.inf, above=True)
        _in_range("rollout_floor", self.rollout_floor, 0.0, self.rollout_cap)
        if self.logit_softcap is not None:
            _in_range("logit_softcap", self.logit_softcap, 0.0, math.inf, above=True)
        if self.dual_clip is not None:
            _in_range("dual_clip", self.dual_clip, 1.0, math.inf, above=True)
        if not isinstance(self.kl_importance_weighted, bool):
            raise TypeError(f"kl_importance_weighted is {self.kl_importance_weighted!r}; expected True or False")
        self._check_combinations()
        values = [getattr(self, field.name) for field in fields(self)]
        # float() because the repr of NumPy's floats differs; built here, so that a trace sees a constant
        text = str([float(value) if isinstance(value, float) else value for value in values])
        object.__setattr__(self, "_text", text)

    @property
    def text(self) -> str:
        """All settings in the order of their declaration, as `from_text` reads them; an op takes this string."""
        text: str = self.__dict__["_text"]
        return text

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_text(text: str) -> "Objective":
        """The objective with this `text`."""
        names = (field.name for field in fields(Objective))
        return Objective(**dict(zip(names, ast.literal_eval(text), strict=True)))

    @property
    def spans_sequences(self) -> bool:
        """Whether the surrogate of a token depends on the current log-probs of its whole sequence."""
        return self.ratio != "token" or self.surrogate in ("gmpo", "vespo")

    @property
    def spans_batches(self) -> bool:
        """Whether the surrogate of a token depends on the log-probs of all tokens of the call."""
        return self.surrogate in ("clip_cov", "kl_cov")

    @property
    def corrects_sequences(self) -> bool:
        """Whether the rollout correction is one number per sequence."""
        return self.rollout_correction in ("sequence", "sequence_mask", "geometric_mask")

    @property
    def masks_rollouts(self) -> bool:
        """Whether a rollout correction out of bounds is replaced by 0 rather than by the bound."""
        return self.rollout_correction in ("token_mask", "sequence_mask", "geometric_mask")

    def _check_combinations(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, surrogates in READ_BY.items():
            if self.surrogate not in surrogates and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f'{name}={getattr(self, name)!r} has no effect with surrogate "{self.surrogate}"; '
                    f"use surrogate={' or '.join(map(repr, surrogates))} or leave {name} out"
                )
        if self.surrogate == "cispo" and self.ratio == "sequence_token":
            raise ValueError(
                'ratio="sequence_token" has no effect with surrogate "cispo": it differs from "sequence" in the '
                'gradient of the ratio, which is a constant there; use ratio="sequence"'
            )
        if self.rollout_correction is None:
            for name in ("rollout_floor", "rollout_cap"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect without rollout_correction; set it or leave "
                        f"{name} out"
                    )
        if self.surrogate == "vespo" and self.corrects_sequences:
            raise ValueError(
                f'rollout_correction="{self.rollout_correction}" does not go with surrogate "vespo", '
                'whose weight takes the correction of each token in; use "token" or "token_mask"'
            )
        self._check_length()

    def _check_length(self) -> None:
        length = self.max_completion_length
        if self.aggregation == "constant":
            if length is None:
                raise ValueError('aggregation="constant" divides by max_completion_length; give it (tokens)')
            if not isinstance(length, int) or isinstance(length, bool):
                raise TypeError(f"max_completion_length is {length!r}; expected a whole number of tokens")
            if length <= 0:
                raise ValueError(f"max_completion_length is {length}; expected a number of tokens > 0")
        elif length is not None:
            raise ValueError(
                f'max_completion_length={length} has no effect with aggregation "{self.aggregation}"; '
                'use aggregation="constant" or leave it out'
            )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def _in_range(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a number")
    # infinity is refused: every setting has a finite value in use
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        bounds = f"{'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
        raise ValueError(f"{name} is {value}; expected a finite number {bounds}")
