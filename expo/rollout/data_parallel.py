"""Sampling and grading split over the ranks: each handles its shard, and afterwards every rank has all results."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from expo.errors import StopRequested
from expo.rewards.verifier import Verifier
from expo.rollout import AdapterEngine, GenerationRequest, RolloutEngine, Sampling, StagingEngine
from expo.rollout.packing import all_gather_replies, all_gather_verdicts
from expo.rollout.weight_samples import WeightDescription
from expo.runtime.distributed import Ranks
from expo.runtime.signals import StopSwitch
from expo.types import Reply, Verdict


class DataParallelEngine:
    """A rollout engine on every rank, each sampling its shard of the requests.

    Args:
        engine: this rank's engine.
        ranks: the processes of the run.
        switch: checked between batches of replies; once it is set on one rank, StopRequested is raised on all ranks.
        width: number of consecutive ranks that form one tensor-parallel engine and must get the same requests.
    """

    def __init__(self, engine: RolloutEngine, ranks: Ranks, switch: StopSwitch, width: int = 1) -> None:
        self._engine, self._ranks, self._switch, self._width = engine, ranks, switch, width

    @property
    def needs_weight_sync(self) -> bool:
        """Whether every rank's engine has its own copy of the weights."""
        return self._engine.needs_weight_sync

    @property
    def takes_adapters(self) -> bool:
        """Whether every rank's engine takes LoRA adapters alone."""
        return self._engine.takes_adapters

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """Replies to all requests, in order, on every rank.

        Raises: StopRequested, on every rank; an error of one rank's engine, on every rank.
        """
        remaining = sum(len(request.seeds) for request in requests)

        def report(count: int) -> None:
            nonlocal remaining
            if on_progress is not None:
                # the other ranks are assumed to be as fast
                done = min(remaining, count * self._ranks.size // self._width)
                remaining -= done
                on_progress(done)
            if self._width == 1:  # a rank of a tensor-parallel engine cannot stop without the others
                self._switch.check()

        stop_reason = None

        def sample() -> list[list[Reply]]:
            nonlocal stop_reason
            try:
                return self._engine.generate(self._ranks.shard(requests, self._width), sampling, report)
            except StopRequested as request:
                stop_reason = str(request)
                return []

        local_replies = self._ranks.raise_on_all_ranks(sample)
        for reason in self._ranks.gather(stop_reason):
            if reason is not None:
                raise StopRequested(reason)
        shards = all_gather_replies(local_replies, self._ranks)[:: self._width]
        if on_progress is not None and remaining:
            on_progress(remaining)
        return self._ranks.unshard(shards)

    def load_base_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Has every rank's engine load the weights under the adapters."""
        assert isinstance(self._engine, AdapterEngine)
        self._engine.load_base_weights(weights)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Has every rank's engine load the policy's weights."""
        self._engine.load_weights(weights)

    def stage_weights(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Stores the policy's weights for `use_weights`. Raises: an error of the engine, on every rank."""
        assert isinstance(self._engine, StagingEngine)
        return self._engine.stage_weights(weights)

    def use_weights(self, version: str) -> None:
        """Has the engine load weights that were staged. Raises: an error of the engine, on every rank."""
        assert isinstance(self._engine, StagingEngine)
        self._engine.use_weights(version)

    def with_switch(self, switch: StopSwitch) -> "DataParallelEngine":
        """The same engine with another switch."""
        return DataParallelEngine(self._engine, self._ranks, switch, self._width)

    def score(
        self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Log-probabilities of given replies by this rank's engine alone, since each has its own weights.

        Raises: an error of one rank's engine, on every rank.
        """
        return self._ranks.raise_on_all_ranks(lambda: self._engine.score(prompts, replies, temperature))

    def describe_weights(self) -> list[dict[str, WeightDescription]]:
        """The weights that this rank's engine holds. Raises: an error of one rank's engine, on every rank."""
        return self._ranks.raise_on_all_ranks(self._engine.describe_weights)

    def sleep(self) -> None:
        """Has every rank's engine free the memory that it can, until the next `load_weights`."""
        self._engine.sleep()

    def close(self) -> None:
        """Ends the processes that this rank's engine has started."""
        self._engine.close()


class DataParallelVerifier:
    """A verifier on every rank, each grading its shard of the replies.

    Args:
        verifier: this rank's verifier.
        ranks: the processes of the run.
    """

    def __init__(self, verifier: Verifier, ranks: Ranks) -> None:
        self._verifier, self._ranks = verifier, ranks

    def grade(self, replies: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Verdicts on all replies, in order, on every rank.

        Raises: what a verifier raises, on every rank, so that no rank waits for another in vain.
        """
        local_verdicts: list[Verdict] = []
        local_error: Exception | None = None
        try:
            local_verdicts = self._verifier.grade(self._ranks.shard(replies), self._ranks.shard(answers))
        except (ValueError, RuntimeError) as error:
            local_error = error
        for problem in (local_error, *self._ranks.gather(local_error)):
            if problem is not None:
                raise problem
        return self._ranks.unshard(all_gather_verdicts(local_verdicts, self._ranks))

    def why_unparsed(self, reply: str) -> str:
        """Why a reply has the verdict "unparsed", in a few words."""
        return self._verifier.why_unparsed(reply)

    def close(self) -> None:
        """Ends this rank's worker processes."""
        self._verifier.close()
