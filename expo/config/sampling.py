"""Sections about sampling: replies of a step, the vLLM engines, and evaluations."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from expo.config.section import BatchSize, Index, Length, Positive, Seconds, Section, Temperature

VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM's LoRA can be started (its MaxLoRARanks); it applies adapters of smaller ranks too."""


class RolloutSection(Section):
    """How replies are sampled."""

    engine: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    """Rollout engine; transformers: uses the policy's own weights, vllm: holds a copy in the same process, vllm-server:
    holds copies in other processes."""
    group_size: Annotated[int, Field(ge=2, le=2**16)] = 8
    """G, replies per question (paper: 8). At least 2, because a group of one reply has no advantage."""
    questions_per_step: BatchSize = 256
    """Questions per training step (paper: 256)."""
    max_resamples: Annotated[int, Field(ge=0, le=1000)] = 0
    """Rounds of dynamic sampling in a step: each replaces groups whose rewards are all equal by groups of new questions
    (DAPO; verl's recipe: up to 10 batches). Accuracy, KL coefficient and pass rates include every sampled group."""
    temperature: Temperature = 1.0
    """Sampling temperature (DAPO recipe: 1.0). Policy, old and reference log-probs are computed at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only 1 is accepted (DAPO recipe: 1): replies are sampled from the whole distribution."""
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """Only null, 0 and -1 are accepted: no top-k sampling."""
    max_new_tokens: Length = 3072
    """Longest reply in tokens (paper: 3,072). A reply cut there counts as truncated and is graded as it is."""
    stop_tokens: list[str] = []
    """Tokens that end a reply, beside the end-of-sequence tokens of the tokenizer and of the model's generation config;
    such as "<|im_end|>" for a base model with a chat template."""
    batch_size: BatchSize = 256
    """Replies generated at once. Memory grows with it; results depend on it by rounding at most, and not at all in
    float32 on a CPU (tested)."""
    keep_replies: bool = True
    """Keep sampled replies in rollouts/ of the run's folder until the next checkpoint (12 bytes a token and the text):
    --resume reuses them if the run died after sampling."""
    ahead: Annotated[int, Field(ge=0, le=16)] = 0
    """Steps that are sampled and graded while the policy learns, with vllm-server: step t is sampled with the weights
    after step t - 1 - ahead, and needs objective.rollout_correction or policy.old_logps = rollout. 0: in turns."""
    exact: bool = False
    """Batch-invariant sampling: a reply has the same bits whatever else is sampled at once; slower. vllm and
    vllm-server: on NVIDIA GPUs, by VLLM_BATCH_INVARIANT; transformers: on a CPU in float32, one question at a time."""
    sync_tolerance: Positive | None = None
    """Largest |policy - engine| log-prob of the probe after a weight sync, nats. If unset: depends on the dtype, see
    expo/rollout/weight_sync.py."""

    @field_validator("top_p", "top_k")
    @classmethod
    def _whole_distribution(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value not in {"top_p": (1.0,), "top_k": (None, 0, -1)}[str(info.field_name)]:
            raise ValueError(
                "it samples from a part of the distribution, but the trainer's log-probs are those of the whole one, "
                "so every ratio would be biased; remove it, or lower rollout.temperature, which applies to both"
            )
        return value


class VllmSection(Section):
    """vLLM, with rollout.engine = vllm (one engine on each rank's device) or vllm-server. max_num_seqs of an engine is
    rollout.batch_size.
    """

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Fraction of the GPU's memory for vLLM's weights, cache and activations; the trainer needs the rest."""
    cache_gib: Positive | None = None
    """Memory of the key-value cache in GiB. If unset: on a GPU what gpu_memory_utilization leaves, on a CPU 1."""
    enforce_eager: bool = False
    """Neither compile the model nor capture CUDA graphs: starts faster, samples slower; always so on a CPU."""
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    """Ranks that share one engine's weights (paper: 2); with vllm-server: GPUs of each server."""
    lora: Literal["merged", "adapter"] = "merged"
    """With policy.lora_rank: what a weight sync sends; merged: all weights, with the adapters merged into them,
    adapter: the LoRA adapter alone, which vLLM applies to base weights that are sent once."""
    sleep: bool = False
    """With vllm on a GPU: free weights and cache during the policy update, and copy the weights again after it."""
    servers: list[str] = []
    """With vllm-server: addresses [http://host:port, ...] of servers started by `python -m expo.serve`. If empty: the
    run starts its own."""
    key_file: Path | None = None
    """With vllm.servers: file with the key that they require, readable by you alone. If unset: the key is in the
    environment variable VLLM_API_KEY. Servers that the run starts get a new key."""
    num_servers: Annotated[int, Field(ge=1, le=64)] = 1
    """With vllm-server: number of servers that the run starts beside rank 0; the ranks are spread over them."""
    gpus: list[Annotated[int, Field(ge=0, le=1023)]] = []
    """With vllm-server: CUDA devices of the servers that the run starts, tensor_parallel of them per server."""
    transfer: Literal["files", "broadcast"] = "files"
    """With vllm-server: how weights reach the servers; files: through files, broadcast: by NCCL between GPUs or TCP
    between CPUs."""
    weights_folder: Path | None = None
    """With transfer = files: folder of the weight files, visible to all servers. If unset: /dev/shm."""
    patience_s: Seconds = 600
    """Seconds that a server may be unreachable before the run ends; starting or restarting a server must take less."""


class EvaluationSection(Section):
    """Pass@k on questions that are not trained on, before, during and after the run."""

    sets: dict[str, str] = {}
    """Name and source (as data.train) of each question set; evaluated before the first and after the last step."""
    num_samples: Annotated[int, Field(ge=1, le=2**14)] = 64
    """n, replies per question. Pass@k is reported for k = 1, 8 and 32 where k < n, or k = n = 1."""
    temperature: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Sampling temperature of evaluations; 0: greedy decoding, for which num_samples must be 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Top-p (nucleus) sampling of evaluations; 1: the whole distribution, as in training."""
    every: Index = 0
    """Steps between evaluations during the run; 0: only before and after."""

    @model_validator(mode="after")
    def _samples_differ(self) -> "EvaluationSection":
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"evaluation.num_samples = {self.num_samples} replies at evaluation.temperature = 0 would all be the "
                f"same; set it to 1, or the temperature above 0"
            )
        if 0 < self.temperature < 0.01:
            raise ValueError(f"evaluation.temperature = {self.temperature:g}; expected 0 or at least 0.01")
        return self
