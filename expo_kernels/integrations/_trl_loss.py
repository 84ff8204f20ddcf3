"""TRL's settings of the loss, which Liger's signature shares, converted to an `Objective`.

Source: TRL 1.16, `GRPOTrainer._compute_loss`; `tests/integrations` tests that both losses are equal.
"""

import dataclasses
import math
import warnings
from typing import Any

from torch import Tensor

from expo_kernels.objective import Aggregation, Objective, RatioLevel, Surrogate

# surrogate and aggregation of each loss type
LOSS_TYPES: dict[str, tuple[Surrogate, Aggregation]] = {
    "grpo": ("clip", "sequence"),
    "bnpo": ("clip", "token"),
    "dr_grpo": ("clip", "constant"),
    "dapo": ("clip", "token"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
    "luspo": ("clip", "sum"),
    "vespo": ("vespo", "token"),
}
# these are divided by the number of tokens of the whole accumulation window over all ranks, not of the call
WINDOW_LOSS_TYPES = ("dapo", "cispo", "vespo")
VESPO_SETTINGS = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
_LOG_RATIO_CLAMP = 20.0  # nats, in TRL and in `Objective`


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrlLoss:
    """TRL's settings of the loss, under TRL's names."""

    loss_type: str
    """One of `LOSS_TYPES`."""

    epsilon_low: float
    """Clip range below 1; unused by "sapo", "vespo" and "cispo", which TRL clips only from above."""

    epsilon_high: float
    """Clip range above 1; for "cispo" the upper bound of the ratio itself."""

    beta: float
    """Weight of the KL penalty; if 0, `use_bias_correction_kl` has no effect."""

    temperature: float
    """Sampling temperature."""

    importance_sampling_level: RatioLevel
    """Level of the ratio; "vespo" defines its ratio itself and requires "token"."""

    max_completion_length: int | None
    """Number of tokens, the divisor of "dr_grpo"; unused by the other loss types."""

    delta: float | None
    """Upper bound of the unclipped ratio; None: no bound."""

    use_bias_correction_kl: bool
    """Multiply the KL penalty by the ratio."""

    sapo_temperature_pos: float
    """Sharpness of SAPO's gate for positive advantages."""

    sapo_temperature_neg: float
    """Sharpness of SAPO's gate for all other advantages."""

    vespo_k_pos: float
    """Exponent of the sequence's ratio in VESPO's weight for advantages >= 0."""

    vespo_lambda_pos: float
    """Decay rate of VESPO's weight for advantages >= 0."""

    vespo_k_neg: float
    """The exponent for negative advantages."""

    vespo_lambda_neg: float
    """The decay rate for negative advantages."""

    logit_softcap: float | None = None
    """Softcap of the model's logits, after `logit_scale`; None: no cap."""

    logit_scale: float = 1.0
    """Factor by which the model multiplies its logits."""

    def objective(self) -> Objective:
        """The objective that these settings describe.

        Raises:
            ValueError: an `Objective` cannot express the loss type or the combination of settings.
        """
        check_loss_type(self.loss_type)
        surrogate, aggregation = LOSS_TYPES[self.loss_type]
        corrects_kl = self.use_bias_correction_kl and self.beta != 0.0
        if corrects_kl and self.importance_sampling_level == "sequence":
            raise ValueError(
                'use_bias_correction_kl with importance_sampling_level="sequence" weighs each token\'s KL by a ratio '
                "of its sequence, which is not supported; set use_bias_correction_kl=False or beta=0.0"
            )
        self._check_ranges(surrogate)
        read_by: dict[str, dict[str, Any]] = {
            "clip": {"clip_low": self.epsilon_low, **self._upper_bounds()},
            "cispo": {"clip_low": 1.0, "clip_high": self.epsilon_high - 1.0},
            "sapo": {"sapo_tau_pos": self.sapo_temperature_pos, "sapo_tau_neg": self.sapo_temperature_neg},
            "vespo": {name: getattr(self, name) for name in VESPO_SETTINGS},
        }
        return Objective(
            ratio=self.importance_sampling_level,
            surrogate=surrogate,
            kl_importance_weighted=corrects_kl,
            aggregation=aggregation,
            max_completion_length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
            # scale * cap' * tanh(logits / cap') / T with cap' = cap / scale: both settings divide by the scale
            temperature=self.temperature / self.logit_scale,
            logit_softcap=None if self.logit_softcap is None else self.logit_softcap / self.logit_scale,
            **read_by[surrogate],
        )

    def _upper_bounds(self) -> dict[str, float | None]:
        """min(min(r, delta) A, clip(r) A): the lower of both bounds holds for A > 0, the higher one for A < 0."""
        if self.delta is None:
            return {"clip_high": self.epsilon_high}
        return {
            "clip_high": min(self.epsilon_high, self.delta - 1.0),
            "dual_clip": max(1.0 + self.epsilon_high, self.delta),
        }

    def _check_ranges(self, surrogate: Surrogate) -> None:
        if self.logit_scale <= 0.0:
            raise ValueError(f"the model multiplies its logits by {self.logit_scale}; expected a factor > 0")
        if surrogate == "cispo" and self.epsilon_high < 1.0:
            if self.epsilon_high <= 0.0:
                raise ValueError(f'epsilon_high is {self.epsilon_high}; expected a bound > 0 for loss_type "cispo"')
            warnings.warn(
                f'epsilon_high is {self.epsilon_high}, but for loss_type "cispo" it bounds the ratio itself, which '
                "starts at 1: nearly every token's weight becomes this number; the ScaleRL recipe has 5.0",
                stacklevel=2,
            )
        if self.delta is None:
            return
        if surrogate != "clip":
            raise ValueError(f'delta={self.delta} has no effect with the surrogate "{surrogate}"; leave it out')
        if self.delta < 1.0:
            raise ValueError(f"delta is {self.delta}, but ratios start at 1; expected a bound >= 1")


def check_loss_type(loss_type: str) -> None:
    """Refuse a loss type that is not in `LOSS_TYPES`."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}; supported here: {', '.join(LOSS_TYPES)}")


def corrected_advantages(advantages: Tensor, ratio: Tensor | None, mask: Tensor) -> Tensor:
    """Advantages times the importance sampling ratio; surrogates are linear in the advantages, so this weights them.

    Args:
        advantages: [B] or [B, T].
        ratio: [B], [B, 1] or [B, T], >= 0; None: no correction.
        mask: [B, T].
    """
    if ratio is None:
        return advantages

    def per_position(values: Tensor) -> Tensor:
        return (values.unsqueeze(1) if values.dim() == 1 else values).expand(mask.shape)

    return per_position(advantages) * per_position(ratio)


def with_correction(
    objective: Objective, advantages: Tensor, ratio: Tensor | None, old_logps: Tensor | None, mask: Tensor
) -> dict[str, Any]:
    """`objective`, `advantages` and `rollout_logps` of a loss call with the importance sampling ratio applied.

    The ratio is a weight of all surrogates but "vespo". In VESPO, each token's ratio is a factor of the sequence's
    ratio. The caller has truncated or masked it already, so our own bounds are set wide enough to have no effect.

    Args:
        objective: without a rollout correction.
        advantages: [B] or [B, T].
        ratio: [B], [B, 1] or [B, T], >= 0, exp(old - rollout); None: no correction. For "vespo" [B, T].
        old_logps: [B, T]; None: on-policy. "vespo" needs them to recover the sampler's log-probs.
        mask: [B, T].

    Raises:
        ValueError: the surrogate is "vespo", and the ratio is not per token or `old_logps` is missing.
    """
    if ratio is None or objective.surrogate != "vespo":
        return {"objective": objective, "advantages": corrected_advantages(advantages, ratio, mask)}
    if old_logps is None or ratio.shape != mask.shape:
        raise ValueError(
            'the surrogate "vespo" takes an importance sampling ratio per token, [B, T], and old log-probs beside it; '
            f"given: a ratio {list(ratio.shape)}, {'no' if old_logps is None else 'and'} old log-probs"
        )
    corrected = dataclasses.replace(objective, rollout_correction="token", rollout_cap=math.exp(_LOG_RATIO_CLAMP))
    return {"objective": corrected, "advantages": advantages, "rollout_logps": old_logps - ratio.log()}
