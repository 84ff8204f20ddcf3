"""How far the trainer's log-probabilities are from the rollout engine's, on the tokens that were sampled.

The engine samples with its own numerics, so the policy that gave the replies is not quite the one that learns from
them. Letters: N reply tokens of a step, over all its updates, micro-batches and ranks; w = exp(trainer - rollout) of
each, the weight that would correct for it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from expo.runtime.distributed import Ranks

QUANTILES = {"rollout_ratio_median": 0.5, "rollout_ratio_p99": 0.99}
NAMES = (
    "rollout_logp_difference_mean",
    "rollout_logp_difference_max",
    *QUANTILES,
    "rollout_effective_sample_fraction",
)


class Mismatch:
    """Differences of a step, held on the device until they are asked for: nothing is waited for while it learns."""

    def __init__(self) -> None:
        self._differences: list[Tensor] = []
        self._masks: list[Tensor] = []

    def add(self, logps: Tensor, rollout_logps: Tensor, completion_mask: Tensor) -> None:
        """Adds a micro-batch: log-probs of one shape in nats, under the policy as it was when the engine sampled."""
        self._differences.append((logps - rollout_logps).flatten())
        self._masks.append(completion_mask.flatten())

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """What `STEP_METRICS` lists under these names, of all that was added on every rank; nan without a token."""
        mine = torch.cat(self._differences)[torch.cat(self._masks)] if self._masks else torch.empty(0)
        # quantiles of parts do not make the quantile of the whole: the tokens themselves come together, at 4 bytes each
        return summary(mine if ranks.size == 1 else torch.cat(ranks.all_gather_tensor(mine.cpu())))


def summary(differences: Tensor) -> dict[str, float]:
    """The metrics of differences trainer - rollout, [N] float32, nats, in any order."""
    if not len(differences):
        return dict.fromkeys(NAMES, math.nan)
    apart, weights = differences.abs(), differences.double().exp()
    found = torch.stack(
        [
            apart.double().mean(),
            apart.max().double(),
            *_quantiles(weights, list(QUANTILES.values())),
            weights.sum() ** 2 / (len(weights) * weights.square().sum()),
        ]
    )
    return dict(zip(NAMES, found.tolist(), strict=True))


def _quantiles(values: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """For each share the smallest value with at least that share of all values at or below it."""
    ordered = values.sort().values
    return [ordered[math.ceil(share * len(values)) - 1] for share in shares]
