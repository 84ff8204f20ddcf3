"""Sections about the policy under training and its optimizer."""

from typing import Annotated, Literal

from pydantic import Field

from expo.config.section import BatchSize, Count, Fraction, Index, NonNegative, Positive, Section


class PolicySection(Section):
    """The policy under training, a DeepSpeed engine."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the transformer's matrix products. Parameters, AdamW's moments, logits and log-probs are float32 in
    either case."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what is sharded over the ranks; 0: nothing, 1: optimizer states, 2: also gradients, 3: also
    parameters."""
    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory; needs zero_stage >= 1."""
    offload_parameters: bool = False
    """Keep parameters in CPU memory between uses; needs zero_stage = 3."""
    offload_reference: bool = False
    """Keep the reference policy in CPU memory between uses."""
    micro_batch_tokens: Count = 16384
    """Tokens (prompt, reply and padding) in one forward-backward pass. Memory grows with it; the loss does
    not depend on it."""
    packing: bool = False
    """Concatenate the sequences of a micro-batch without padding; faster with flash or flex attention."""
    updates_per_step: BatchSize = 4
    """Optimizer steps per batch of rollouts; 4 are mini-batches of 512 out of 2,048 replies (DAPO recipe)."""
    old_logps: Literal["recompute", "rollout"] = "recompute"
    """Log-probs of the policy that sampled; recompute: by the trainer, rollout: as the rollout engine returned them."""
    logits_budget_mb: Positive | None = None
    """Memory for one chunk of logits in MiB. If unset: chosen by expo_kernels."""
    gradient_tolerance: Fraction = 0.0
    """Largest relative error of the gradients of the output head and of the hidden states that enter it; 0: none but
    rounding. Above 0, their products leave out columns of the vocabulary whose probabilities are too small to matter:
    less time in the loss, if the policy's entropy is low."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lora_rank: Annotated[int, Field(ge=0, le=2**12)] = 0
    """Rank of LoRA adapters on every linear layer except the head; 0: no adapters, all parameters are trained."""
    lora_alpha: Annotated[int, Field(ge=1, le=2**20)] = 32
    """LoRA's alpha: the output of the adapters is scaled by lora_alpha / lora_rank."""


class OptimizerSection(Section):
    """AdamW and its learning rate schedule."""

    lr: Annotated[float, Field(ge=0, le=1e30)] = 1e-6
    """Learning rate after warm-up (DAPO recipe: 1e-6)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices; norms and biases have none (DAPO recipe: 0.1)."""
    warmup_steps: Index = 10
    """Training steps over which the learning rate rises linearly from 0 (DAPO recipe: 10)."""
    schedule: Literal["constant", "linear"] = "constant"
    """Learning rate after warm-up: constant (DAPO recipe), or linear to 0 at the last step."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e30)] = 1.0
    """Global norm to which gradients are clipped (DAPO recipe: 1.0)."""
