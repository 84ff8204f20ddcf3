"""A policy that is sampled from and not trained."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from expo.config import ModelSection, PolicySection
from expo.evaluation.saved_weights import load_checkpoint_weights
from expo.learner.batch import Batch
from expo.learner.model import PolicyModule, load_model, logit_softcap, require_own_logits
from expo.learner.model_checks import check_finite
from expo_kernels import Objective


class FrozenPolicy:
    """The model that `model.path` names, or a checkpoint of a run that started from it.

    It has what a rollout engine and a weight sync need of a policy.

    Args:
        model: the model to load.
        policy: dtype and logits budget; for a checkpoint also how its run saved the weights.
        device: device of the model.
        checkpoint: folder of a checkpoint of `expo.run.checkpoint`; None: the model as it is.

    Raises: ConfigError if the model does not load.
    """

    is_unsharded = True

    def __init__(
        self, model: ModelSection, policy: PolicySection, device: torch.device, checkpoint: Path | None = None
    ) -> None:
        self.dtype: torch.dtype = getattr(torch, policy.dtype)
        self.model, self.tokenizer = load_model(model, device)
        if checkpoint is not None:
            load_checkpoint_weights(self.model, policy, checkpoint / "policy")
        self.model.eval().requires_grad_(False)
        check_finite(model.path, self.model)
        require_own_logits(self.model)
        objective = Objective(logit_softcap=logit_softcap(self.model))
        self._module = PolicyModule(self.model, objective, self.dtype, policy.logits_budget_mb)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in `dtype` with its name in the model; a tied head appears once."""
        return ((name, value.to(self.dtype)) for name, value in self.model.named_parameters())

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """Log-probabilities [B, S] float32 of a padded batch's reply tokens at temperature 1, nats; 0 elsewhere."""
        logps: Tensor = self._module(batch.to(self.model.device))
        return logps.to(batch.input_ids.device)

    def checksum(self) -> str:
        """SHA-256 over the names, shapes and float32 values of all weights; it does not depend on the file format."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.named_parameters()):
            digest.update(f"{name} {list(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().numpy())
        return digest.hexdigest()
