"""Sampling and grading shared out over the ranks: each does its part, and all of them have all of it afterwards."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from expo.errors import StopRequested
from expo.rewards.verifier import Verifier
from expo.rollout import GenerationRequest, RolloutEngine, Sampling
from expo.rollout.weight_samples import Described
from expo.runtime.distributed import Ranks
from expo.runtime.signals import StopSwitch
from expo.types import Reply, Verdict


class DataParallelEngine:
    """A rollout engine on every rank, each sampling its share of the requests.

    Args:
        engine: this rank's.
        ranks: the processes of the run.
        switch: looked at between batches of replies; once set on one rank, StopRequested is raised on all.
        width: ranks on end that are one engine together, and must be asked for the same.
    """

    def __init__(self, engine: RolloutEngine, ranks: Ranks, switch: StopSwitch, width: int = 1) -> None:
        self._engine, self._ranks, self._switch, self._width = engine, ranks, switch, width

    @property
    def needs_weight_sync(self) -> bool:
        """Whether every rank's engine has weights of its own."""
        return self._engine.needs_weight_sync

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """Replies to all requests, in order, on every rank."""
        left = sum(len(request.seeds) for request in requests)

        def tell(count: int) -> None:
            nonlocal left
            if on_progress is not None:
                # the other ranks are taken to be as fast
                done = min(left, count * self._ranks.size // self._width)
                left -= done
                on_progress(done)
            if self._width == 1:  # one rank cannot leave what several make together
                self._switch.check()

        mine: list[list[Reply]] | str
        try:
            mine = self._engine.generate(self._ranks.shard(requests, self._width), sampling, tell)
        except StopRequested as request:
            mine = str(request)
        shares = self._ranks.gather(mine)[:: self._width]
        for share in shares:
            if isinstance(share, str):
                raise StopRequested(share)
        if on_progress is not None and left:
            on_progress(left)
        return self._ranks.unshard([share for share in shares if not isinstance(share, str)])

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Has every rank's engine take the policy's weights."""
        self._engine.load_weights(weights)

    def score(
        self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Log-probabilities of given replies by this rank's engine alone, since each has its own weights."""
        return self._engine.score(prompts, replies, temperature)

    def describe_weights(self) -> list[dict[str, Described]]:
        """What this rank's engine holds."""
        return self._engine.describe_weights()

    def sleep(self) -> None:
        """Has every rank's engine give back what memory it can, until the next `load_weights`."""
        self._engine.sleep()

    def close(self) -> None:
        """Ends what this rank's engine has started."""
        self._engine.close()


class DataParallelVerifier:
    """A verifier on every rank, each grading its share of the replies.

    Args:
        verifier: this rank's.
        ranks: the processes of the run.
    """

    def __init__(self, verifier: Verifier, ranks: Ranks) -> None:
        self._verifier, self._ranks = verifier, ranks

    def grade(self, replies: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Verdicts on all replies, in order, on every rank.

        Raises: what a verifier raises, on every rank: none is left waiting for another.
        """
        mine: list[Verdict] | Exception
        try:
            mine = self._verifier.grade(self._ranks.shard(replies), self._ranks.shard(answers))
        except (ValueError, RuntimeError) as error:
            mine = error
        shares = self._ranks.gather(mine)
        if isinstance(mine, Exception):
            raise mine
        for share in shares:
            if isinstance(share, Exception):
                raise share
        return self._ranks.unshard([share for share in shares if not isinstance(share, Exception)])

    def close(self) -> None:
        """Ends this rank's worker processes."""
        self._verifier.close()
