"""A model that is only sampled from: what a rollout engine and the proof of its weights need of a policy."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from expo.config import RunConfig
from expo.evaluation.saved_weights import load_checkpoint_weights
from expo.learner.batch import Batch
from expo.learner.model import PolicyModule, load_model, logit_softcap
from expo_kernels import Objective


class FrozenPolicy:
    """The model that `config.model` names, or a checkpoint of a run that started from it.

    Args:
        config: its model and policy sections are read.
        device: where the model lies.
        checkpoint: a folder of `expo.run.checkpoint`; None: the model as it is.

    Raises: ConfigError if the model does not load.
    """

    is_unsharded = True  # every weight is here

    def __init__(self, config: RunConfig, device: torch.device, checkpoint: Path | None = None) -> None:
        self.dtype: torch.dtype = getattr(torch, config.policy.dtype)
        self.model, self.tokenizer = load_model(config.model, device)
        if checkpoint is not None:
            load_checkpoint_weights(self.model, config.policy, checkpoint / "policy")
        self.model.eval().requires_grad_(False)
        objective = Objective(logit_softcap=logit_softcap(self.model))
        self._module = PolicyModule(self.model, objective, self.dtype, config.policy.logits_budget_mb)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in `dtype` under its name in the model; a tied head is named once."""
        return ((name, value.to(self.dtype)) for name, value in self.model.named_parameters())

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """Log-probabilities [B, S] of the reply tokens of a padded batch at temperature 1, nats; 0 elsewhere."""
        tensors = (batch.input_ids, batch.completion_ids, batch.completion_mask)
        found: Tensor = self._module(Batch(*(tensor.to(self.model.device) for tensor in tensors)))
        return found.to(batch.input_ids.device)

    def checksum(self) -> str:
        """SHA-256 over names, shapes and float32 values, however they were stored."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.named_parameters()):
            digest.update(f"{name} {list(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().numpy())
        return digest.hexdigest()
