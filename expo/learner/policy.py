"""The policy under training with DeepSpeed: log-probabilities, loss and optimizer step, on one rank or many.

Current, old and reference log-probabilities come from one code path (`expo_kernels`), over the same micro-batches and
at one temperature: before the first update every ratio is exactly 1 and the KL exactly 0.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from expo.config import PolicySection, RunConfig
from expo.learner._compat_deepspeed import num_dimensions, set_gradient_clipping
from expo.learner.batch import Batch, MicroBatch, MiniBatch, mini_batches
from expo.learner.deepspeed import gathered_parameters, load_states, partitioned_loading, save_states, start_engine
from expo.learner.lora import (
    add_adapters,
    base_weights,
    disabled_adapters,
    is_adapter,
    merge_adapters,
    scaled_adapters,
)
from expo.learner.mismatch import Mismatch
from expo.learner.model import PolicyModule, check_dtype, load_model, logit_softcap, require_own_logits
from expo.learner.model_checks import check_finite, check_packing, check_same_weights
from expo.learner.model_folder import write_model
from expo.runtime.distributed import Ranks
from expo.types import Sample


class Policy(Protocol):
    """The interface of a policy, for the training loop."""

    def prepare(self, samples: Sequence[Sample]) -> list[MiniBatch]:
        """Splits all ranks' `samples` into one mini-batch per update; computes this rank's old and reference logps."""

    def update(self, mini_batch: MiniBatch, beta: Tensor) -> dict[str, float]:
        """Takes one optimizer step; returns its metrics, means over all tokens of the mini-batch."""

    def mismatch(self) -> dict[str, float]:
        """Metrics of the difference between the policy's and the rollout engine's log-probs, since `prepare`."""

    def save(self, folder: Path) -> None:
        """Writes the state from which training continues bit for bit into an empty folder; all ranks call it."""

    def load(self, folder: Path, other_ranks: bool = False) -> None:
        """Restores what `save` wrote; `other_ranks`: by another number of ranks."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, unsharded, with its name in the model; all ranks iterate together."""

    def export(self, folder: Path) -> None:
        """Writes the model as a transformers folder; all ranks call it."""


class DeepSpeedPolicy:
    """A transformers model trained by AdamW; `policy.zero_stage` is DeepSpeed's.

    Args:
        config: of the run; its model, policy, optimizer, kl, objective, rollout and run sections are used.
        ranks: the processes of the run.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        section, self._optimizer_section = config.policy, config.optimizer
        self._section: PolicySection = section
        self._ranks = ranks
        self._num_updates = config.run.steps * section.updates_per_step
        self._updates_done = 0
        self._mismatch = Mismatch()
        self.dtype: torch.dtype = getattr(torch, section.dtype)
        with partitioned_loading(section):
            self.model, self.tokenizer = load_model(config.model, ranks.device)
            needs_reference = config.kl.beta > 0 and section.lora_rank == 0
            reference = load_model(config.model, ranks.device)[0] if needs_reference else None
        ranks.raise_on_all_ranks(lambda: check_finite(config.model.path, self.model))
        if self.is_unsharded:
            check_same_weights(config.model.path, self.model, ranks)
            require_own_logits(self.model)
        self._objective = dataclasses.replace(config.loss_objective(), logit_softcap=logit_softcap(self.model))
        self._entropy_bonus = config.objective.entropy_bonus
        if section.lora_rank:
            add_adapters(self.model, section.lora_rank, section.lora_alpha, config.run.seed)
        if section.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._pad_id = self.tokenizer.pad_token_id
        if self._pad_id is None:
            self._pad_id = self.tokenizer.eos_token_id
        self._engine = self._start_engine(self._policy_module(self.model).train(), self._adamw())
        self._reference_logps = self._build_reference(reference, config.kl.beta)
        if section.packing:
            self._require_separate_sequences()

    def _require_separate_sequences(self) -> None:
        """Raises: ConfigError, which names the family, if packed sequences depend on each other."""
        module, dtype = self._engine.module, check_dtype(self.model)
        hidden = self._no_grad(lambda batch: module(batch, returns_hidden=True))
        module.dtype = dtype
        try:
            check_packing(self.model, hidden, dtype)
        finally:
            module.dtype = self.dtype

    def _policy_module(self, model: Any) -> PolicyModule:
        section = self._section
        return PolicyModule(model, self._objective, self.dtype, section.logits_budget_mb, section.gradient_tolerance)

    def _adamw(self) -> torch.optim.Optimizer:
        section = self._optimizer_section
        return torch.optim.AdamW(
            _parameter_groups(self.model, section.weight_decay),
            lr=section.lr,
            betas=section.betas,
            fused=self._ranks.device.type == "cuda" and not self._section.offload_optimizer,
        )

    def _start_engine(self, module: PolicyModule, optimizer: torch.optim.Optimizer | None) -> Any:
        return start_engine(module, optimizer, self._section, self._optimizer_section.max_grad_norm)

    def _build_reference(self, reference: Any | None, beta: float) -> "Callable[[Batch], Tensor] | None":
        """The function that computes log-probs under the reference policy; None without a KL penalty."""
        if beta == 0:
            return None
        if reference is None:
            return self._logps_without_adapters
        module = self._policy_module(reference).eval().requires_grad_(False)
        if self._section.zero_stage == 3:
            return self._no_grad(self._start_engine(module, None).module)
        if not self._section.offload_reference:
            return self._no_grad(module)
        module.to("cpu")

        def offloaded_logps(batch: Batch) -> Tensor:
            module.to(self._ranks.device)
            try:
                return self._no_grad(module)(batch)
            finally:
                module.to("cpu")

        return offloaded_logps

    @staticmethod
    def _no_grad(module: Any) -> Callable[[Batch], Tensor]:
        def logps(batch: Batch) -> Tensor:
            with torch.no_grad():
                result: Tensor = module(batch)
            return result

        return logps

    def _logps_without_adapters(self, batch: Batch) -> Tensor:
        with disabled_adapters(self.model):
            return self.logps(batch)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        section, step = self._optimizer_section, self._updates_done
        warmup = section.warmup_steps * self._section.updates_per_step
        if step < warmup:
            return section.lr * (step + 1) / warmup
        if section.schedule == "linear":
            return section.lr * (self._num_updates - step) / (self._num_updates - warmup)
        return section.lr

    def logps(self, batch: Batch) -> Tensor:
        """Log-probabilities [B, S] (packed: [N]) of the reply tokens under the current weights, nats; 0 elsewhere."""
        return self._no_grad(self._engine.module)(batch)

    # --- samples into mini-batches

    def prepare(self, samples: Sequence[Sample]) -> list[MiniBatch]:
        """Equal mini-batches in the order of the samples, each split by tokens over ranks and micro-batches."""
        self._mismatch = Mismatch()
        return [
            dataclasses.replace(
                mini_batch, micro_batches=[self._with_logps(micro) for micro in mini_batch.micro_batches]
            )
            for mini_batch in mini_batches(
                samples, self._section, self._pad_id, self._ranks, skips_zero_advantages=self._skips_zero_advantages
            )
        ]

    @property
    def _skips_zero_advantages(self) -> bool:
        """Whether a reply without an advantage has no gradient: nothing but the surrogate depends on its log-probs."""
        return self._reference_logps is None and self._entropy_bonus == 0

    def _with_logps(self, micro: MicroBatch) -> MicroBatch:
        return dataclasses.replace(
            micro,
            old_logps=self._old_logps(micro),
            ref_logps=self._reference_logps(micro.batch) if self._reference_logps is not None else None,
        )

    def _old_logps(self, micro: MicroBatch) -> Tensor | None:
        if self._section.old_logps == "rollout":
            return micro.rollout_logps
        # a single update per step is on-policy: its old log-probs are the current ones, without a further pass
        return self.logps(micro.batch) if self._section.updates_per_step > 1 else None

    # --- one optimizer step

    def update(self, mini_batch: MiniBatch, beta: Tensor) -> dict[str, float]:
        """One AdamW step on all ranks' micro-batches; `skipped` is 1 if loss or gradient was not finite."""
        sums, beta = _Sums(), self._on_device(beta)
        is_token_mean = self._objective.aggregation == "token"
        normalizer = float(max(mini_batch.num_tokens if is_token_mean else mini_batch.num_sequences, 1))
        last = len(mini_batch.micro_batches) - 1
        for index, micro in enumerate(mini_batch.micro_batches):
            self._engine.set_gradient_accumulation_boundary(index == last)
            loss, metrics, logps = self._engine(
                micro.batch,
                advantages=micro.advantages,
                old_logps=micro.old_logps,
                ref_logps=micro.ref_logps,
                rollout_logps=micro.rollout_logps if self._objective.rollout_correction else None,
                beta=beta if micro.ref_logps is not None else 0.0,
                entropy_bonus=self._entropy_bonus,
                normalizer=normalizer,
            )
            # times size: DeepSpeed averages over ranks, but the normalizer counts all of them already; 0 * loss: a
            # non-finite loss makes the gradient non-finite, which every rank sees
            self._engine.backward(loss * self._ranks.size * (1 + 0 * loss.detach()), scale_wrt_gas=False)
            self._add_mismatch(micro, logps)
            sums.add(loss, metrics)
        rate = self.learning_rate
        norm, is_applied = self._step(rate, sums)
        self._updates_done += 1
        return {
            **sums.means(mini_batch.num_trained_tokens, self._ranks),
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped": float(not is_applied),
        }

    def _on_device(self, beta: Tensor) -> Tensor:
        if beta.device.type != "cpu":
            return beta.to(self._ranks.device)
        # an argument of a kernel, where a copy would wait for the device
        return torch.full((), float(beta), dtype=torch.float32, device=self._ranks.device)

    def _add_mismatch(self, micro: MicroBatch, logps: Tensor) -> None:
        if self._section.old_logps == "recompute":
            logps = logps if micro.old_logps is None else micro.old_logps
        elif self._updates_done % self._section.updates_per_step:
            return  # the policy was updated, and its log-probs at sampling time were not computed
        self._mismatch.add(logps, micro.rollout_logps, micro.batch.completion_mask)

    def mismatch(self) -> dict[str, float]:
        """The metrics of `mismatch.py` since `prepare`; with old_logps = rollout, of the first update only."""
        return self._mismatch.metrics(self._ranks)

    def _step(self, rate: float, sums: "_Sums") -> tuple[float, bool]:
        """Takes the optimizer step; gradient norm before clipping, and whether it was applied.

        Reads `sums`, together with the norm where the policy clips: the one time in an update that the host waits for
        the device, beside DeepSpeed's own reads with ZeRO.
        """
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        if self._section.zero_stage > 0:
            engine.step()
            sums.read()
            return float(engine.get_global_grad_norm()), bool(engine.was_step_applied())
        norm = sums.read(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._optimizer_section.max_grad_norm))
        if math.isfinite(norm):
            engine.step()
        else:
            engine.zero_grad()
        return norm, math.isfinite(norm)

    # --- weights and checkpoints

    def save(self, folder: Path) -> None:
        """Writes DeepSpeed's states and the number of updates done; every rank writes its part.

        Raises: OSError if this rank could not write, after all ranks have finished.
        """
        save_states(self._engine, folder, {"updates_done": self._updates_done})

    def load(self, folder: Path, other_ranks: bool = False) -> None:
        """Restores a state that `save` wrote, in place: an engine that shares the model sees it.

        For another number of ranks, the states that ZeRO partitioned are converted.
        """
        converts = other_ranks and self._section.zero_stage > 0
        state = load_states(self._engine, folder, self._ranks, converts=converts)
        self._updates_done = state["updates_done"]
        if self._section.zero_stage > 0:
            set_gradient_clipping(self._engine, self._optimizer_section.max_grad_norm)  # it may change on resume

    @property
    def is_unsharded(self) -> bool:
        """Whether every rank holds every weight of `model`, so that a rollout engine can share it."""
        return self._section.zero_stage < 3

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, unsharded, in `policy.dtype` with its name in the model, adapters merged; a tied head comes
        once. All ranks iterate together; the tensors are copies.
        """
        weights = gathered_parameters(self.model, self.dtype, self._section.zero_stage)
        yield from merge_adapters(dict(weights), self.model).items() if self._section.lora_rank else weights

    def named_base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight that LoRA leaves as it is, as `named_weights`; without LoRA, all of them."""
        stage = self._section.zero_stage
        return base_weights(gathered_parameters(self.model, self.dtype, stage, lambda name: not is_adapter(name)))

    def named_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Both matrices of every LoRA adapter, as `scaled_adapters` names and scales them, in `policy.dtype`; all ranks
        iterate together.
        """
        adapters = gathered_parameters(self.model, torch.float32, self._section.zero_stage, is_adapter)
        return scaled_adapters(adapters, self.model, self.dtype)

    def export(self, folder: Path) -> None:
        """Writes safetensors in `policy.dtype`, config and generation config on rank 0; all ranks call it."""
        state = {name: value.cpu() for name, value in self.named_weights()}
        if self._ranks.is_rank0:
            write_model(folder, self.model, state, self.dtype)


# the metrics of the loss; `kept_columns` and `gradient_error_bound` only with a gradient tolerance
MEANS = ("kl", "entropy", "ratio_mean", "clip_low_fraction", "clip_high_fraction", "kept_columns")
MAXIMA = ("ratio_max", "gradient_error_bound")


class _Sums:
    """Sums of the metrics over an update's tokens, and maxima; on the device until they are read."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._maxima: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # float64, in the order of `_names`; the loss is a sum itself
        self._largest: Tensor | None = None
        self._read: list[float] = []

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch."""
        self._names = ("loss", *(name for name in MEANS if name in metrics))
        self._maxima = tuple(name for name in MAXIMA if name in metrics)
        weighted = [metrics[name].double() * metrics["tokens"] for name in self._names[1:]]
        values = torch.stack([loss.detach().double(), *weighted])
        largest = torch.stack([metrics[name].double() for name in self._maxima])
        self._sums = values if self._sums is None else self._sums + values
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def read(self, *others: Tensor) -> float:
        """Copies the sums and 0-dim tensors to the host at once; returns the last number."""
        assert self._sums is not None
        assert self._largest is not None
        self._read = torch.cat([self._sums, self._largest, *(other.double().view(1) for other in others)]).tolist()
        return self._read[-1]

    def means(self, num_tokens: int, ranks: Ranks) -> dict[str, float]:
        """The means by name, for `num_tokens` tokens over all ranks, and the maxima."""
        size = len(self._names)
        loss, *sums = ranks.all_reduce_sum(self._read[:size])
        means = [loss, *(value / max(num_tokens, 1) for value in sums)]
        maxima = ranks.all_reduce_max(self._read[size : size + len(self._maxima)])
        return dict(zip(self._names + self._maxima, [*means, *maxima], strict=True))


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices with weight decay, norms and biases without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dims = {id(parameter): num_dimensions(parameter) for parameter in parameters}
    return [
        {"params": [p for p in parameters if dims[id(p)] >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if dims[id(p)] < 2], "weight_decay": 0.0},
    ]
