"""Signs that a policy has collapsed, though all numbers are finite: no gradient, a large KL, no right reply."""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from expo.config import RunConfig, RunSection

FALLEN_FROM = 0.05  # mean accuracy of the steps before, above which accuracy 0 is no chance


class CollapseWatch:
    """Counts the consecutive steps of a run that show each sign.

    Args:
        section: run.collapse_kl and run.collapse_steps are used.
        updates_per_step: policy.updates_per_step.
    """

    def __init__(self, section: RunSection, updates_per_step: int) -> None:
        self._kl, self._limit, self._updates_per_step = section.collapse_kl, section.collapse_steps, updates_per_step
        self._accuracies: deque[float] = deque(maxlen=self._limit)  # of the steps before accuracy 0
        self._lengths: dict[str, int] = {}  # consecutive steps by sign

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds the steps that a run took before it was interrupted."""
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a step.

        Args:
            row: of the step in metrics.jsonl; a metric that is not finite may be None.
        """
        shown = self._shown(row)
        if "accuracy" not in shown:
            self._accuracies.append(row["accuracy"])
        self._lengths = {sign: self._lengths.get(sign, 0) + 1 for sign in shown}

    def _shown(self, row: Mapping[str, Any]) -> list[str]:
        recent = self._accuracies
        has_fallen = "accuracy" in self._lengths or sum(recent) > FALLEN_FROM * len(recent)
        tests = {
            "gradient": row["grad_norm"] == 0,
            "kl": row["kl"] is not None and row["kl"] > self._kl,
            "accuracy": row["accuracy"] == 0 and has_fallen,
            "truncated": row["truncated_fraction"] == 1,
        }
        return [sign for sign, is_shown in tests.items() if is_shown]

    @property
    def is_clear(self) -> bool:
        """Whether the last step showed no sign."""
        return not self._lengths

    @property
    def signs(self) -> list[str]:
        """The signs of the last step in words."""
        return [self._text(sign) for sign, length in self._lengths.items() if length >= self._named_after(sign)]

    @property
    def new_signs(self) -> list[str]:
        """Those of `signs` that the step before did not have."""
        return [self._text(sign) for sign, length in self._lengths.items() if length == self._named_after(sign)]

    @property
    def collapse(self) -> list[str]:
        """The signs that last long enough for the policy to count as collapsed, in words."""
        return [self._text(sign) for sign, length in self._lengths.items() if length >= self._collapsed_after(sign)]

    def _collapsed_after(self, sign: str) -> int:
        """A number of steps."""
        return -(-self._limit // self._updates_per_step) if sign == "gradient" else self._limit

    def _named_after(self, sign: str) -> int:
        """A number of steps: groups of equal rewards have no gradient, and truncated replies have an alarm already."""
        return 1 if sign in ("kl", "accuracy") else self._collapsed_after(sign)

    def _text(self, sign: str) -> str:
        length = self._lengths[sign]
        lasting = "" if length == 1 else f" for {length} steps"
        return {
            "gradient": f"gradient 0 for {length * self._updates_per_step} updates",
            "kl": f"KL above run.collapse_kl = {self._kl:g}{lasting}",
            "accuracy": f"accuracy fell to 0{lasting}",
            "truncated": f"all replies truncated{lasting}",
        }[sign]


def collapse_advice(step: int, watch: CollapseWatch, config: RunConfig) -> str | None:
    """What the signs of a collapse mean that a step is the first to show; None if there are none.

    Args:
        step: number of the step.
        watch: has seen the step.
        config: of the run.
    """
    if not watch.new_signs:
        return None
    if config.run.end_on_collapse:
        end = f"the run ends if a sign lasts for run.collapse_steps = {config.run.collapse_steps}"
    else:
        end = "end_on_collapse = true would end the run, to be resumed from the last good checkpoint"
    return f"warning: step {step} shows a sign of collapse: {', '.join(watch.new_signs)}; {end}"
