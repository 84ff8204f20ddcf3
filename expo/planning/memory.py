"""Bytes that a run will hold, part by part, from its configuration and the model's shape alone.

Parts that are always there are counted apart from those of a phase, since phases never meet: the peak is the former and
the largest phase. The formulas follow DeepSpeed 0.19 and transformers 5 as their sources stand; each is an upper bound
for full-length sequences, not a measurement.
Letters: b bytes of policy.dtype, in which products are made (parameters, gradients and states are float32), N tokens
of a micro-batch, H hidden, I intermediate, V vocabulary, Q and K elements of a token's queries and keys, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expo.config import RunConfig
from expo.learner.deepspeed import BUCKET_ELEMENTS
from expo.learner.flops import ModelShape
from expo_kernels._launch import chunk_rows, most_rows

GIB = 2**30
FLOAT32 = 4  # bytes
LIVE_PARAMETERS = 1_000_000_000  # elements; DeepSpeed's default of stage3_max_live_parameters
PREFETCH_BUCKET = 50_000_000  # elements; DeepSpeed's default of stage3_prefetch_bucket_size
REPLY_TOKEN_BYTES = 4 + 8  # id and log-prob of a token in rollouts/; the text is smaller
RUNTIME_BYTES = 2 * GIB  # assumed for the CUDA context, NCCL and fragmentation
FEWER = "a lower policy.micro_batch_tokens"
SAMPLING_BUFFERS = 4  # of [batch, V]: logits, over the temperature, probabilities, their sums


@dataclass(frozen=True)
class Part:
    """Something held, and the setting that makes it smaller."""

    name: str
    num_bytes: float
    advice: str


@dataclass(frozen=True)
class Footprint:
    """What one run holds on each of its ranks: a configuration, a shape and a number of ranks, in bytes."""

    config: RunConfig
    shape: ModelShape
    num_ranks: int

    @property
    def itemsize(self) -> int:
        """b, bytes of an activation."""
        return 2 if self.config.policy.dtype == "bfloat16" else 4

    @property
    def trained_parameters(self) -> int:
        """All of the model's, or LoRA's."""
        rank = self.config.policy.lora_rank
        return self.shape.lora_parameters(rank) if rank else self.shape.num_parameters

    @property
    def held_parameters(self) -> int:
        """The model's and LoRA's."""
        return self.shape.num_parameters + self.shape.lora_parameters(self.config.policy.lora_rank)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.config.max_tokens

    @property
    def has_reference(self) -> bool:
        """Whether a second model is held: without KL there is none, and with LoRA the base is its own."""
        return self.config.kl.beta > 0 and self.config.policy.lora_rank == 0

    def sharded(self, num_bytes: float, from_stage: int) -> float:
        """A rank's part of something that ZeRO splits from that stage on."""
        return num_bytes / self.num_ranks if self.config.policy.zero_stage >= from_stage else num_bytes

    def parameter_bytes(self) -> float:
        """Split by stage 3."""
        return self.sharded(FLOAT32 * self.held_parameters, 3)

    def gradient_bytes(self) -> float:
        """Sums over micro-batches, split by stages 2 and 3."""
        return self.sharded(FLOAT32 * self.trained_parameters, 2)

    def optimizer_bytes(self) -> float:
        """Two moments, and from stage 1 on, where they are split, a second copy of the parameters.

        DeepSpeed clones even float32 parameters (zero/stage_1_and_2.py, single_partition_of_fp32_groups;
        zero/stage3.py, fp32_partitioned_groups_flat).
        """
        copies = 3 if self.config.policy.zero_stage else 2
        return self.sharded(copies * FLOAT32 * self.trained_parameters, 1)

    def reference_bytes(self) -> float:
        """The frozen reference policy's parameters, split by stage 3; 0 where there is none."""
        return self.sharded(FLOAT32 * self.shape.num_parameters, 3) if self.has_reference else 0.0

    def bucket_bytes(self) -> float:
        """ZeRO's buffers: gradients being reduced; at stage 3 also parameters gathered for the layers at work."""
        stage, reduced = self.config.policy.zero_stage, min(BUCKET_ELEMENTS, self.held_parameters)
        if stage == 0:
            return float(FLOAT32 * reduced) if self.num_ranks > 1 else 0.0
        live = 0
        if stage == 3 and self.num_ranks > 1:
            live = min(max(LIVE_PARAMETERS, self.shape.embedding_parameters) + PREFETCH_BUCKET, self.held_parameters)
        return float(FLOAT32 * (reduced + live))

    def cast_bytes(self) -> float:
        """Matrices narrowed to b for their products: of all layers until the backward pass, or of one if recomputed."""
        if self.itemsize == FLOAT32:
            return 0.0
        layers = 1 if self.config.policy.gradient_checkpointing else self.shape.num_layers
        return float(self.itemsize * (layers * self.shape.layer_matmul_parameters + self.shape.embedding_parameters))

    def replies_per_update(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        rollout = self.config.rollout
        return rollout.questions_per_step * rollout.group_size // self.config.policy.updates_per_step

    def micro_batch_tokens(self) -> int:
        """N: policy.micro_batch_tokens, or all that a rank has of one optimizer step if that is less."""
        sequences = -(-self.replies_per_update() // self.num_ranks)
        return min(self.config.policy.micro_batch_tokens, sequences * self.longest)

    def logps_bytes(self) -> float:
        """What expo_kernels needs for log-probs: one chunk of float32 logits, and hidden states of N * H * b.

        The chunk has as many rows as expo_kernels gives it, each of V rounded up to 16.
        """
        tokens, hidden, vocab = self.micro_batch_tokens(), self.shape.hidden_size, self.shape.vocab_size
        most = most_rows(
            vocab,
            itemsize=4,
            buffers=1,
            budget_mb=self.config.policy.logits_budget_mb,
            device=torch.device("cpu" if self.config.run.device == "cpu" else "cuda"),
            hidden_size=hidden,
        )
        rows = chunk_rows(tokens, most)
        return float(4 * rows * (-(-vocab // 16) * 16) + tokens * hidden * self.itemsize)

    def loss_bytes(self) -> float:
        """What its linear loss needs: that of the log-probs, and the gradients that it makes in its forward pass.

        Gradients of the hidden states, N * H, and of the head, V * H unless LoRA freezes it: each in float32 and, at
        the end, in b.
        """
        of_hidden = self.micro_batch_tokens() * self.shape.hidden_size
        of_head = 0 if self.config.policy.lora_rank else self.shape.embedding_parameters
        return self.logps_bytes() + (of_hidden + of_head) * (4 + self.itemsize)

    def layer_activation_bytes(self) -> int:
        """What one token leaves behind in one layer for the backward pass.

        Source: Korthikanti et al., arXiv 2205.05198, section 4.1, adapted to what transformers' layers save:
        two RMSNorms at H * 8 + 4 (input, its inverse norm and the normalised input, float32 as the residual stream is);
        the inputs of the products q-k-v and gate-up, 2 * H * b, or one narrowed copy for each of the five;
        queries, keys, values and output of attention, 2 * (Q + K) * b, with 4 a head of log-sum-exp (flash and sdpa)
        or heads * longest sequence of probabilities, in float32 and in b (eager);
        gate, its SiLU, up and their product, 4 * I * b; with normalised queries and keys (Qwen3) (Q + K) * (4 + b) and
        4 a head more. Adapters are left out.
        """
        shape, b = self.shape, self.itemsize
        heads = shape.query_size + shape.kv_size
        norms = 2 * (2 * FLOAT32 * shape.hidden_size + 4)
        if shape.has_qk_norm:
            norms += heads * (4 + b) + 4 * (shape.num_heads + shape.num_kv_heads)
        attention = 2 * heads * b + 4 * shape.num_heads
        if self.config.model.attention == "eager":
            attention = 2 * heads * b + shape.num_heads * self.longest * (4 + (b if b < 4 else 0))
        inputs = 5 if b < FLOAT32 else 2
        return norms + inputs * shape.hidden_size * b + attention + 4 * shape.intermediate_size * b

    def activation_bytes(self) -> float:
        """N tokens' activations of all layers; with checkpointing each layer's input and one layer's activations.

        To either come the gradients of one layer's MLP, 3 * I * b a token.
        """
        shape, b = self.shape, self.itemsize
        layer = self.layer_activation_bytes()
        is_kept = not self.config.policy.gradient_checkpointing
        per_token = shape.num_layers * (layer if is_kept else shape.hidden_size * FLOAT32) + (0 if is_kept else layer)
        return float(self.micro_batch_tokens() * (per_token + 3 * shape.intermediate_size * b))

    def cache_bytes(self) -> float:
        """Keys and values of rollout.batch_size full sequences, and those of one layer again while they grow."""
        batch = self.sampled_at_once()
        return float(batch * self.longest * (2 * self.shape.num_layers + 1) * self.shape.kv_size * self.itemsize)

    def sampling_bytes(self) -> float:
        """Logits of the next tokens and what is made of them; the head narrowed and widened again."""
        head = (4 + self.itemsize) * self.shape.embedding_parameters if self.itemsize < FLOAT32 else 0
        return float(SAMPLING_BUFFERS * self.sampled_at_once() * self.shape.vocab_size * 4 + head)

    def gathered_bytes(self) -> float:
        """Whole parameters for sampling, where stage 3 has split them."""
        is_split = self.config.policy.zero_stage == 3 and self.num_ranks > 1
        return float(self.itemsize * self.held_parameters) if is_split else 0.0

    def engine_weight_bytes(self) -> float:
        """vLLM's copy of the weights on one GPU of the vllm.tensor_parallel that share it."""
        return float(self.itemsize * self.shape.num_parameters / self.config.vllm.tensor_parallel)

    def sampled_at_once(self) -> int:
        """Replies of one rank under way at once: rollout.batch_size, or a step's if they are fewer and all there is."""
        rollout = self.config.rollout
        if self.config.evaluation.sets:
            return rollout.batch_size
        return min(rollout.batch_size, -(-rollout.questions_per_step * rollout.group_size // self.num_ranks))

    def resident(self) -> list[Part]:
        """What a GPU holds all the time."""
        policy = self.config.policy
        return [
            Part(
                "weights",
                0.0 if policy.offload_parameters else self.parameter_bytes(),
                "policy.zero_stage=3" if policy.zero_stage < 3 else "policy.offload_parameters=true",
            ),
            Part(
                "gradients",
                0.0 if policy.offload_optimizer else self.gradient_bytes(),
                "policy.zero_stage=2" if policy.zero_stage < 2 else "policy.offload_optimizer=true",
            ),
            Part(
                "optimizer states",
                0.0 if policy.offload_optimizer else self.optimizer_bytes(),
                "policy.zero_stage=1" if policy.zero_stage < 1 else "policy.offload_optimizer=true",
            ),
            Part(
                "frozen reference",
                0.0 if policy.offload_reference else self.reference_bytes(),
                "policy.offload_reference=true",
            ),
        ]

    def phases(self) -> dict[str, list[Part]]:
        """What is added to that by phase; phases never meet. What vLLM holds is not counted: its share is given."""
        policy = self.config.policy
        checkpointing = "policy.gradient_checkpointing=true"
        sampling = [
            Part("key-value cache", self.cache_bytes(), "a lower rollout.batch_size"),
            Part("next tokens' logits", self.sampling_bytes(), "a lower rollout.batch_size"),
            Part("gathered parameters", self.gathered_bytes(), "policy.zero_stage=2"),
        ]
        found = {
            "sampling": sampling if self.config.rollout.engine == "transformers" else [],
            "backward pass": [
                Part("activations", self.activation_bytes(), FEWER if policy.gradient_checkpointing else checkpointing),
                Part("matrices in bfloat16", self.cast_bytes(), checkpointing),
                Part("loss", self.loss_bytes(), FEWER),
                Part("ZeRO's buffers", self.bucket_bytes(), "a lower policy.zero_stage"),
            ],
        }
        if policy.offload_reference and self.has_reference:
            back = Part("frozen reference, back from the CPU", self.reference_bytes(), "policy.zero_stage=3")
            found["reference log-probs"] = [back, Part("log-probs", self.logps_bytes(), FEWER)]
        return found

    def peak(self) -> tuple[str, float]:
        """The phase that holds most, and its bytes with all that is always there."""
        name, parts = max(self.phases().items(), key=lambda phase: _total(phase[1]))
        return name, RUNTIME_BYTES + _total(self.resident()) + _total(parts)

    def cpu_parts(self, ranks_per_node: int) -> list[Part]:
        """What a node's ranks hold in CPU memory; DeepSpeed keeps offloaded gradients with their states, in float32."""
        policy, node = self.config.policy, ranks_per_node
        states = self.optimizer_bytes() + self.sharded(FLOAT32 * self.trained_parameters, 1)
        return [
            Part("parameters", node * self.parameter_bytes() * policy.offload_parameters, "more nodes"),
            Part("optimizer states, gradients", node * states * policy.offload_optimizer, "more nodes"),
            Part("frozen reference", node * self.reference_bytes() * policy.offload_reference, "policy.zero_stage=3"),
        ]

    def loading_bytes(self, ranks_per_node: int) -> float:
        """CPU memory of a node while every rank reads the weights in float32, or its own part of them at stage 3."""
        return ranks_per_node * self.sharded(FLOAT32 * self.shape.num_parameters, 3)

    def checkpoint_bytes(self) -> float:
        """On disk, all ranks together: the parameters, and the optimizer's float32 of what is trained.

        At stage 3 DeepSpeed writes only frozen parameters: the others follow from their masters.
        """
        stage = self.config.policy.zero_stage
        states = (3 if stage else 2) * FLOAT32 * self.trained_parameters
        unwritten = self.trained_parameters if stage == 3 else 0
        return float(FLOAT32 * (self.held_parameters - unwritten) + states)

    def export_bytes(self) -> float:
        """The Hugging Face folder's weights, adapters merged."""
        return float(self.itemsize * self.shape.num_parameters)

    def replies_bytes(self) -> float:
        """On disk, what `rollout.keep_replies` holds from one checkpoint to the next if every reply is longest."""
        run, rollout = self.config.run, self.config.rollout
        steps = min(run.checkpoint_every or run.steps, run.steps) if rollout.keep_replies else 0
        replies = rollout.questions_per_step * (1 + rollout.max_resamples) * rollout.group_size
        return float(REPLY_TOKEN_BYTES * steps * replies * rollout.max_new_tokens)


def _total(parts: Sequence[Part]) -> float:
    return sum(part.num_bytes for part in parts)
