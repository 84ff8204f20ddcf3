"""The verifier: grades replies against gold answers.

`extract.py` finds the answer of a reply, and `compare.py` compares it with the gold answer as `docs/verifier.md` says,
by rational arithmetic. What needs computer algebra goes to the worker processes of `pool.py`, which cannot block the
trainer. `methods.py` lists the other methods.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Final, Self

from expo.errors import GoldError, GraderError
from expo.rewards import messages
from expo.rewards.answers import normalise
from expo.rewards.maths.compare import Outcome
from expo.rewards.methods import MathMethod, Reading, find_method
from expo.rewards.pool import Pair, WorkerPool
from expo.types import Verdict, VerdictKind

# Verdicts cached: the distinct answers of about 12 steps of 2,048 replies; about 10 MB.
_CACHE_SIZE: Final = 32_768
# Gold answers checked between two reports of progress.
_CHECKED_AT_ONCE: Final = 500
_OUTCOMES: Final = {
    messages.CORRECT: Outcome.CORRECT,
    messages.WRONG: Outcome.WRONG,
    messages.UNEVALUATED: Outcome.UNEVALUATED,
}
Progress = Callable[[int, int], None]  # number of gold answers checked, and of all


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
        method: What gives the verdicts, as `reward.verifier`.
        accept_unevaluated: Whether an operation of the right value, such as `12 \\times 12`, is correct; otherwise it
            is wrong, and its verdict says `is_unevaluated`.
        reading: Which part of a reply is read.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 5.0,
        memory_bytes: int = 2 * 1024**3,
        *,
        method: str = "math",
        accept_unevaluated: bool = False,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; give at least 1")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; give a number of seconds greater than 0")
        if memory_bytes < 256 * 1024**2:
            raise ValueError(f"memory_bytes is {memory_bytes}; computer algebra needs at least {256 * 1024**2}")
        self._method, self._method_name = find_method(method), method
        self._accept_unevaluated = accept_unevaluated
        self._reading = reading
        self._lock = threading.Lock()  # of the pool and the cache
        self._cache: OrderedDict[Pair, Outcome | VerdictKind] = OrderedDict()
        self._pool = WorkerPool(workers, timeout_s, memory_bytes, method)
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
        stated = [self._method.read(reply, self._reading) for reply in replies]
        pairs = [
            None if text is None else self._method.pair(text, gold) for text, gold in zip(stated, answers, strict=True)
        ]
        known: dict[Pair, Outcome | VerdictKind] = {}
        undecided: list[Pair] = []
        for pair in dict.fromkeys(pairs):
            if pair is not None:
                known[pair] = self._method.decide(*pair)
                if known[pair] == Outcome.UNKNOWN:
                    undecided.append(pair)
        if undecided:
            known |= self._grade_with_workers(undecided)
        return [
            Verdict("unparsed", None) if pair is None or text is None else self._verdict(known[pair], text)
            for pair, text in zip(pairs, stated, strict=True)
        ]

    def why_unparsed(self, reply: str) -> str:
        """Why a reply has the verdict "unparsed", in a few words."""
        if self._method.read(reply, self._reading) is not None:
            return f"{self._method_name} says so"
        return self._reading.why_unparsed(reply) or "it has none of these"

    def agree(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the two stated answers of each pair are equal, evaluated or not.

        False also if one of them is not mathematics, or the comparison exceeds the time limit.
        """
        keys = [(normalise(first), normalise(second)) for first, second in pairs]
        same = {key: MathMethod().decide(*key) for key in keys}
        with self._lock:
            outcomes = self._pool.run([key for key, outcome in same.items() if outcome == Outcome.UNKNOWN])
        same |= {key: _OUTCOMES.get(outcome or b"", Outcome.WRONG) for key, outcome in outcomes.items()}
        return [same[key] >= Outcome.UNEVALUATED for key in keys]

    def _verdict(self, outcome: Outcome | VerdictKind, stated: str) -> Verdict:
        if isinstance(outcome, str):
            return Verdict(outcome, None if outcome == "unparsed" else stated)
        if outcome == Outcome.UNEVALUATED:
            return Verdict("correct" if self._accept_unevaluated else "wrong", stated, is_unevaluated=True)
        return Verdict("correct" if outcome == Outcome.CORRECT else "wrong", stated)

    def _unusable(self, golds: Sequence[str]) -> list[str]:
        """Those of the gold answers that the algebra cannot parse."""
        with self._lock:
            outcomes = self._pool.run([("", gold) for gold in golds], check_gold_only=True)
        return [gold for (_, gold), outcome in outcomes.items() if outcome != messages.CORRECT]

    def _grade_with_workers(self, pairs: list[Pair]) -> dict[Pair, Outcome | VerdictKind]:
        known: dict[Pair, Outcome | VerdictKind] = {}
        with self._lock:
            for pair in pairs:
                if pair in self._cache:
                    self._cache.move_to_end(pair)
                    known[pair] = self._cache[pair]
            outcomes = self._pool.run([pair for pair in pairs if pair not in known])
            for pair, outcome in outcomes.items():
                if outcome == messages.BAD_GOLD:
                    raise GoldError(
                        f"gold answer {pair[1]!r} cannot be parsed; correct or drop its row (check_answers finds most "
                        f"such answers at load)"
                    )
                if outcome is not None and outcome.startswith(messages.ERROR):
                    raise GraderError(f"the verifier {self._method_name} {outcome.decode().removeprefix('error: ')}")
                if outcome is None or outcome == messages.TIMEOUT:
                    # not cached: on a less busy machine it may be graded in time
                    known[pair] = "timeout"
                    continue
                known[pair] = self._cache[pair] = "unparsed" if outcome == messages.UNPARSED else _OUTCOMES[outcome]
            while len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return known


def ungradable_answers(
    answers: Iterable[str], timeout_s: float = 30.0, *, method: str = "math", on_progress: Progress | None = None
) -> list[str]:
    r"""The gold answers that replies cannot be graded against, each once.

    They are empty, say that there is no answer, are not mathematics, exceed `timeout_s`, or are graded wrong when a
    reply states them in a box.

    Args:
        answers: Gold answers as in the data set. Most need no workers.
        timeout_s: Wall-clock seconds for one answer.
        method: As `reward.verifier`; what is said of mathematics above holds for "math".
        on_progress: Called with the number of answers checked and the number of all, from time to time.
    """
    distinct = list(dict.fromkeys(answers))
    for answer in distinct:
        if not isinstance(answer, str):
            raise TypeError(f"answer {answer!r} is of type {type(answer).__name__}; give answers as strings")
    checked = find_method(method)
    bad: set[str] = set()
    with Verifier(timeout_s=timeout_s, method=method, reading=Reading(think_tags=())) as verifier:
        for start in range(0, len(distinct), _CHECKED_AT_ONCE):
            chunk = distinct[start : start + _CHECKED_AT_ONCE]
            replies = {answer: checked.statement(answer) for answer in chunk}
            bad |= {answer for answer, reply in replies.items() if reply is None}
            opaque = {checked.pair("", answer)[1]: answer for answer in chunk if answer not in bad}
            unusable = verifier._unusable([gold for gold in opaque if checked.needs_check(gold)])
            bad |= {answer for answer in chunk if answer not in bad and checked.pair("", answer)[1] in unusable}
            rest = [answer for answer in chunk if answer not in bad and replies[answer]]
            verdicts = verifier.grade([replies[answer] or "" for answer in rest], rest)
            bad |= {answer for answer, verdict in zip(rest, verdicts, strict=True) if verdict.kind != "correct"}
            if on_progress is not None:
                on_progress(min(start + _CHECKED_AT_ONCE, len(distinct)), len(distinct))
    return [answer for answer in distinct if answer in bad]


def check_answers(answers: Iterable[str], timeout_s: float = 30.0) -> None:
    """Checks that replies can be graded against every gold answer.

    Raises:
        GoldError: Some answers are ungradable (see `ungradable_answers`); it names them.
    """
    bad = ungradable_answers(answers, timeout_s)
    if bad:
        named = ", ".join(repr(answer) for answer in bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise GoldError(f"{len(bad)} gold answers cannot be parsed: {named}; correct or drop these rows")
