"""The mathematics verifier: grades replies against gold answers.

`answers.py` extracts the answer of a reply and compares plain numbers and equal texts exactly. Everything else goes to
math-verify in the worker processes of `pool.py`, which cannot block the trainer.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final, Self

from expo.errors import GoldError
from expo.rewards import messages
from expo.rewards.answers import (
    canonical_number,
    extract_answer,
    judge_exactly,
    normalise,
    normalise_for,
    normalise_gold,
    stated_gold,
)
from expo.rewards.pool import Pair, WorkerPool
from expo.types import Verdict, VerdictKind

# Verdicts cached: the distinct answers of about 12 steps of 2,048 replies; about 10 MB.
_CACHE_SIZE: Final = 32_768


class Verifier:
    """Grades replies against gold answers within a time limit, whatever the replies contain.

    It may be called from any thread and under asyncio (with `asyncio.to_thread`, to keep the loop free): it uses no
    signals. Calls from several threads are serialised. Worker processes start with the first answer that needs algebra,
    run until `close` or the end of this object, and end with the process that started them.

    The time limit of an answer, `timeout_s`, starts when a worker receives it. A slow answer does not delay the others:
    a further worker is started for the rest of the batch, up to four times `workers`.

    Args:
        workers: Number of processes, each grading one pair at a time.
        timeout_s: Wall-clock seconds for one answer; then its worker is killed, and the verdict is "timeout".
        memory_bytes: Address space of one worker. If a worker runs out of memory, or dies in any other way while it
            grades an answer, the verdict is "timeout" too: the answer could not be graded within the limits. If the
            algebra itself recovers from the lack of memory, it finds the two sides unequal: "wrong".
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_bytes: int = 2 * 1024**3) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; give at least 1")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; give a number of seconds greater than 0")
        if memory_bytes < 256 * 1024**2:
            raise ValueError(f"memory_bytes is {memory_bytes}; computer algebra needs at least {256 * 1024**2}")
        self._lock = threading.Lock()  # of the pool and the cache
        self._cache: OrderedDict[Pair, bool] = OrderedDict()
        self._pool = WorkerPool(workers, timeout_s, memory_bytes)
        weakref.finalize(self, self._pool.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; grading again starts new ones."""
        with self._lock:
            self._pool.close()

    def grade(self, replies: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each reply, in order.

        Args:
            replies: Whole replies of the model, B of them.
            answers: The gold answer of each reply's question, B of them, as in the data set.

        Raises:
            ValueError: The lengths differ.
            GoldError: A gold answer cannot be parsed (see `check_answers`); some replies are graded without parsing it.
            GraderError: Workers cannot be started, for example because math-verify is not installed.
        """
        if len(replies) != len(answers):
            raise ValueError(f"{len(replies)} replies but {len(answers)} answers; give one answer for each reply")
        stated = [extract_answer(reply) for reply in replies]
        golds = [normalise_gold(answer) for answer in answers]
        pairs = [
            None if text is None else (normalise_for(gold, text), gold)
            for text, gold in zip(stated, golds, strict=True)
        ]
        known: dict[Pair, VerdictKind] = {}
        undecided: list[Pair] = []
        for pair in dict.fromkeys(pairs):
            if pair is not None:
                is_right = judge_exactly(*pair)
                if is_right is None:
                    undecided.append(pair)
                else:
                    known[pair] = "correct" if is_right else "wrong"
        if undecided:
            known |= self._grade_with_workers(undecided)
        return [
            Verdict("unparsed" if pair is None else known[pair], text) for pair, text in zip(pairs, stated, strict=True)
        ]

    def agree(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the two stated answers of each pair are equal.

        False also if one of them is not mathematics, or the comparison exceeds the time limit.
        """
        keys = [(normalise(first), normalise(second)) for first, second in pairs]
        same = {key: judge_exactly(*key) for key in keys}
        with self._lock:
            outcomes = self._pool.run([key for key, is_same in same.items() if is_same is None])
        same |= {key: outcome == messages.CORRECT for key, outcome in outcomes.items()}
        return [bool(same[key]) for key in keys]

    def _unusable(self, golds: Sequence[str]) -> list[str]:
        """Those of the normalised gold answers that the algebra cannot parse."""
        with self._lock:
            outcomes = self._pool.run([("", gold) for gold in golds], check_gold_only=True)
        return [gold for (_, gold), outcome in outcomes.items() if outcome != messages.CORRECT]

    def _grade_with_workers(self, pairs: list[Pair]) -> dict[Pair, VerdictKind]:
        known: dict[Pair, VerdictKind] = {}
        with self._lock:
            for pair in pairs:
                if pair in self._cache:
                    self._cache.move_to_end(pair)
                    known[pair] = "correct" if self._cache[pair] else "wrong"
            outcomes = self._pool.run([pair for pair in pairs if pair not in known])
            for pair, outcome in outcomes.items():
                if outcome == messages.BAD_GOLD:
                    raise GoldError(
                        f"gold answer {pair[1]!r} cannot be parsed; correct or drop its row (check_answers finds most "
                        f"such answers at load)"
                    )
                if outcome is None:
                    # not cached: on a less busy machine it may be graded in time
                    known[pair] = "timeout"
                    continue
                self._cache[pair] = outcome == messages.CORRECT
                known[pair] = "correct" if self._cache[pair] else "wrong"
            while len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return known


def ungradable_answers(answers: Iterable[str], timeout_s: float = 30.0) -> list[str]:
    r"""The gold answers that replies cannot be graded against, each once.

    They are empty, not mathematics, exceed `timeout_s`, or are graded wrong when a reply states them in a box.

    Args:
        answers: Gold answers as in the data set. Numbers need no workers; words and formulas do.
        timeout_s: Wall-clock seconds for one answer.
    """
    bad: dict[str, None] = {}  # an ordered set
    by_gold: dict[str, list[str]] = {}  # the answers that may need algebra, by their normal form
    distinct = list(dict.fromkeys(answers))
    for answer in distinct:
        if not isinstance(answer, str):
            raise TypeError(f"answer {answer!r} is of type {type(answer).__name__}; give answers as strings")
        gold = normalise_gold(answer)
        if not gold:
            bad[answer] = None
        elif canonical_number(gold) is None:
            by_gold.setdefault(gold, []).append(answer)
    with Verifier(timeout_s=timeout_s) as verifier:
        bad |= {answer: None for gold in verifier._unusable(list(by_gold)) for answer in by_gold[gold]}
        rest = [answer for answer in distinct if answer not in bad]
        # as given, not normalised: a normal form that lost information would equal itself
        verdicts = verifier.grade([rf"\boxed{{{stated_gold(answer)}}}" for answer in rest], rest)
    return [*bad, *(answer for answer, verdict in zip(rest, verdicts, strict=True) if verdict.kind != "correct")]


def check_answers(answers: Iterable[str], timeout_s: float = 30.0) -> None:
    """Checks that replies can be graded against every gold answer.

    Raises:
        GoldError: Some answers are ungradable (see `ungradable_answers`); it names them.
    """
    bad = ungradable_answers(answers, timeout_s)
    if bad:
        named = ", ".join(repr(answer) for answer in bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise GoldError(f"{len(bad)} gold answers cannot be parsed: {named}; correct or drop these rows")
