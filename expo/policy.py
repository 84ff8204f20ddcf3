"""The policy under training: log-probabilities, the loss and the step, behind one small interface.

Policy, old and reference log-probabilities come from one code path (`expo_kernels`), over the same micro-batches and
at one temperature: before the first update every ratio is exactly 1 and the KL exactly 0.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from expo.batch import Batch, collate, split_by_tokens
from expo.config import OptimizerSection, PolicySection, RunConfig
from expo.model import hidden_states, logit_softcap
from expo_kernels import linear_expo_loss, linear_token_logps


@dataclass(frozen=True)
class Sample:
    """One reply to learn from: prompt_ids, reply_ids, the rollout's logps of those in nats, and its advantage."""

    prompt_ids: Sequence[int]
    reply_ids: Sequence[int]
    rollout_logps: Sequence[float]
    advantage: float


@dataclass(frozen=True)
class MicroBatch:
    """What one forward-backward pass reads.

    advantages: [B] float32; rollout_logps: [B, S] float32 nats, what the rollout engine said when it sampled;
    old_logps: [B, S] float32 nats, or None where the policy has not moved since it sampled;
    ref_logps: [B, S] float32 nats, or None without a reference policy.
    """

    batch: Batch
    advantages: Tensor
    rollout_logps: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None


class Policy(Protocol):
    """What the training loop needs of a policy."""

    def prepare(self, samples: Sequence[Sample]) -> list[list[MicroBatch]]:
        """The optimizer steps that `samples` make, each a list of micro-batches with old and reference logps."""

    def update(self, micro_batches: Sequence[MicroBatch], beta: Tensor) -> dict[str, float]:
        """One optimizer step; its metrics, as means over all tokens of the step."""

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on with equal bits."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state that `state_dict` gave."""

    def export(self, folder: Path) -> None:
        """Writes the weights as a transformers folder."""


class TorchPolicy:
    """A transformers model trained by AdamW in one process.

    Args:
        config: the run's; its policy, optimizer, kl and objective sections are read.
        model: a causal language model with a bias-free or biased linear head, trained in place.
        reference: the frozen reference model, or None where kl.beta is 0.
        pad_id: token that fills padding; its value never matters.
    """

    def __init__(self, config: RunConfig, model: Any, reference: Any | None, pad_id: int) -> None:
        self._section: PolicySection = config.policy
        self._optimizer_section: OptimizerSection = config.optimizer
        self._num_updates = config.run.steps * config.policy.updates_per_step
        self._dtype = getattr(torch, config.policy.dtype)
        self._objective = dataclasses.replace(config.loss_objective(), logit_softcap=logit_softcap(model))
        self._model = model.train()
        self._reference = reference.eval().requires_grad_(False) if reference is not None else None
        self._pad_id = pad_id
        self._updates_done = 0
        if config.policy.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
        )

    @property
    def learning_rate(self) -> float:
        """The rate of the next optimizer step."""
        section, step = self._optimizer_section, self._updates_done
        warmup = section.warmup_steps * self._section.updates_per_step
        if step < warmup:
            return section.lr * (step + 1) / warmup
        if section.schedule == "linear":
            return section.lr * (self._num_updates - step) / (self._num_updates - warmup)
        return section.lr

    def prepare(self, samples: Sequence[Sample]) -> list[list[MicroBatch]]:
        """Equal mini-batches in the order given, each cut into micro-batches of similar lengths."""
        size = len(samples) // self._section.updates_per_step
        return [self._micro_batches(samples[start : start + size]) for start in range(0, len(samples), size)]

    def _micro_batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        lengths = [len(sample.prompt_ids) + len(sample.reply_ids) for sample in samples]
        groups = split_by_tokens(lengths, self._section.micro_batch_tokens)
        return [self._micro_batch([samples[row] for row in rows]) for rows in groups]

    def _micro_batch(self, samples: Sequence[Sample]) -> MicroBatch:
        device = self._model.device
        prompts, replies = [s.prompt_ids for s in samples], [s.reply_ids for s in samples]
        batch = collate(prompts, replies, self._pad_id, device)
        rollout_logps = torch.zeros(batch.completion_mask.shape, device=device)
        said = [logp for sample in samples for logp in sample.rollout_logps]
        rollout_logps[batch.completion_mask] = torch.tensor(said, device=device)
        # one update per batch of rollouts is on-policy: its old log-probs are its own, and cost no pass
        moves_between = self._section.updates_per_step > 1
        return MicroBatch(
            batch=batch,
            advantages=torch.tensor([sample.advantage for sample in samples], device=device),
            rollout_logps=rollout_logps,
            old_logps=self.logps(batch) if moves_between else None,
            ref_logps=self._logps_of(self._reference, batch) if self._reference is not None else None,
        )

    def logps(self, batch: Batch) -> Tensor:
        """Log-probabilities [B, S] of the reply tokens under the present weights, nats; 0 elsewhere."""
        return self._logps_of(self._model, batch)

    @torch.no_grad()
    def _logps_of(self, model: Any, batch: Batch) -> Tensor:
        head = model.get_output_embeddings()
        return linear_token_logps(
            hidden_states(model, batch.input_ids, self._dtype),
            head.weight,
            batch.completion_ids,
            bias=head.bias,
            mask=batch.completion_mask,
            temperature=self._objective.temperature,
            logit_softcap=self._objective.logit_softcap,
            logits_budget_mb=self._section.logits_budget_mb,
        )

    def update(self, micro_batches: Sequence[MicroBatch], beta: Tensor) -> dict[str, float]:
        """One AdamW step on all of `micro_batches`; how they were cut does not change it."""
        # counted over the whole update before its first backward pass
        num_tokens = sum(int(micro.batch.completion_mask.sum()) for micro in micro_batches)
        num_sequences = sum(len(micro.advantages) for micro in micro_batches)
        normalizer = float(num_tokens if self._objective.aggregation == "token" else num_sequences)
        totals: dict[str, float] = {"loss": 0.0}
        for micro in micro_batches:
            output = self._loss(micro, beta, normalizer)
            output.loss.backward()
            totals["loss"] += float(output.loss.detach())
            sampled_under = output.logps if micro.old_logps is None else micro.old_logps
            difference = (sampled_under - micro.rollout_logps).abs().max()
            _add_metrics(totals, {**output.metrics, "rollout_logp_difference_max": difference}, num_tokens)
        rate = self.learning_rate
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._optimizer_section.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._updates_done += 1
        return {**totals, "grad_norm": float(norm), "learning_rate": rate}

    def _loss(self, micro: MicroBatch, beta: Tensor, normalizer: float) -> Any:
        head = self._model.get_output_embeddings()
        return linear_expo_loss(
            hidden_states(self._model, micro.batch.input_ids, self._dtype),
            head.weight,
            micro.batch.completion_ids,
            micro.batch.completion_mask,
            bias=head.bias,
            advantages=micro.advantages,
            old_logps=micro.old_logps,
            ref_logps=micro.ref_logps,
            beta=beta if micro.ref_logps is not None else 0.0,
            objective=self._objective,
            normalizer=normalizer,
            logits_budget_mb=self._section.logits_budget_mb,
            return_entropy=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """Weights, AdamW moments and the number of updates done."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "updates_done": self._updates_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state that `state_dict` gave, in place: engines that share the model see it."""
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._updates_done = state["updates_done"]

    def export(self, folder: Path) -> None:
        """Writes safetensors, config and generation config."""
        self._model.save_pretrained(folder)


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _add_metrics(totals: dict[str, float], metrics: dict[str, Tensor], num_tokens: int) -> None:
    """Adds a micro-batch's token means, weighted by its share of the step's tokens; maxima stay maxima."""
    share = float(metrics["tokens"]) / max(num_tokens, 1)
    for name, value in metrics.items():
        if name.endswith("_max"):
            totals[name] = max(totals.get(name, 0.0), float(value))
        elif name != "tokens":
            totals[name] = totals.get(name, 0.0) + share * float(value)
