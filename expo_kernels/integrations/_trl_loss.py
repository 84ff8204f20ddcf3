"""TRL's names for the loss, which Liger's signature shares, as an `Objective`.

Source: TRL 1.16, `GRPOTrainer._compute_loss`; the equality of the two is what `tests/integrations` tests.
"""

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
    "luspo": ("clip", "constant"),
}
# divided by the tokens of the whole accumulation window over all ranks, not by those of the call
WINDOW_LOSS_TYPES = ("dapo", "cispo")


def objective_of(
    *,
    loss_type: str,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
    temperature: float,
    importance_sampling_level: RatioLevel,
    max_completion_length: int | None,
    delta: float | None,
    use_bias_correction_kl: bool,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    logit_softcap: float | None = None,
) -> Objective:
    """The objective that these settings of TRL's describe.

    Args:
        loss_type: one of `LOSS_TYPES`.
        epsilon_low: clip range below 1; unused by "cispo", which TRL bounds from above only, and by "sapo".
        epsilon_high: clip range above 1; for "cispo" the bound of the ratio itself.
        beta: weight of the KL penalty; where it is 0 there is none to be importance-weighted.
        temperature: of the sampling.
        importance_sampling_level: of the ratio.
        max_completion_length: tokens, the divisor of "dr_grpo", and only of that.
        delta: upper bound of the ratio where the advantage is negative; None: none.
        use_bias_correction_kl: weigh the KL penalty by the ratio.
        sapo_temperature_pos: sharpness of SAPO's gate for positive advantages.
        sapo_temperature_neg: the same for all others.
        logit_softcap: of the model.

    Raises:
        ValueError: a loss type or a combination that no `Objective` gives.
    """
    check_loss_type(loss_type)
    surrogate, aggregation = LOSS_TYPES[loss_type]
    corrects_kl = use_bias_correction_kl and beta != 0.0
    if corrects_kl and importance_sampling_level == "sequence":
        raise ValueError(
            'use_bias_correction_kl with importance_sampling_level="sequence" weighs each token\'s KL by a ratio of '
            "its sequence, which is not supported; set use_bias_correction_kl=False or beta=0.0"
        )
    _check_clip_range(surrogate, epsilon_high, delta)
    read_by: dict[str, dict[str, Any]] = {
        "clip": {"clip_low": epsilon_low, "clip_high": epsilon_high, "dual_clip": delta},
        "cispo": {"clip_low": 1.0, "clip_high": epsilon_high - 1.0},
        "sapo": {"sapo_tau_pos": sapo_temperature_pos, "sapo_tau_neg": sapo_temperature_neg},
    }
    return Objective(
        ratio=importance_sampling_level,
        surrogate=surrogate,
        kl_importance_weighted=corrects_kl,
        aggregation=aggregation,
        # LUSPO sums over a sequence's tokens and divides by the number of sequences alone
        max_completion_length={"dr_grpo": max_completion_length, "luspo": 1}.get(loss_type),
        temperature=temperature,
        logit_softcap=logit_softcap,
        **read_by[surrogate],
    )


def check_loss_type(loss_type: str) -> None:
    """Refuse a loss type that has no objective here."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}; supported here: {', '.join(LOSS_TYPES)}")


def corrected_advantages(advantages: Tensor, ratio: Tensor | None, mask: Tensor) -> Tensor:
    """Advantages times the sampler's correction: every surrogate is linear in them, so that this weighs it.

    Args:
        advantages: [B] or [B, T].
        ratio: [B], [B, 1] or [B, T], >= 0; None: nothing to correct.
        mask: [B, T].
    """
    if ratio is None:
        return advantages

    def per_position(values: Tensor) -> Tensor:
        return (values.unsqueeze(1) if values.dim() == 1 else values).expand(mask.shape)

    return per_position(advantages) * per_position(ratio)


def _check_clip_range(surrogate: Surrogate, epsilon_high: float, delta: float | None) -> None:
    if surrogate == "cispo" and epsilon_high < 1.0:
        raise ValueError(
            f'epsilon_high is {epsilon_high}, but for loss_type "cispo" it bounds the ratio itself, '
            "which starts at 1; give one >= 1 (5.0 in the ScaleRL recipe)"
        )
    if delta is None:
        return
    if surrogate != "clip":
        raise ValueError(f'delta={delta} has no effect with the surrogate "{surrogate}"; leave it out')
    if delta <= 1.0 + epsilon_high:
        raise ValueError(f"delta is {delta}; expected a bound above 1 + epsilon_high = {1.0 + epsilon_high}")
