"""`LigerFusedLinearGRPOLoss`: this library's loss with the signature of liger-kernel's class of that name.

    from expo_kernels.integrations.liger import LigerFusedLinearGRPOLoss  # was: liger_kernel.chunked_loss

Source: liger-kernel 0.8.5. Differences: logits are float32, values at masked positions are ignored, a frozen head costs
no gradient, and "luspo" excludes padding, as in TRL.

Letters: B sequences, T completion positions, V vocabulary, H hidden.
"""

import torch
from torch import Tensor, nn

from expo_kernels import _validate as validate
from expo_kernels.integrations._trl_loss import VESPO_SETTINGS, WINDOW_LOSS_TYPES, TrlLoss, with_correction
from expo_kernels.linear_loss import linear_expo_loss
from expo_kernels.logps import linear_token_logps
from expo_kernels.objective import Objective, RatioLevel


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO loss from hidden states and the output head; the arguments are Liger's, in Liger's order.

    Args:
        beta: >= 0, weight of the KL penalty.
        compiled: has no effect; nothing is compiled.
        use_ref_model: False only if beta = 0.
        chunk_size: must be 1; chunks consist of valid tokens, see `logits_budget_mb`.
        epsilon_low: clip range below 1.
        epsilon_high: clip range above 1; for "cispo" the upper bound of the ratio itself.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: number of tokens; required by "dr_grpo", unused by the others.
        importance_sampling_level: "token" or "sequence".
        sapo_temperature_pos: sharpness of SAPO's gate for positive advantages.
        sapo_temperature_neg: sharpness of SAPO's gate for all other advantages.
        temperature: > 0; logits are divided by it.
        delta: upper bound of the unclipped ratio, >= 1; None: no bound.
        use_bias_correction_kl: multiply the KL penalty by the token's ratio.
        vespo_k_pos: exponent of the sequence's ratio in VESPO's weight for advantages >= 0; only for "vespo".
        vespo_lambda_pos: decay rate of that weight; only for "vespo".
        vespo_k_neg: the exponent for negative advantages; only for "vespo".
        vespo_lambda_neg: the decay rate for negative advantages; only for "vespo".
        logits_budget_mb: MiB for the logits of one chunk; None: a default for the device. Liger has no such argument.
        gradient_tolerance: as in `linear_expo_loss`. Liger has no such argument.

    Raises:
        ValueError: an `Objective` cannot express a setting, or the setting would have no effect.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,  # noqa: ARG002
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: RatioLevel = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        logits_budget_mb: float | None = None,
        gradient_tolerance: float = 0.0,
    ) -> None:
        super().__init__()
        if chunk_size != 1:
            raise ValueError(f"chunk_size is {chunk_size}, but chunks are not sequences here; use logits_budget_mb")
        if not use_ref_model and beta != 0.0:
            raise ValueError(f"beta={beta} has no effect with use_ref_model=False; give beta=0.0")
        vespo = dict(zip(VESPO_SETTINGS, (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg), strict=True))
        defaults = Objective(surrogate="vespo")
        ignored = [name for name, value in vespo.items() if value != getattr(defaults, name)]
        if ignored and loss_type != "vespo":
            raise ValueError(f"{', '.join(ignored)} would be ignored: loss_type is {loss_type!r}, not 'vespo'")
        self.beta, self.loss_type = beta, loss_type
        self.logits_budget_mb, self.gradient_tolerance = logits_budget_mb, gradient_tolerance
        self.objective = TrlLoss(
            loss_type=loss_type,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            beta=beta,
            temperature=temperature,
            importance_sampling_level=importance_sampling_level,
            max_completion_length=max_completion_length,
            delta=delta,
            use_bias_correction_kl=use_bias_correction_kl,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            **vespo,
        ).objective()

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor | nn.Module,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | nn.Module | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and the metrics in Liger's order.

        Args:
            _input: [B, T, H] hidden states; position t predicts `selected_token_ids[:, t]`.
            lin_weight: [V, H] output head, or its module, as in `linear_expo_loss`.
            selected_token_ids: [B, T] integers.
            attention_mask: [B, T], bool or 0/1; 1 for valid tokens of the completion.
            advantages: [B] or [B, T].
            bias: [V], or None.
            ref_per_token_logps: [B, T] nats; beta > 0 requires either these or `ref_input` and `ref_weight`.
            old_per_token_logps: [B, T] nats; None: on-policy.
            ref_input: [B, T, H] hidden states of the reference model.
            ref_weight: [V, H] output head of the reference model.
            ref_bias: [V] bias of that head, or None.
            vllm_is_ratio: [B], [B, 1] or [B, T], >= 0: weight of the surrogate. For "vespo" [B, T], a factor of the
                sequence's ratio; requires `old_per_token_logps`.
            num_items_in_batch: number of tokens of all ranks and micro-batches, the denominator of "dapo", "cispo" and
                "vespo"; None: that of this call, averaged over ranks. The other loss types do not use it.

        Returns:
            0-dim loss, and (KL in nats, clipped share), or only (clipped share) if beta = 0. The clipped share is the
            share of tokens for which a clipped term was chosen, including `delta`'s cap; for "cispo" the share of
            tokens whose ratio was clipped, whatever the advantage.

        Raises:
            ValueError: arguments are missing, contradict each other, or have shapes that do not match.
        """
        validate.is_tensor("_input", _input)
        validate.ids_and_mask(
            "_input", _input, selected_token_ids, "attention_mask", attention_mask, "selected_token_ids"
        )
        for name, logps in (("old_per_token_logps", old_per_token_logps), ("ref_per_token_logps", ref_per_token_logps)):
            if logps is not None:
                validate.per_token(name, logps, "selected_token_ids", selected_token_ids.shape)
        if ref_input is not None:
            validate.predicts("ref_input", ref_input, "selected_token_ids", selected_token_ids)
            if ref_per_token_logps is not None:
                raise ValueError("ref_per_token_logps and ref_input are both given; give one of the two")
            ref_per_token_logps = self._ref_logps(ref_input, ref_weight, ref_bias, selected_token_ids, attention_mask)
        output = linear_expo_loss(
            _input,
            lin_weight,
            selected_token_ids,
            attention_mask,
            bias=bias,
            logits_budget_mb=self.logits_budget_mb,
            gradient_tolerance=self.gradient_tolerance,
            old_logps=old_per_token_logps,
            ref_logps=ref_per_token_logps,
            beta=self.beta,
            normalizer=self._normalizer(attention_mask, num_items_in_batch),
            **with_correction(self.objective, advantages, vllm_is_ratio, old_per_token_logps, attention_mask),
        )
        clipped = output.metrics["clip_low_fraction"] + output.metrics["clip_high_fraction"]
        return output.loss, (clipped,) if self.beta == 0.0 else (output.metrics["kl"], clipped)

    @torch.no_grad()
    def _ref_logps(
        self, hidden: Tensor, weight: Tensor | nn.Module | None, bias: Tensor | None, ids: Tensor, mask: Tensor
    ) -> Tensor:
        if weight is None:
            raise ValueError("ref_input is given without ref_weight; give the reference model's output head")
        temperature, budget = self.objective.temperature, self.logits_budget_mb
        return linear_token_logps(
            hidden, weight, ids, bias=bias, mask=mask, temperature=temperature, logits_budget_mb=budget
        )

    def _normalizer(self, mask: Tensor, num_items: Tensor | float | None) -> Tensor | None:
        if self.loss_type not in WINDOW_LOSS_TYPES:
            return None
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        num_tokens = mask.sum() if num_items is None else torch.as_tensor(num_items, device=mask.device)
        num_tokens = num_tokens.float()
        if is_distributed and num_items is None:
            torch.distributed.all_reduce(num_tokens)
        return (num_tokens / (torch.distributed.get_world_size() if is_distributed else 1)).clamp(min=1.0)
