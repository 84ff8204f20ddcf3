"""The groups of a step: all that were sampled, and those that it learns from.

Source: dynamic sampling, DAPO (arXiv 2503.14476, section 3.2). A group whose rewards are all equal has no advantages;
it makes room for the group of another question. What a step measures, accuracy and pass rates above all, it measures
over every group sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from expo.rewards.graded import GradedRollouts, joined


@dataclass(frozen=True)
class Rollouts:
    """Groups sampled in rounds, in the order in which their questions were drawn; `size` of them are learnt from."""

    rounds: Sequence[GradedRollouts]
    size: int

    @cached_property
    def sampled(self) -> GradedRollouts:
        """Every group."""
        return joined(self.rounds)

    @cached_property
    def kept_groups(self) -> GradedRollouts:
        """The first `size` groups that teach something; where these are too few, the first of the others with them."""
        first = teaches(self.sampled.rewards).int().argsort(descending=True, stable=True)[: self.size]
        return self.sampled.select(first.sort().values.tolist())

    @property
    def num_missing(self) -> int:
        """Groups that a further round is to replace."""
        return max(self.size - int(teaches(self.sampled.rewards).sum()), 0)

    def metrics(self) -> dict[str, int]:
        """Entries of metrics.jsonl, as `STEP_METRICS` lists them."""
        num_sampled = len(self.sampled.prompts)
        return {
            "groups_sampled": num_sampled,
            "groups_dropped": num_sampled - self.size,
            "resampling_rounds": len(self.rounds) - 1,
        }


def teaches(rewards: Tensor) -> Tensor:
    """Whether the rewards [Q, G] of each group differ at all, [Q] bool."""
    # asked of the rewards themselves: the float std of equal rewards need not be 0
    return rewards.amax(dim=1) != rewards.amin(dim=1)
