"""Reply and gold answer in, verdict out: the mathematics verifier.

`answers.py` finds the answer in a reply and judges plain numbers and equal texts, exactly. All else goes to math-verify
in the worker processes of `_workers.py`, which cannot hang the trainer.
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

# Verdicts remembered: the distinct answers of a dozen steps of 2,048 replies; some 10 MB.
_MEMO_SIZE: Final = 32_768


class Verifier:
    """Grades replies against gold answers; never hangs, whatever the replies hold.

    May be called from any thread and under asyncio (with `asyncio.to_thread`, to keep the loop free): no signals are
    used. Calls from several threads at once take turns at the workers. Processes start at the first answer that needs
    algebra, stay until `close` or the end of this object, and die with the process that started them.

    An answer gets `timeout_s` from when a worker takes it up. One that takes long does not hold up the others: a
    worker more is started beside it, up to four times `workers`, for the rest of the batch.

    Args:
        workers: Number of processes, each grading one pair at a time.
        timeout_s: Seconds of wall clock for one answer; then its worker is killed, and the verdict is "timeout".
        memory_bytes: Address space of one worker. A worker that ends for want of memory, or dies in any other way
            over an answer, gives "timeout" too: the answer could not be graded within its limits. Where the algebra
            itself recovers from the want of memory, it finds the two sides unequal: "wrong".
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_bytes: int = 2 * 1024**3) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; give at least 1")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; give a number of seconds above 0")
        if memory_bytes < 256 * 1024**2:
            raise ValueError(
                f"memory_bytes is {memory_bytes}; computer algebra needs room, give at least {256 * 1024**2}"
            )
        self._lock = threading.Lock()  # held while the pool or the memo is in use
        self._memo: OrderedDict[Pair, bool] = OrderedDict()
        self._pool = WorkerPool(workers, timeout_s, memory_bytes)
        weakref.finalize(self, self._pool.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. Grading again afterwards starts new ones."""
        with self._lock:
            self._pool.close()

    def grade(self, replies: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each reply, in order.

        Args:
            replies: Whole replies of the model, B of them.
            answers: The gold answer of each reply's question, B of them, as the data set has it.

        Raises:
            ValueError: The lengths differ.
            GoldError: A gold answer cannot be parsed (see `check_answers`), which only some replies bring to light.
            RuntimeError: Workers cannot be started, for example because math-verify is not installed.
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
            known |= self._grade_by_algebra(undecided)
        return [
            Verdict("unparsed" if pair is None else known[pair], text) for pair, text in zip(pairs, stated, strict=True)
        ]

    def agree(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the two stated answers of each pair are the same answer.

        False too where one of them is no mathematics, or the comparison takes too long: such answers stand alone.
        """
        keys = [(normalise(one), normalise(other)) for one, other in pairs]
        same = {key: judge_exactly(*key) for key in keys}
        with self._lock:
            outcomes = self._pool.run([key for key, is_same in same.items() if is_same is None])
        same |= {key: outcome == messages.CORRECT for key, outcome in outcomes.items()}
        return [bool(same[key]) for key in keys]

    def _unusable(self, golds: Sequence[str]) -> list[str]:
        """Those of some normalised gold answers that the algebra cannot take."""
        with self._lock:
            outcomes = self._pool.run([("", gold) for gold in golds], check_gold_only=True)
        return [gold for (_, gold), outcome in outcomes.items() if outcome != messages.CORRECT]

    def _grade_by_algebra(self, pairs: list[Pair]) -> dict[Pair, VerdictKind]:
        known: dict[Pair, VerdictKind] = {}
        with self._lock:
            for pair in pairs:
                if pair in self._memo:
                    self._memo.move_to_end(pair)
                    known[pair] = "correct" if self._memo[pair] else "wrong"
            outcomes = self._pool.run([pair for pair in pairs if pair not in known])
            for pair, outcome in outcomes.items():
                if outcome == messages.BAD_GOLD:
                    raise GoldError(
                        f"gold answer {pair[1]!r} cannot be parsed; correct or drop its row (check_answers finds most "
                        f"such answers at load)"
                    )
                if outcome is None:
                    # not remembered: on a less busy machine it may be graded in time
                    known[pair] = "timeout"
                    continue
                self._memo[pair] = outcome == messages.CORRECT
                known[pair] = "correct" if self._memo[pair] else "wrong"
            while len(self._memo) > _MEMO_SIZE:
                self._memo.popitem(last=False)
        return known


def ungradable_answers(answers: Iterable[str], timeout_s: float = 30.0) -> list[str]:
    r"""Those gold answers that replies cannot be graded against, each once.

    They are empty, not mathematics, take longer than `timeout_s`, or are judged wrong when a reply boxes them.

    Args:
        answers: Gold answers as the data set has them. Numbers cost nothing; words and formulas take workers.
        timeout_s: Seconds of wall clock for one answer.
    """
    bad: dict[str, None] = {}  # a set that keeps its order
    by_gold: dict[str, list[str]] = {}  # answers as given, by their normal form; those that may reach the algebra
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
        # as they are given: a normal form that has lost something would agree with itself
        verdicts = verifier.grade([rf"\boxed{{{stated_gold(answer)}}}" for answer in rest], rest)
    return [*bad, *(answer for answer, verdict in zip(rest, verdicts, strict=True) if verdict.kind != "correct")]


def check_answers(answers: Iterable[str], timeout_s: float = 30.0) -> None:
    """Makes sure, once at load, that every gold answer can be graded against.

    Raises:
        ValueError: Some answers cannot (see `ungradable_answers`); they are named.
    """
    bad = ungradable_answers(answers, timeout_s)
    if bad:
        named = ", ".join(repr(answer) for answer in bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise ValueError(f"{len(bad)} gold answers cannot be parsed: {named}; correct or drop these rows")
