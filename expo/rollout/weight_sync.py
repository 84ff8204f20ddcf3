"""Weight syncs from the policy to the rollout engine, and the check that the engine has the weights.

An engine that takes LoRA adapters is given the base weights before the first sync, and by each sync the adapters alone.

After every sync, engine and policy compute the log-probs of the same few tokens, the probe, and the largest difference
is logged. It shows a stale engine, a prefix cache of old weights or a layer that was not synced before they affect
training. In bfloat16 a skipped sync after a small update is below rounding, so weights are also compared exactly.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from expo.errors import Diverged, SyncError
from expo.learner.batch import Batch, collate
from expo.rollout import AdapterEngine, RolloutEngine, StagingEngine
from expo.rollout.weight_samples import WeightSamples
from expo.runtime.distributed import Ranks

NUM_SEQUENCES = 4
NUM_SCORED = 8  # tokens scored at the end of each; the tokens before them fill blocks of a prefix cache
MAX_TOKENS = 128  # of a sequence: at least two blocks of vLLM's cache
# nats. On the embedded model float32 differs by up to 2e-5, and by 1.5e-2 if noise of 1e-4 on every weight is not
# synced. In bfloat16, where both sides round every product, 0.38 was seen, so only gross failures are found.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.0}


class WeightSource(Protocol):
    """What a weight sync needs of a policy."""

    dtype: torch.dtype

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Every weight, unsharded, under its name in the model."""

    def logps(self, batch: Batch) -> Tensor:
        """Log-probabilities of the reply tokens of a batch, nats."""


@runtime_checkable
class AdapterSource(WeightSource, Protocol):
    """What a weight sync needs of a policy with LoRA, if the engine takes adapters."""

    def named_base_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Every weight under the adapters, unsharded, under its name in a model without adapters."""

    def named_adapters(self) -> Iterable[tuple[str, Tensor]]:
        """Both matrices of every adapter, unsharded; the engine adds their product to the weight."""


@dataclass(frozen=True)
class Probe:
    """Fixed token sequences, each split into a prompt and the reply that is scored."""

    prompts: list[list[int]]
    replies: list[list[int]]


def make_probe(prompts: Sequence[Sequence[int]], max_tokens: int) -> Probe:
    """A probe of training prompts, concatenated until a sequence has `max_tokens` or MAX_TOKENS.

    The meaning of the text does not matter, only that it is long and consists of the run's own tokens.

    Args:
        prompts: token ids; not empty.
        max_tokens: longest sequence that the engine accepts.
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


@dataclass(frozen=True)
class StagedWeights:
    """The policy's weights of one moment, stored for a later sync.

    version: their name in the engine; logps: the policy's log-probs of the probe, nats; samples: of the weights.
    """

    version: str
    logps: Tensor
    samples: WeightSamples


class WeightSync:
    """Copies the policy's weights to the engine and compares the two.

    Args:
        engine: the run's engine; on every rank it has its own weights.
        policy: the source of the weights.
        ranks: the processes of the run.
        probe: the tokens whose log-probs are compared.
        temperature: of the rollouts, used for the log-probs of both.
        tolerance: largest difference allowed, nats; None: TOLERANCE of the policy's dtype.

    Attributes:
        num_compared: weights compared exactly after the last sync; None if the engine has no copy of the weights.
        largest_difference: what that sync returned.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: WeightSource,
        ranks: Ranks,
        probe: Probe,
        temperature: float,
        tolerance: float | None,
    ) -> None:
        self._engine, self._policy, self._ranks, self._temperature = engine, policy, ranks, temperature
        self._probe, self._tolerance = probe, TOLERANCE[policy.dtype] if tolerance is None else tolerance
        self._batch: Any = collate(probe.prompts, probe.replies, 0, ranks.device)
        self._policy_logps: Tensor | None = None
        self._base_samples: WeightSamples | None = None  # of what an engine that takes adapters was given once
        self.num_compared: int | None = None
        self.largest_difference: float | None = None

    def run(self) -> float | None:
        """Syncs the weights and checks them.

        Returns: the largest |policy - engine| log-prob of the probe over all ranks, nats; None if the engine samples
            from the policy's own weights.

        Raises:
            Diverged: on every rank, if a log-prob of the policy is not finite; the engine then holds the old weights.
            SyncError: on every rank, if the difference exceeds the tolerance or a compared weight differs.
        """
        samples, weights = self._current_weights()
        self._engine.load_weights(weights)
        if not self._engine.needs_weight_sync:
            return None
        for _ in weights:  # those that the engine did not load, if any
            pass
        return self._check(self.policy_logps(), samples)

    def stage(self) -> StagedWeights:
        """Stores the policy's weights for a later `use`, while the engine samples with those that it has.

        Raises: Diverged, on every rank, if a log-prob of the policy is not finite.
        """
        samples, weights = self._current_weights()
        assert isinstance(self._engine, StagingEngine)
        version = self._engine.stage_weights(weights)
        return StagedWeights(version, self.policy_logps(), samples)

    def use(self, staged: StagedWeights) -> float:
        """Syncs weights that were staged, and checks them; it neither reads the policy nor depends on the thread.

        Returns, raises: as `run`.
        """
        assert isinstance(self._engine, StagingEngine)
        self._engine.use_weights(staged.version)
        return self._check(staged.logps, staged.samples)

    def _current_weights(self) -> tuple[WeightSamples, Iterator[tuple[str, Tensor]]]:
        """The weights to load, if they are finite, and the samples that are taken of them while they are read."""
        self._policy_logps = None
        self._require_finite()
        if self._engine.takes_adapters:
            assert isinstance(self._policy, AdapterSource)
            samples, weights = WeightSamples(self._load_base_weights(self._policy)), self._policy.named_adapters()
        else:
            samples, weights = WeightSamples(), self._policy.named_weights()
        return samples, samples.record(weights)

    def _load_base_weights(self, policy: AdapterSource) -> WeightSamples:
        """Loads the weights under the adapters before the first sync; the samples of them."""
        if self._base_samples is None:
            assert isinstance(self._engine, AdapterEngine)
            samples = WeightSamples()
            self._engine.load_base_weights(samples.record(policy.named_base_weights()))
            self._base_samples = samples
        return self._base_samples

    def _check(self, policy_logps: Tensor, samples: WeightSamples) -> float:
        self.largest_difference = self._difference(policy_logps)
        self._require_same_weights(samples)
        return self.largest_difference

    def _require_finite(self) -> None:
        """An engine cannot sample from a distribution that is not finite: ids out of range, or errors of its own."""
        (is_bad,) = self._ranks.all_reduce_max([float(not self.policy_logps().isfinite().all())])
        if is_bad:
            raise Diverged("the policy's log-probs are not finite")

    def _require_same_weights(self, samples: WeightSamples) -> None:
        local = [samples.compare(engine_weights) for engine_weights in self._engine.describe_weights()]
        found = [comparison for comparisons in self._ranks.gather(local) for comparison in comparisons]
        self.num_compared = min(comparison.num_compared for comparison in found)
        differing = sorted({name for comparison in found for name in comparison.differing})
        if differing:
            raise SyncError(
                f"after a weight sync the rollout engine does not hold the policy's {differing[0]}: it differs in "
                f"{len(differing)} of the {self.num_compared} weights that could be compared exactly. Its replies "
                f"would not be the policy's. Go on with --resume; if it happens again, the engine changes the weights "
                f"of this architecture: choose another rollout.engine"
            )

    def policy_logps(self) -> Tensor:
        """The policy's log-probs of the probe after the last sync, [sequences, scored tokens] on the CPU, nats.

        The first call after a sync computes them; all ranks call it together.
        """
        if self._policy_logps is None:
            self._policy_logps = self._score_by_policy()
        return self._policy_logps

    def _score_by_policy(self) -> Tensor:
        mask = self._batch.completion_mask
        return self._policy.logps(self._batch)[mask].view(len(mask), -1).cpu()

    def difference(self) -> float:
        """The comparison of log-probs without a sync. Raises: as `run`."""
        self._policy_logps = None
        return self._difference(self.policy_logps())

    def _difference(self, policy_logps: Tensor) -> float:
        engine_logps = torch.tensor(self._engine.score(self._probe.prompts, self._probe.replies, self._temperature))
        differences = (policy_logps - engine_logps).abs().nan_to_num(nan=torch.inf)
        (largest,) = self._ranks.all_reduce_max([float(differences.max())])
        if largest > self._tolerance:
            row, column = divmod(int(differences.argmax()), differences.shape[1])
            raise SyncError(
                f"after a weight sync the rollout engine and the policy differ by up to {largest:.3g} nats on the "
                f"probe, more than rollout.sync_tolerance = {self._tolerance:g}; on rank {self._ranks.rank} "
                f"{int((differences > self._tolerance).sum())} of {differences.numel()} tokens differ by more, the "
                f"worst at sequence {row}, token {self._probe.replies[row][column]}: policy "
                f"{float(policy_logps[row, column]):.6f}, engine {float(engine_logps[row, column]):.6f}. Its replies "
                f"would not be the policy's. Check that the engine supports this architecture and dtype; raise the "
                f"tolerance only if the difference is rounding (then it has the same size from the first sync on)"
            )
        return largest
