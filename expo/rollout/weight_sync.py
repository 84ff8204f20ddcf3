"""Weights brought from the policy to the rollout engine, and proof that they arrived.

After every sync, engine and policy say the log-probs of the same few tokens, and the largest difference is logged. An
engine left behind, a cache of old weights or a layer that was not brought over shows here, before it is trained on. In
bfloat16 a sync left out after a small update does not: so what the engine holds as it came is compared exactly as well.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from expo.errors import SyncError
from expo.learner.batch import Batch, collate
from expo.rollout import RolloutEngine
from expo.rollout.weight_samples import WeightSamples
from expo.runtime.distributed import Ranks

NUM_SEQUENCES = 4
NUM_SCORED = 8  # tokens at the end of each; what comes before is long enough to be found again in a prefix cache
MAX_TOKENS = 128  # of a sequence: two blocks of vLLM's cache or more
# nats. On the embedded model float32 is within 2e-5, and noise of 1e-4 on every weight that is not brought over makes
# 1.5e-2; in bfloat16, where both sides round every product, up to 0.38 was seen: it shows gross failures
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.0}


class Source(Protocol):
    """A policy, as far as weights leave it."""

    dtype: torch.dtype

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Every weight, whole, under its name in the model."""

    def logps(self, batch: Batch) -> Tensor:
        """Log-probabilities of the reply tokens of a batch, nats."""


@dataclass(frozen=True)
class Probe:
    """Fixed sequences of tokens, each a prompt and the reply whose tokens are scored."""

    prompts: list[list[int]]
    replies: list[list[int]]


def make_probe(prompts: Sequence[Sequence[int]], max_tokens: int) -> Probe:
    """A probe out of training prompts, laid end to end until a sequence has `max_tokens` or MAX_TOKENS.

    What the text says does not matter, only that it is long and of the run's own tokens.

    Args:
        prompts: token ids; not empty.
        max_tokens: the longest sequence that the engine takes.
    """
    length = min(max_tokens, MAX_TOKENS)
    sequences: list[list[int]] = []
    for index in range(NUM_SEQUENCES):
        sequence: list[int] = []
        start = index * len(prompts) // NUM_SEQUENCES
        while len(sequence) < length:
            sequence += prompts[start % len(prompts)]
            start += 1
        sequences.append(sequence[:length])
    scored = min(NUM_SCORED, length - 1)
    return Probe([ids[:-scored] for ids in sequences], [ids[-scored:] for ids in sequences])


class WeightSync:
    """Brings the policy's weights to the engine and compares the two; `num_compared` says how many weights were
    compared exactly after the last sync, None where the engine samples from the policy's own.

    Args:
        engine: this run's; every rank's has its own weights.
        policy: where they come from.
        ranks: the processes of the run.
        probe: what is compared.
        temperature: that of the rollouts, at which the policy's log-probs are taken too.
        tolerance: nats; None: by the policy's dtype.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: Source,
        ranks: Ranks,
        probe: Probe,
        temperature: float,
        tolerance: float | None,
    ) -> None:
        self._engine, self._policy, self._ranks, self._temperature = engine, policy, ranks, temperature
        self._probe, self._tolerance = probe, TOLERANCE[policy.dtype] if tolerance is None else tolerance
        self._batch: Any = collate(probe.prompts, probe.replies, 0, ranks.device)
        self._policy_logps: Tensor | None = None
        self.num_compared: int | None = None

    def run(self) -> float | None:
        """Syncs; returns the largest |policy - engine| log-prob of the probe over all ranks, nats, or None where the
        engine samples from the policy's own weights.

        Raises: SyncError, on every rank, if that is above the tolerance, or a weight that can be compared differs.
        """
        self._policy_logps = None
        samples = WeightSamples()
        weights = samples.passing(self._policy.named_weights())
        self._engine.load_weights(weights)
        if not self._engine.needs_weight_sync:
            return None
        for _ in weights:  # what the engine left, if it did
            pass
        largest = self.difference()
        self._require_same_weights(samples)
        return largest

    def _require_same_weights(self, samples: WeightSamples) -> None:
        mine = [samples.compare(held) for held in self._engine.describe_weights()]
        found = [comparison for comparisons in self._ranks.gather(mine) for comparison in comparisons]
        self.num_compared = min(comparison.num_compared for comparison in found)
        differing = sorted({name for comparison in found for name in comparison.differing})
        if differing:
            raise SyncError(
                f"after a weight sync the rollout engine does not hold the policy's {differing[0]}: so it is with "
                f"{len(differing)} of the {self.num_compared} weights that could be compared exactly. Replies sampled "
                f"so would not be the policy's. Go on with --resume; if it comes again, the engine does not take the "
                f"weights of this architecture as they are: choose another rollout.engine"
            )

    def policy_logps(self) -> Tensor:
        """The probe's log-probs under the policy as it was last synced, [sequences, scored tokens], nats, on the CPU;
        computed when first asked for, by all ranks together.
        """
        if self._policy_logps is None:
            self._policy_logps = self._score_by_policy()
        return self._policy_logps

    def _score_by_policy(self) -> Tensor:
        mask = self._batch.completion_mask
        return self._policy.logps(self._batch)[mask].view(len(mask), -1).cpu()

    def difference(self) -> float:
        """The comparison alone. Raises: as `run`."""
        theirs = torch.tensor(self._engine.score(self._probe.prompts, self._probe.replies, self._temperature))
        ours = self._policy_logps = self._score_by_policy()
        apart = (ours - theirs).abs().nan_to_num(nan=torch.inf)
        (largest,) = self._ranks.all_reduce_max([float(apart.max())])
        if largest > self._tolerance:
            row, column = divmod(int(apart.argmax()), apart.shape[1])
            raise SyncError(
                f"after a weight sync the rollout engine and the policy differ by up to {largest:.3g} nats on the "
                f"probe, more than rollout.sync_tolerance = {self._tolerance:g}; on rank {self._ranks.rank} "
                f"{int((apart > self._tolerance).sum())} of {apart.numel()} tokens are further apart, the worst at "
                f"sequence {row}, token {self._probe.replies[row][column]}: policy {float(ours[row, column]):.6f}, "
                f"engine {float(theirs[row, column]):.6f}. Replies sampled so would not be the policy's. Check that "
                f"the engine supports this architecture and version, and its dtype; raise the tolerance only if the "
                f"difference is rounding (it then stays as large from the first sync on)"
            )
        return largest
