"""Estimates the memory and disk space of a run from its configuration and the model's shape.

Phases do not overlap, so the peak is the memory that is always held plus that of the largest phase. The formulas follow
the sources of DeepSpeed 0.19 and transformers 5; each is an upper bound for sequences of full length, not a
measurement.
Letters: b bytes per element of policy.dtype, the type of matrix products (parameters, gradients and optimizer states
are float32), N tokens of a micro-batch, H hidden size, I intermediate size, V vocabulary size, Q and K elements of a
token's queries and keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expo.config import RunConfig
from expo.learner.deepspeed import BUCKET_ELEMENTS
from expo.learner.flops import ModelShape
from expo.rollout.vllm.common import CPU_CACHE_GIB, max_lora_rank
from expo_kernels._launch import chunk_rows, most_rows, row_multiple

GIB = 2**30
FLOAT32 = 4  # bytes
LIVE_PARAMETERS = 1_000_000_000  # elements; DeepSpeed's default of stage3_max_live_parameters
PREFETCH_BUCKET = 50_000_000  # elements; DeepSpeed's default of stage3_prefetch_bucket_size
REPLY_TOKEN_BYTES = 4 + 8  # id and log-prob of a token in rollouts/; the text takes less
RUNTIME_BYTES = 2 * GIB  # assumed for the CUDA context, NCCL and fragmentation
CPU_RUNTIME_BYTES = 583 * 2**20  # measured: Python with PyTorch, transformers and DeepSpeed, before a model loads
ADAMW_TEMPORARIES = 2  # of a parameter's size: the square root and the quotient
# with LoRA on a CPU, measured: its many small gradients lie between freed outputs of linear maps, and hold them
LORA_HOLES = 1.7
SAMPLING_BUFFERS = 4  # of [batch, V]: logits, logits / temperature, probabilities, cumulative sums


@dataclass(frozen=True)
class Part:
    """One part of the memory, in bytes."""

    name: str
    num_bytes: float


@dataclass(frozen=True)
class Footprint:
    """The memory and disk space of a run, in bytes; memory is per rank unless a method says otherwise."""

    config: RunConfig
    shape: ModelShape
    num_ranks: int
    longest_prompt: int | None = None
    """Tokens of the longest prompt; None: data.max_prompt_tokens."""
    on_cpu: bool = False
    """Whether the policy is trained on a CPU, where memory is the resident set of each process."""

    @property
    def itemsize(self) -> int:
        """b, bytes per element of an activation."""
        return 2 if self.config.policy.dtype == "bfloat16" else 4

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters: all of the model's, or LoRA's."""
        rank = self.config.policy.lora_rank
        return self.shape.lora_parameters(rank) if rank else self.shape.num_parameters

    @property
    def held_parameters(self) -> int:
        """Number of parameters of the model and of LoRA."""
        return self.shape.num_parameters + self.shape.lora_parameters(self.config.policy.lora_rank)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        if self.longest_prompt is None:
            return self.config.max_tokens
        return self.longest_prompt + self.config.rollout.max_new_tokens

    @property
    def has_reference(self) -> bool:
        """Whether a second model is loaded: not without a KL penalty, and with LoRA the base model is the reference."""
        return self.config.kl.beta > 0 and self.config.policy.lora_rank == 0

    def sharded(self, num_bytes: float, from_stage: int) -> float:
        """A rank's share of something that ZeRO shards from that stage on."""
        return num_bytes / self.num_ranks if self.config.policy.zero_stage >= from_stage else num_bytes

    def parameter_bytes(self) -> float:
        """Parameters; sharded at stage 3."""
        return self.sharded(FLOAT32 * self.held_parameters, 3)

    def gradient_bytes(self) -> float:
        """Gradients, accumulated over micro-batches; sharded at stages 2 and 3."""
        return self.sharded(FLOAT32 * self.trained_parameters, 2)

    def optimizer_bytes(self) -> float:
        """AdamW's two moments and, from stage 1 on, a second copy of the parameters; sharded from stage 1 on.

        DeepSpeed clones even float32 parameters (zero/stage_1_and_2.py, single_partition_of_fp32_groups;
        zero/stage3.py, fp32_partitioned_groups_flat).
        """
        copies = 3 if self.config.policy.zero_stage else 2
        return self.sharded(copies * FLOAT32 * self.trained_parameters, 1)

    def reference_bytes(self) -> float:
        """Parameters of the reference policy, sharded at stage 3; 0 if there is none."""
        return self.sharded(FLOAT32 * self.shape.num_parameters, 3) if self.has_reference else 0.0

    def bucket_bytes(self) -> float:
        """ZeRO's buffers: gradients being reduced and, at stage 3, parameters gathered for the current layers."""
        stage, reduced = self.config.policy.zero_stage, min(BUCKET_ELEMENTS, self.held_parameters)
        if stage == 0:
            return float(FLOAT32 * reduced) if self.num_ranks > 1 else 0.0
        live = 0
        if stage == 3:  # also of a single rank, whose shard is all
            live = min(max(LIVE_PARAMETERS, self.shape.embedding_parameters) + PREFETCH_BUCKET, self.held_parameters)
        return float(FLOAT32 * (reduced + live))

    def flat_gradient_bytes(self) -> float:
        """Gradients that DeepSpeed flattens for a step, or for the sum over ranks; sharded from stage 1 on."""
        return self.sharded(FLOAT32 * self.trained_parameters, 1)

    def cast_bytes(self) -> float:
        """Weight matrices cast to policy.dtype: of all layers until the backward pass, or of one with checkpointing."""
        if self.itemsize == FLOAT32:
            return 0.0
        layers = 1 if self.config.policy.gradient_checkpointing else self.shape.num_layers
        return float(self.itemsize * (layers * self.shape.layer_matmul_parameters + self.shape.embedding_parameters))

    def replies_per_update(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        rollout = self.config.rollout
        return rollout.questions_per_step * rollout.group_size // self.config.policy.updates_per_step

    def micro_batch_tokens(self) -> int:
        """N: policy.micro_batch_tokens, or all tokens of a rank in an optimizer step if they are fewer."""
        sequences = -(-self.replies_per_update() // self.num_ranks)
        return min(self.config.policy.micro_batch_tokens, sequences * self.longest)

    def logps_bytes(self) -> float:
        """Log-probs by expo_kernels: one chunk of float32 logits, and hidden states of N * H * b.

        expo_kernels chooses the rows of a chunk; each has V elements, rounded up to a multiple of 16.
        """
        tokens, hidden, vocab = self.micro_batch_tokens(), self.shape.hidden_size, self.shape.vocab_size
        device = torch.device("cpu" if self.on_cpu else "cuda")
        most = most_rows(
            vocab,
            itemsize=4,
            buffers=1,
            budget_mb=self.config.policy.logits_budget_mb,
            device=device,
            hidden_size=hidden,
            is_split=self.itemsize == FLOAT32,
        )
        rows = chunk_rows(tokens, most, row_multiple(device))
        return float(4 * rows * (-(-vocab // 16) * 16) + tokens * hidden * self.itemsize)

    def loss_bytes(self) -> float:
        """The linear loss: the memory of the log-probs, and the gradients that it computes in its forward pass.

        These are the gradients of the hidden states, N * H, in float32 and, at the end, in policy.dtype, and of the
        head, V * H unless LoRA freezes it, in float32 beside a copy of the head in policy.dtype.
        """
        of_hidden = self.micro_batch_tokens() * self.shape.hidden_size
        of_head = 0 if self.config.policy.lora_rank else self.shape.embedding_parameters
        return self.logps_bytes() + (of_hidden + of_head) * (4 + self.itemsize)

    def layer_activation_bytes(self) -> int:
        """Activations that one token saves in one layer for the backward pass.

        Source: Korthikanti et al., arXiv 2205.05198, section 4.1, adapted to what transformers' layers save:
        two RMSNorms with 8 * H + 4 each (input, inverse norm and normalised input; float32, as the residual stream);
        the inputs of the products q-k-v and gate-up, 2 * H * b, or in bfloat16 a cast copy for each of the five;
        queries, keys, values and output of attention, 2 * (Q + K) * b, and per head 4 for the log-sum-exp (flash and
        sdpa) or the probabilities over the longest sequence, in float32 and in b (eager);
        gate, SiLU(gate), up and their product, 4 * I * b; with normalised queries and keys (Qwen3) another
        (Q + K) * (4 + b), and 4 per head. LoRA's adapters are not counted.
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
        """Activations of N tokens in all layers; with checkpointing, every layer's input and one layer's activations.

        Both include the gradients of one layer's MLP, 3 * I * b per token.
        """
        shape, b = self.shape, self.itemsize
        layer = self.layer_activation_bytes()
        per_token = shape.num_layers * layer
        if self.config.policy.gradient_checkpointing:
            per_token = shape.num_layers * shape.hidden_size * FLOAT32 + layer
        return float(self.micro_batch_tokens() * (per_token + 3 * shape.intermediate_size * b))

    def output_bytes(self) -> float:
        """Outputs of all linear maps of the layers for N tokens."""
        outputs = sum(size for _, size in self.shape.layer_products)
        return float(self.itemsize * self.micro_batch_tokens() * self.shape.num_layers * outputs)

    def cache_bytes(self) -> float:
        """Keys and values of rollout.batch_size full sequences, and a second copy of one layer's while they grow."""
        batch = self.sampled_at_once()
        return float(batch * self.longest * (2 * self.shape.num_layers + 1) * self.shape.kv_size * self.itemsize)

    def sampling_bytes(self) -> float:
        """Logits of the next tokens and buffers made from them; the head cast to policy.dtype and back to float32."""
        head = (4 + self.itemsize) * self.shape.embedding_parameters if self.itemsize < FLOAT32 else 0
        return float(SAMPLING_BUFFERS * self.sampled_at_once() * self.shape.vocab_size * 4 + head)

    def gathered_bytes(self) -> float:
        """The copy of all parameters that samples if stage 3 shards them."""
        return float(self.itemsize * self.held_parameters) if self.config.policy.zero_stage == 3 else 0.0

    def engine_weight_bytes(self) -> float:
        """vLLM's copy of the weights on one GPU, which vllm.tensor_parallel GPUs share, and a whole adapter."""
        adapter = 0
        if self.config.vllm.lora == "adapter":
            adapter = self.shape.lora_parameters(max_lora_rank(self.config.policy.lora_rank))
        return float(self.itemsize * (self.shape.num_parameters / self.config.vllm.tensor_parallel + adapter))

    def sampled_at_once(self) -> int:
        """Replies a rank generates at once: rollout.batch_size or, without evaluations, at most those of a step."""
        rollout = self.config.rollout
        if self.config.evaluation.sets:
            return rollout.batch_size
        return min(rollout.batch_size, -(-rollout.questions_per_step * rollout.group_size // self.num_ranks))

    def resident(self) -> list[Part]:
        """The parts that a GPU, or a process on a CPU, always holds."""
        policy, moves = self.config.policy, not self.on_cpu
        return [
            Part("weights", 0.0 if policy.offload_parameters and moves else self.parameter_bytes()),
            Part("gradients", 0.0 if policy.offload_optimizer and moves else self.gradient_bytes()),
            Part("optimizer states", 0.0 if policy.offload_optimizer and moves else self.optimizer_bytes()),
            Part("frozen reference", 0.0 if policy.offload_reference and moves else self.reference_bytes()),
        ]

    def phases(self) -> dict[str, list[Part]]:
        """The parts that a GPU holds in addition in each phase, without those of vLLM, which has its own share."""
        if self.on_cpu:
            return self._cpu_phases()
        parts = {
            "backward pass": [
                Part("activations", self.activation_bytes()),
                Part("matrices in bfloat16", self.cast_bytes()),
                Part("loss", self.loss_bytes()),
                Part("ZeRO's buffers", self.bucket_bytes()),
            ],
        }
        if self.config.policy.zero_stage and not self.config.policy.offload_optimizer:
            # the reduced gradients of this rank's shard, and the same as one vector
            parts["optimizer step"] = [Part("flat gradients", 2 * self.flat_gradient_bytes())]
        if self.config.rollout.engine == "transformers":
            sampling = [
                Part("key-value cache", self.cache_bytes()),
                Part("next tokens' logits", self.sampling_bytes()),
                Part("gathered parameters", self.gathered_bytes()),
            ]
            parts = {"sampling": sampling, **parts}
        if self.config.policy.offload_reference and self.has_reference:
            onloaded = Part("frozen reference, back from the CPU", self.reference_bytes())
            parts["reference log-probs"] = [onloaded, Part("log-probs", self.logps_bytes())]
        return parts

    def _cpu_phases(self) -> dict[str, list[Part]]:
        """The same on a CPU. The heap keeps what sampling and activations took, since their blocks are small; the large
        blocks of the loss, and of the gradients that DeepSpeed flattens after it, go back to the system.
        """
        policy = self.config.policy
        largest = 0 if policy.lora_rank else self.shape.embedding_parameters
        parts = [
            Part("activations", self.activation_bytes()),
            Part("holes in the heap", LORA_HOLES * self.output_bytes() if policy.lora_rank else 0.0),
            Part("matrices in bfloat16", self.cast_bytes()),
            Part("loss, then flat gradients", max(self.loss_bytes(), self.flat_gradient_bytes())),
            Part("AdamW on the largest matrix", ADAMW_TEMPORARIES * FLOAT32 * largest),
        ]
        if policy.zero_stage:
            parts.append(Part("ZeRO's buffers", self.bucket_bytes() + 2 * self.flat_gradient_bytes()))
        if policy.zero_stage == 3:
            parts.append(Part("gathered parameters", self.gathered_bytes() + self.reference_bytes()))
        if self.config.rollout.engine == "vllm":
            cache = GIB * (self.config.vllm.cache_gib or CPU_CACHE_GIB)
            parts.append(Part("vLLM's weights and cache", self.engine_weight_bytes() + cache))
        if self.config.rollout.engine == "transformers":
            parts += [
                Part("key-value cache", self.cache_bytes()),
                Part("next tokens' logits", self.sampling_bytes()),
            ]
        return {"update": parts}

    @property
    def runtime_bytes(self) -> int:
        """What a process takes besides: on a GPU or, if on_cpu, in the machine's memory."""
        return CPU_RUNTIME_BYTES if self.on_cpu else RUNTIME_BYTES

    def peak(self) -> tuple[str, float]:
        """The phase with the largest memory, and that memory with the parts that are always held."""
        name, parts = max(self.phases().items(), key=lambda phase: _total(phase[1]))
        return name, self.runtime_bytes + self.resident_bytes() + _total(parts)

    def resident_bytes(self) -> float:
        """What is always held, without `runtime_bytes`."""
        return _total(self.resident())

    def cpu_parts(self, ranks_per_node: int) -> list[Part]:
        """The CPU memory of a node; DeepSpeed offloads gradients together with the optimizer states, in float32."""
        policy, node = self.config.policy, ranks_per_node
        states = self.optimizer_bytes() + self.sharded(FLOAT32 * self.trained_parameters, 1)
        return [
            Part("parameters", node * self.parameter_bytes() * policy.offload_parameters),
            Part("optimizer states, gradients", node * states * policy.offload_optimizer),
            Part("frozen reference", node * self.reference_bytes() * policy.offload_reference),
        ]

    def loading_bytes(self, ranks_per_node: int) -> float:
        """CPU memory of a node while every rank reads the float32 weights, or at stage 3 its shard of them."""
        return ranks_per_node * self.sharded(FLOAT32 * self.shape.num_parameters, 3)

    def checkpoint_bytes(self) -> float:
        """Disk space of a checkpoint of all ranks: parameters, and float32 optimizer states of the trained ones.

        At stage 3 DeepSpeed writes only frozen parameters, because the optimizer states hold the others in float32.
        """
        stage = self.config.policy.zero_stage
        states = (3 if stage else 2) * FLOAT32 * self.trained_parameters
        unwritten = self.trained_parameters if stage == 3 else 0
        return float(FLOAT32 * (self.held_parameters - unwritten) + states)

    def export_bytes(self) -> float:
        """Disk space of the exported weights, with merged adapters."""
        return float(self.itemsize * self.shape.num_parameters)

    def replies_bytes(self) -> float:
        """Disk space of the replies that rollout.keep_replies keeps between checkpoints, if all have full length."""
        run, rollout = self.config.run, self.config.rollout
        steps = min(run.checkpoint_every or run.steps, run.steps) if rollout.keep_replies else 0
        replies = rollout.questions_per_step * (1 + rollout.max_resamples) * rollout.group_size
        return float(REPLY_TOKEN_BYTES * steps * replies * rollout.max_new_tokens)


def _total(parts: Sequence[Part]) -> float:
    return sum(part.num_bytes for part in parts)
