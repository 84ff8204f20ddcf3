"""Compares the stated answers of an evaluation for its majority votes."""

from collections.abc import Sequence
from dataclasses import dataclass

from expo.evaluation.scores import Agree
from expo.rewards.answers import judge_exactly
from expo.runtime.console import Display
from expo.runtime.signals import StopSwitch
from expo.runtime.watchdog import Watchdog

PAIRS_PER_CHUNK = 512  # pairs of answers compared under one deadline; between chunks, a signal can stop the comparison


@dataclass(frozen=True)
class AnswerComparer:
    """Tells whether two stated answers agree.

    Formulas may take reward.timeout_s each, so their comparison shows progress, has a deadline, and can be stopped.

    agree: compares formulas; deadline_s: for one chunk of pairs, seconds.
    """

    agree: Agree
    display: Display
    watchdog: Watchdog
    switch: StopSwitch
    deadline_s: float

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the answers of each pair agree; equal pairs are compared once.

        Raises: StopRequested if a signal asks to stop.
        """
        agreed: dict[tuple[str, str], bool] = {}
        formulas: list[tuple[str, str]] = []
        for pair in dict.fromkeys(pairs):
            verdict = judge_exactly(*pair)
            if verdict is None:
                formulas.append(pair)
            else:
                agreed[pair] = verdict
        if formulas:
            agreed.update(self._compare_formulas(formulas))
        return [agreed[pair] for pair in pairs]

    def _compare_formulas(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        agreed: dict[tuple[str, str], bool] = {}
        with self.display.bar("answers compared", len(pairs)) as bar:
            for start in range(0, len(pairs), PAIRS_PER_CHUNK):
                self.switch.check()
                chunk = pairs[start : start + PAIRS_PER_CHUNK]
                with self.watchdog.phase("evaluation", self.deadline_s):
                    agreed.update(zip(chunk, self.agree(chunk), strict=True))
                bar.advance(len(chunk))
        return agreed
