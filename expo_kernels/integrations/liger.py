"""`LigerFusedLinearGRPOLoss`: this library's loss behind the signature of liger-kernel's class of that name.

    from expo_kernels.integrations.liger import LigerFusedLinearGRPOLoss  # was: liger_kernel.chunked_loss

Source: liger-kernel 0.8.5. What differs: logits are float32, positions that the mask leaves out may hold anything, a
frozen head costs no gradient, and "luspo" leaves padding out, as TRL does.

Letters: B sequences, T completion positions, V vocabulary, H hidden.
"""

import torch
from torch import Tensor, nn

from expo_kernels.integrations._trl_loss import VESPO_SETTINGS, WINDOW_LOSS_TYPES, TrlLoss, with_correction
from expo_kernels.linear_loss import linear_expo_loss
from expo_kernels.logps import linear_token_logps
from expo_kernels.objective import Objective, RatioLevel


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO loss from hidden states and the output head; the arguments are Liger's, in Liger's order.

    Args:
        beta: >= 0, weight of the KL penalty.
        compiled: either value; nothing is compiled per call here, and the numbers do not depend on it.
        use_ref_model: False only with beta = 0.
        chunk_size: 1; chunks are made of valid tokens, `logits_budget_mb` at a time.
        epsilon_low: clip range below 1.
        epsilon_high: clip range above 1; for "cispo" the bound of the ratio itself.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: tokens, for "dr_grpo", which needs it; the others do not read it.
        importance_sampling_level: "token" or "sequence".
        sapo_temperature_pos: sharpness of SAPO's gate for positive advantages.
        sapo_temperature_neg: the same for all others.
        temperature: > 0; logits are divided by it.
        delta: upper bound of the ratio for negative advantages, > 1 + epsilon_high; None: none.
        use_bias_correction_kl: weigh the KL penalty by the token's ratio.
        vespo_k_pos: power of the sequence's ratio in VESPO's weight for advantages >= 0; only for "vespo".
        vespo_lambda_pos: decay of that weight; likewise.
        vespo_k_neg: the power for negative advantages; likewise.
        vespo_lambda_neg: the decay for negative advantages; likewise.
        logits_budget_mb: MiB for the logits of one chunk; None: a default for the device. Not Liger's.

    Raises:
        ValueError: a setting that no `Objective` gives, or that would be ignored.
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
        self.logits_budget_mb = logits_budget_mb
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
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and the metrics as Liger orders them.

        Args:
            _input: [B, T, H] hidden states; position t predicts `selected_token_ids[:, t]`.
            lin_weight: [V, H] output head.
            selected_token_ids: [B, T] integers.
            attention_mask: [B, T], bool or 0/1: where the completion's token counts.
            advantages: [B] or [B, T].
            bias: [V], or None.
            ref_per_token_logps: [B, T] nats; with beta > 0 either these or `ref_input` and `ref_weight`.
            old_per_token_logps: [B, T] nats; None: on-policy.
            ref_input: [B, T, H] hidden states of the reference model.
            ref_weight: [V, H] its output head.
            ref_bias: [V] its bias, or None.
            vllm_is_ratio: [B], [B, 1] or [B, T], >= 0: weight of the surrogate. For "vespo" [B, T], a factor of the
                sequence's ratio, beside `old_per_token_logps`.
            num_items_in_batch: tokens of all ranks and micro-batches, the denominator of "dapo", "cispo" and "vespo";
                None: those of this call, averaged over ranks. The other loss types do not read it.

        Returns:
            0-dim loss, and (KL in nats, clipped share), without the first for beta = 0. The share is that of tokens for
            which a clipped term was chosen: with `delta` its cap counts too, and with "cispo" whatever the advantage.

        Raises:
            ValueError: arguments that are missing, contradict each other, or do not fit.
        """
        if ref_input is not None:
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
        self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, ids: Tensor, mask: Tensor
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
