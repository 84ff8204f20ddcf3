"""The mismatch of trainer and rollout engine: differences of their log-probabilities on the sampled tokens.

The engine samples with its own numerics, so the policy that sampled the replies differs slightly from the one that is
trained on them. Letters: N reply tokens of a step, over all its updates, micro-batches and ranks; w = exp(trainer -
rollout) of each token, the importance weight that would correct for it.
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
    """Collects the differences of a step; they stay on the device until `metrics`, so updates do not wait."""

    def __init__(self) -> None:
        self._differences: list[Tensor] = []
        self._masks: list[Tensor] = []

    def add(self, logps: Tensor, rollout_logps: Tensor, completion_mask: Tensor) -> None:
        """Adds a micro-batch: log-probs in nats of one shape, of the policy that the engine sampled from."""
        self._differences.append((logps - rollout_logps).flatten())
        self._masks.append(completion_mask.flatten())

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """The metrics over all tokens added on all ranks; NaN without a token. `STEP_METRICS` describes them."""
        own = torch.cat(self._differences)[torch.cat(self._masks)] if self._masks else torch.empty(0)
        # quantiles cannot be computed from the quantiles of each rank: all differences are gathered, 4 bytes each
        return summary(own if ranks.size == 1 else torch.cat(ranks.all_gather_tensor(own.cpu())))


def summary(differences: Tensor) -> dict[str, float]:
    """The metrics of differences trainer - rollout, [N] float32, nats, in any order."""
    if not len(differences):
        return dict.fromkeys(NAMES, math.nan)
    absolute, weights = differences.abs(), differences.double().exp()
    values = torch.stack(
        [
            absolute.double().mean(),
            absolute.max().double(),
            *_quantiles(weights, list(QUANTILES.values())),
            weights.sum() ** 2 / (len(weights) * weights.square().sum()),
        ]
    )
    return dict(zip(NAMES, values.tolist(), strict=True))


def _quantiles(values: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """For each share the smallest value with at least that share of all values at or below it."""
    ordered = values.sort().values
    return [ordered[math.ceil(share * len(values)) - 1] for share in shares]
