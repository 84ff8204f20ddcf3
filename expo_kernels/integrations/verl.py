"""Integration with verl: policy losses, and the fused linear head for log-probs and entropies.

    from expo_kernels.integrations import verl
    verl.register_losses()  # then actor.policy_loss.loss_mode=expo, expo_gspo, expo_cispo or expo_sapo
    verl.replace_fused_linear()  # with model.use_fused_kernels=True and their impl_backend "torch"

verl passes no reference log-probs to a policy loss and adds its own KL term, so AKL is not available here: scale
`kl_loss_coef`. Source: verl 0.9.1, `verl/trainer/ppo/core_algos.py` and `verl/utils/experimental/torch_functional.py`.

Letters: B sequences, T response positions, N tokens, V vocabulary, H hidden.
"""

import functools
from typing import Any

from torch import Tensor, nn

from expo_kernels import _validate as validate
from expo_kernels.integrations import _host
from expo_kernels.integrations._trl_loss import corrected_advantages
from expo_kernels.logps import linear_token_logps
from expo_kernels.objective import Aggregation, Objective, RatioLevel, Surrogate
from expo_kernels.policy_loss import expo_loss_from_logps

# surrogate and ratio of each loss_mode
LOSS_MODES: dict[str, tuple[Surrogate, RatioLevel]] = {
    "expo": ("clip", "token"),
    "expo_gspo": ("clip", "sequence_token"),
    "expo_cispo": ("cispo", "token"),
    "expo_sapo": ("sapo", "token"),
}
AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": "token",
    "token-sum": "token",
    "seq-mean-token-sum": "sum",
    "seq-mean-token-sum-norm": "constant",
    "seq-mean-token-mean": "sequence",
}


def register_losses() -> None:
    """Register `LOSS_MODES` with verl; call it in every worker, for example through `model.external_lib`.

    Raises:
        ImportError: verl is missing, or its version is not tested.
    """
    _host.check_version("verl", at_least=(0, 9), below=(0, 10))
    from verl.trainer.ppo.core_algos import register_policy_loss

    for mode in LOSS_MODES:
        register_policy_loss(mode)(functools.partial(policy_loss, mode))


def replace_fused_linear(gradient_tolerance: float = 0.0) -> None:
    """Replace verl's `FusedLinearForPPO` by ours; verl's models look it up in each forward pass.

    Args:
        gradient_tolerance: as in `linear_token_logps`.

    Raises:
        ImportError: verl is missing, or its version is not tested.
        ValueError: the tolerance is out of range.
    """
    validate.gradient_tolerance(gradient_tolerance, is_sharded=False)
    _host.check_version("verl", at_least=(0, 9), below=(0, 10))
    from verl.utils.experimental import torch_functional

    kind: type = FusedLinearForPPO
    if gradient_tolerance > 0.0:
        kind = type(kind.__name__, (kind,), {"gradient_tolerance": gradient_tolerance})
    torch_functional.FusedLinearForPPO = kind


def policy_loss(
    loss_mode: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss with verl's signature: 0-dim loss, differentiable in `log_prob`, and metrics.

    Args:
        loss_mode: one of `LOSS_MODES`.
        old_log_prob: [B, T] nats, under the old policy, the denominator of the ratio.
        log_prob: [B, T] nats, under the current policy.
        advantages: [B, T]; they may differ between the tokens of a sequence.
        response_mask: [B, T] bool or 0/1.
        loss_agg_mode: one of `AGGREGATIONS`, used in every mode (verl's own "sapo" overrides it).
        config: verl's ActorConfig: `clip_ratio_low`, `clip_ratio_high`, `clip_ratio_c`, `tau_pos`, `tau_neg`,
            `global_batch_info`.
        rollout_is_weights: [B, T], >= 0: weight of the surrogate.

    Returns:
        The loss, and `actor/pg_clipfrac` (share of tokens for which a clipped term was chosen, the dual clip's cap
        included), `actor/ratio_mean`, `actor/ratio_max`.

    Raises:
        ValueError: the config is missing, a mode is unknown, or an `Objective` cannot express the settings.
    """
    if config is None:
        raise ValueError("config is None; expected verl's ActorConfig, which holds the clip range")
    validate.is_tensor("log_prob", log_prob)
    others = {"response_mask": response_mask, "old_log_prob": old_log_prob, "advantages": advantages}
    if rollout_is_weights is not None:
        others["rollout_is_weights"] = rollout_is_weights
    for name, tensor in others.items():
        validate.per_token(name, tensor, "log_prob", log_prob.shape)
    output = expo_loss_from_logps(
        log_prob,
        response_mask,
        advantages=corrected_advantages(advantages, rollout_is_weights, response_mask),
        old_logps=old_log_prob,
        beta=0.0,
        objective=objective_of(loss_mode, loss_agg_mode, config, response_mask.shape[1]),
        normalizer=_normalizer(loss_agg_mode, response_mask, **config.global_batch_info),
    )
    metrics = output.metrics
    named = {
        "actor/pg_clipfrac": metrics["clip_low_fraction"] + metrics["clip_high_fraction"],
        "actor/ratio_mean": metrics["ratio_mean"],
        "actor/ratio_max": metrics["ratio_max"],
    }
    return output.loss, {name: float(value) for name, value in named.items()}


def objective_of(loss_mode: str, loss_agg_mode: str, config: Any, response_length: int) -> Objective:
    """The objective that verl's settings describe; `response_length` is T, verl's divisor if none is configured.

    Raises:
        ValueError: a mode is unknown, or an `Objective` cannot express the settings.
    """
    if loss_mode not in LOSS_MODES:
        raise ValueError(f"loss_mode is {loss_mode!r}; expected one of {', '.join(LOSS_MODES)}")
    if loss_agg_mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode is {loss_agg_mode!r}; expected one of {', '.join(AGGREGATIONS)}")
    surrogate, ratio = LOSS_MODES[loss_mode]
    scale = config.global_batch_info.get("loss_scale_factor") or response_length

    def of_config(name: str) -> float:
        value = getattr(config, name)
        return float(config.clip_ratio if value is None else value)

    clip_range = {"clip_low": of_config("clip_ratio_low"), "clip_high": of_config("clip_ratio_high")}
    read_by: dict[str, dict[str, Any]] = {
        "expo": clip_range | {"dual_clip": float(config.clip_ratio_c)},
        "expo_sapo": {"sapo_tau_pos": float(config.tau_pos), "sapo_tau_neg": float(config.tau_neg)},
    }
    return Objective(
        ratio=ratio,
        surrogate=surrogate,
        aggregation=AGGREGATIONS[loss_agg_mode],
        max_completion_length=scale if loss_agg_mode == "seq-mean-token-sum-norm" else None,
        **read_by.get(loss_mode, clip_range),
    )


def _normalizer(
    loss_agg_mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: int | None = None,  # noqa: ARG001
) -> Tensor | float:
    """The denominator over all micro-batches and ranks; verl averages gradients over ranks afterwards."""
    if loss_agg_mode == "token-sum":
        return 1.0 / dp_size
    count, name = batch_num_tokens, "batch_num_tokens"
    if loss_agg_mode != "token-mean":
        count, name = global_batch_size, "global_batch_size"
    if count is not None:
        return count / dp_size
    if dp_size > 1:
        raise ValueError(f"{name} is missing from config.global_batch_info, but dp_size is {dp_size}; give it")
    counted = mask.sum() if loss_agg_mode == "token-mean" else (mask.sum(dim=-1) > 0).sum()
    return counted.clamp(min=1)


class FusedLinearForPPO(nn.Module):
    """Log-probs and entropies from hidden states and the output head; the arguments are verl's.

    Args:
        chunk_size: number of rows of logits per chunk.
        impl_backend: must be "torch"; verl's other values select kernels that this class replaces.

    Raises:
        ValueError: `impl_backend` is not "torch".
    """

    gradient_tolerance: float = 0.0
    """As in `linear_token_logps`; set in a subclass, because verl's constructor has no such argument."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend != "torch":
            raise ValueError(f"impl_backend is {impl_backend!r}, which would be ignored; set it to 'torch'")
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies in nats, shaped like `input_ids`, float32; both are differentiable.

        Args:
            hidden_states: [B, T, H] or [N, H]; position t predicts `input_ids[:, t]`.
            vocab_weights: [V, H].
            input_ids: [B, T] or [N] integers in [0, V).
            temperature: > 0; logits are divided by it. Or a tensor of such floats, [B] or shaped like `input_ids`,
                which verl's own head does not take.
        """
        validate.is_tensor("hidden_states", hidden_states)
        validate.predicts("hidden_states", hidden_states, "input_ids", input_ids)
        float32_mib = 4 / 2**20
        return linear_token_logps(
            hidden_states,
            vocab_weights,
            input_ids,
            temperature=temperature,
            return_entropy=True,
            logits_budget_mb=self.chunk_size * vocab_weights.shape[0] * float32_mib,
            gradient_tolerance=self.gradient_tolerance,
        )
