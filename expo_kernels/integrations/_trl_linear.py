"""`LinearGRPOTrainer`: TRL's GRPOTrainer with this library's linear loss, for `trl.py`.

The head is applied inside the model's forward, where ZeRO 3 can gather it. Source: TRL 1.16,
`GRPOTrainer._compute_loss`.

Letters: B sequences, T completion positions, V vocabulary, H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from expo_kernels.integrations._trl_entropy import bonus_in_loss, current_coefficient, entropy_loss, update_coefficient
from expo_kernels.integrations._trl_head import apply_head_in_forward, base_model, check_head, logit_scale
from expo_kernels.integrations._trl_loss import WINDOW_LOSS_TYPES, TrlLoss, check_loss_type, with_correction
from expo_kernels.integrations._trl_sequence_kl import aggregated, sequence_weighted_kl
from expo_kernels.linear_loss import linear_expo_loss
from expo_kernels.logps import linear_token_logps
from expo_kernels.objective import Objective
from expo_kernels.policy_loss import expo_loss_from_logps

# what TRL passes to a vision-language model besides ids and mask
_IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class LinearGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer with the loss and all log-probs computed from hidden states, without [B, T, V] logits.

    Args:
        model: as GRPOTrainer.
        reward_funcs: as GRPOTrainer.
        args: as GRPOTrainer.
        positional: as GRPOTrainer.
        logits_budget_mb: MiB for the logits of one chunk; None: a default for the device.
        gradient_tolerance: as in `linear_expo_loss`.
        options: as GRPOTrainer.

    Raises:
        ValueError: an `Objective` cannot express a setting.
        NotImplementedError: the model or the kind of parallelism is not supported yet.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOConfig | None,
        *positional: Any,
        logits_budget_mb: float | None,
        gradient_tolerance: float,
        **options: Any,
    ) -> None:
        if args is not None:  # before a model loads
            _check_config(args)
        super().__init__(model, reward_funcs, args, *positional, **options)
        self._budget_mb, self._gradient_tolerance = logits_budget_mb, gradient_tolerance
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise NotImplementedError(
                'FSDP version 1 is not supported: set fsdp_config={"version": 2}, or use DeepSpeed'
            )
        check_head(self.model)
        is_per_sequence = self.args.importance_sampling_level == "sequence"
        self._weighs_kl_by_sequence = is_per_sequence and self.args.use_bias_correction_kl and self.beta != 0.0
        self._objective = self._make_objective()
        self._needs_entropies = False
        for scored in filter(None, (self.model, self.ref_model)):
            inner = base_model(self.accelerator.unwrap_model(scored))
            apply_head_in_forward(
                inner,
                self._objective,
                logits_budget_mb,
                in_float32=self.args.cast_lm_head_to_fp32,
                is_fsdp=self.is_fsdp_enabled,
                needs_entropies=lambda: self._needs_entropies,
            )

    def _make_objective(self) -> Objective:
        args, text_config = self.args, self.model.config.get_text_config()
        return TrlLoss(
            loss_type=args.loss_type,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            beta=self.beta,
            temperature=self.temperature,
            importance_sampling_level=args.importance_sampling_level,
            max_completion_length=self.max_completion_length,
            delta=args.delta,
            use_bias_correction_kl=args.use_bias_correction_kl and not self._weighs_kl_by_sequence,
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
            vespo_k_pos=args.vespo_k_pos,
            vespo_lambda_pos=args.vespo_lambda_pos,
            vespo_k_neg=args.vespo_k_neg,
            vespo_lambda_neg=args.vespo_lambda_neg,
            logit_softcap=getattr(text_config, "final_logit_softcapping", None),
            logit_scale=logit_scale(text_config),
        ).objective()

    def _get_per_token_logps_and_entropies(self, *args: Any, compute_entropy: bool = False, **options: Any) -> Any:
        self._needs_entropies = compute_entropy
        try:
            return super()._get_per_token_logps_and_entropies(*args, compute_entropy=compute_entropy, **options)
        finally:
            self._needs_entropies = False

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        ids, attended = inputs["completion_ids"], inputs["completion_mask"]
        mask = attended * inputs["tool_mask"] if "tool_mask" in inputs else attended

        def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
            hidden = hidden[:, -ids.shape[1] - 1 : -1]  # the last position predicts nothing
            return self._loss_and_metrics(hidden, weight, bias, mask, inputs)

        options = {name: inputs[name] for name in _IMAGE_INPUTS if name in inputs}
        if self.aux_loss_enabled:
            options["output_router_logits"] = True
        with self.accelerator.autocast():
            output = model(
                input_ids=torch.cat([inputs["prompt_ids"], ids], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], attended], dim=1),
                expo_head=loss_of,
                **options,
            )
        self._log_loss(output)
        loss: Tensor = output["loss"]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * output["aux_loss"] / self._accumulation_steps
        return loss

    def _loss_and_metrics(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The loss of hidden states [B, T, H] and the head, with its metrics; called inside the model's forward."""
        ids, old_logps = inputs["completion_ids"], inputs.get("old_per_token_logps")
        head: dict[str, Any] = {"bias": bias, "logits_budget_mb": self._budget_mb}
        advantages, selected, entropy = inputs["advantages"], mask, None
        if self.off_policy_mask_threshold is not None or self.top_entropy_quantile < 1.0:
            advantages, selected, entropy = self._select_tokens(hidden, weight, mask, inputs, **head)
        normalizer = self._normalizer(inputs, mask)
        if self._weighs_kl_by_sequence:
            return self._loss_from_logps(hidden, weight, mask, selected, advantages, normalizer, inputs, **head)
        coefficient = current_coefficient(self) / self._accumulation_steps
        bonus = bonus_in_loss(self._objective, coefficient, normalizer, mask, selected)
        made = linear_expo_loss(
            hidden,
            weight,
            ids,
            mask,
            gradient_tolerance=self._gradient_tolerance,
            old_logps=old_logps,
            ref_logps=inputs.get("ref_per_token_logps"),
            beta=0.0 if self.beta == 0.0 else self._penalty_weight(),
            normalizer=normalizer,
            entropy_bonus=0.0 if bonus is None else bonus,
            return_entropy=True,
            **head,
            **with_correction(self._objective, advantages, inputs.get("importance_sampling_ratio"), old_logps, mask),
        )
        output = {**made.metrics, "loss": made.loss, "policy_loss": made.loss.detach()}
        if not self._entropy_bonus_enabled:
            return output
        entropy = made.metrics["entropy"] if entropy is None else entropy
        if bonus is not None:
            output["policy_loss"] = output["policy_loss"] + coefficient * entropy
        else:
            tolerance = self._gradient_tolerance
            negative = entropy_loss(
                hidden, weight, ids, selected, self._objective, gradient_tolerance=tolerance, **head
            )
            output["loss"] = made.loss + coefficient * negative
        return {**output, "bonus_entropy": entropy, "bonus_tokens": selected.sum()}

    def _loss_from_logps(
        self,
        hidden: Tensor,
        weight: Tensor,
        mask: Tensor,
        selected: Tensor,
        advantages: Tensor,
        normalizer: Tensor | float,
        inputs: dict[str, Any],
        **head: Any,
    ) -> dict[str, Tensor]:
        """As `_loss_and_metrics`, with the KL times the sequence's ratio; computes the logits twice (8NHV)."""
        logps, entropies = self._logps_and_entropies(hidden, weight, mask, inputs, **head)
        old_logps = inputs.get("old_per_token_logps")
        corrected = with_correction(
            self._objective, advantages, inputs.get("importance_sampling_ratio"), old_logps, mask
        )
        made = expo_loss_from_logps(logps, mask, old_logps=old_logps, beta=0.0, normalizer=normalizer, **corrected)
        kl = sequence_weighted_kl(logps, old_logps, inputs["ref_per_token_logps"], mask, self._objective)
        loss = made.loss + self._penalty_weight() * aggregated(kl, mask, normalizer, self._objective)
        tokens = mask.sum().clamp(min=1)
        metrics = {"kl": kl.detach().sum() / tokens, "entropy": (entropies.detach() * mask).sum() / tokens}
        output = {**made.metrics, **metrics, "loss": loss, "policy_loss": loss.detach()}
        if not self._entropy_bonus_enabled:
            return output
        entropy = (entropies * selected).sum() / selected.sum().clamp(min=1)
        output["loss"] = loss - current_coefficient(self) / self._accumulation_steps * entropy
        return {**output, "bonus_entropy": entropy.detach(), "bonus_tokens": selected.sum()}

    def _logps_and_entropies(
        self, hidden: Tensor, weight: Tensor, mask: Tensor, inputs: dict[str, Any], **head: Any
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [B, T] of the completion, by our head."""
        return linear_token_logps(
            hidden,
            weight,
            inputs["completion_ids"],
            mask=mask,
            temperature=self._objective.temperature,
            logit_softcap=self._objective.logit_softcap,
            return_entropy=True,
            gradient_tolerance=self._gradient_tolerance,
            **head,
        )

    def _select_tokens(
        self, hidden: Tensor, weight: Tensor, mask: Tensor, inputs: dict[str, Any], **head: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Apply TRL's masks of tokens, at the cost of one more product of hidden states and head.

        Returns:
            Advantages [B, T], 0 for tokens that are left out; the mask [B, T] of the tokens with high entropies, or
            `mask` itself if `top_entropy_quantile` is 1; the mean entropy of those tokens, or None.
        """
        with torch.no_grad():
            logps, entropies = self._logps_and_entropies(hidden, weight, mask, inputs, **head)
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        if self.off_policy_mask_threshold is not None:
            sampled = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps", logps))
            kept = self.get_off_policy_mask(advantages, logps, sampled, mask, self.off_policy_mask_threshold)
            advantages = advantages * kept
        advantages = advantages.expand(mask.shape)
        if self.top_entropy_quantile >= 1.0:
            return advantages, mask, None
        selected = mask * self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
        return advantages * selected, selected, (entropies * selected).sum() / selected.sum().clamp(min=1)

    def _penalty_weight(self) -> Tensor | float:
        """The beta of the KL penalty."""
        return float(self.beta)

    @property
    def _accumulation_steps(self) -> int:
        """Micro-batches of the accumulation window; evaluation does not accumulate."""
        return int(self.current_gradient_accumulation_steps) if self.model.training else 1

    def _normalizer(self, inputs: dict[str, Any], mask: Tensor) -> Tensor | float:
        """The denominator over the accumulation window, as in TRL; gradients are averaged over ranks afterwards."""
        steps = self._accumulation_steps
        if self.args.loss_type in WINDOW_LOSS_TYPES:
            # tokens of the whole generation batch, which contains this window
            tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            return tokens * steps / self.args.steps_per_generation if self.model.training else tokens
        if self._objective.aggregation == "token":
            return mask.sum().clamp(min=1) * steps
        return float(mask.shape[0] * steps)

    def _log_loss(self, output: dict[str, Tensor]) -> None:
        names = ("kl", "entropy", "clip_low_fraction", "clip_high_fraction")
        sums = torch.stack([output[name] for name in names] + [torch.ones_like(output["tokens"])]) * output["tokens"]
        *sums, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        kl, entropy, clipped_low, clipped_high = (value / max(tokens, 1.0) for value in sums)
        if self.beta != 0.0:
            self._log_value("kl", kl)
        self._log_value("entropy", entropy)
        self._log_value("clip_ratio/low_mean", clipped_low)
        self._log_value("clip_ratio/high_mean", clipped_high)
        self._log_value("clip_ratio/region_mean", clipped_low + clipped_high)
        for name in ("ratio_max", "gradient_error_bound"):
            if name in output:
                self._log_value(name, self.accelerator.gather(output[name]).max())
        if "aux_loss" in output:
            self._log_value("aux_loss", self.accelerator.gather(output["aux_loss"].detach()).mean())
        if self._entropy_bonus_enabled:
            self._log_entropy_bonus(output)

    def _log_entropy_bonus(self, output: dict[str, Tensor]) -> None:
        # TRL's, too, is divided by the accumulation steps only where the denominator is that of the window
        steps = 1 if self.args.loss_type in WINDOW_LOSS_TYPES else self._accumulation_steps
        self._log_value("policy_loss", self.accelerator.gather(output["policy_loss"] * steps).mean())
        if not self.model.training:
            return
        if self.use_adaptive_entropy:
            update_coefficient(self, output["bonus_entropy"], output["bonus_tokens"])
        if self.accelerator.sync_gradients:
            self._log_value("entropy_coef", self.entropy_coef)

    def _log_value(self, name: str, value: Tensor | float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(float(value))


def _check_config(args: GRPOConfig) -> None:
    check_loss_type(args.loss_type)
    if args.beta < 0.0:
        raise ValueError(f"beta is {args.beta}; expected a weight >= 0")
