"""The records of a run, read back: what `report.py` shows and `train.py` prints at the end.

A run may still be going, or have died: whatever is missing is left empty, and a line that was cut short is counted and
left out.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from expo.errors import NotARunError

Record = dict[str, Any]  # one line of a .jsonl file
Scores = dict[str, Any]  # the scores of one evaluation: set name -> {"num_questions", "pass_at", "by_level", ...}

TABLE_KS = (1, 8, 32)  # the k of the tables
REPLIES_PER_STEP = 4


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Records:
    """What the pictures are drawn from; any part may be empty."""

    config: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)  # a record per step, in order
    curriculum: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)  # a record per evaluated step, in order
    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)

    def setting(self, section: str, name: str) -> Any:
        """The value of `section.name` in the run's configuration; None where it has none."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None


@dataclass(frozen=True)
class Run:
    """A run folder as read."""

    folder: Path
    config_text: str
    records: Records
    environment: Record
    summary: Record
    replies: dict[int, list[Record]]  # the replies shown, by step
    unreadable: dict[str, int] = field(default_factory=dict)  # file name: lines that could not be read


class Comparison(NamedTuple):
    """One line of a table: one metric of one set, before and after."""

    set_name: str
    num_questions: int | None
    metric: str
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None


def pass_at(scores: Record, k: int | str) -> Estimate | None:
    """pass@k of one set or level; None where it was not evaluated."""
    value = scores.get("pass_at", {}).get(str(k))
    return Estimate(value["mean"], value["low"], value["high"]) if value else None


def main_set(scores: Scores) -> str | None:
    """The set that the headline speaks of: the held-out questions, else the first set there is."""
    return "held_out" if "held_out" in scores else next(iter(scores), None)


def series(records: Iterable[Record], key: str) -> list[float]:
    """The records' values of `key`, NaN where one has none."""
    values = [record.get(key) for record in records]
    return [float(value) if isinstance(value, int | float) else math.nan for value in values]


def steps_of(records: Iterable[Record]) -> list[int]:
    """The records' steps."""
    return [record["step"] for record in records]


def compare(before: Scores, after: Scores) -> list[Comparison]:
    """pass@1, 8 and 32 of every set, before and after, with the change."""
    lines = []
    for name in before | after:
        old, new = before.get(name, {}), after.get(name, {})
        num_questions = (new or old).get("num_questions")
        for k in TABLE_KS:
            a, b = pass_at(old, k), pass_at(new, k)
            if a or b:
                lines.append(Comparison(name, num_questions, f"pass@{k}", a, b, change(a, b)))
    return lines


def change(before: Estimate | None, after: Estimate | None) -> Estimate | None:
    """The gain with a 95 % interval.

    Source: Newcombe 1998 (Statistics in Medicine 17:873), method 10: half-widths add in squares, as
    if the two were independent. The same questions are asked twice, so the true interval is mostly narrower.
    """
    if before is None or after is None:
        return None
    mean = after.mean - before.mean
    low = mean - math.hypot(after.mean - after.low, before.high - before.mean)
    high = mean + math.hypot(after.high - after.mean, before.mean - before.low)
    return Estimate(mean, low, high)


def results_table(before: Scores, after: Scores) -> str:
    """The plain-text table of pass@k before and after, with 95 % intervals; empty sets give an empty table.

    Args:
        before: the sets of the first evaluation, as in `evaluations.jsonl`.
        after: the sets of the last one; `{}` while there is none.
    """
    heads = ("set", "n", "metric", "before [95 %]", "after [95 %]", "change [95 %]")
    return text_table(heads, [table_cells(line) for line in compare(before, after)])


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under their heads, in columns."""
    rows = [heads, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def table_cells(line: Comparison) -> tuple[str, ...]:
    """Set, number of questions, metric, before, after and change as text."""
    num_questions = "-" if line.num_questions is None else str(line.num_questions)
    estimates = (interval_text(line.before), interval_text(line.after), interval_text(line.change, "+"))
    return (line.set_name, num_questions, line.metric, *estimates)


def interval_text(estimate: Estimate | None, sign: str = "") -> str:
    """Mean and 95 % interval as text; a dash where there is none."""
    if estimate is None:
        return "-"
    mean, low, high = (f"{value:{sign}.3f}" for value in estimate)
    return f"{mean} [{low}, {high}]"


# Reading a run folder


def read_run(run_dir: Path) -> Run:
    """Everything in a run folder that the report shows.

    Raises:
        NotARunError: if there is no such folder, or no readable `config.yaml` in it.
    """
    config_text, config = _read_config(run_dir)
    unreadable: dict[str, int] = {}
    metrics, curriculum, evaluations = (
        _by_step(_read_lines(run_dir / f"{name}.jsonl", unreadable))
        for name in ("metrics", "curriculum", "evaluations")
    )
    evaluations = [evaluation for evaluation in evaluations if evaluation.get("sets")]
    summary = _read_json(run_dir / "summary.json", unreadable)
    before, after = _before_and_after(summary, evaluations)
    records = Records(config, metrics, curriculum, evaluations, before, after)
    environment = _read_json(run_dir / "environment.json", unreadable)
    replies = _read_replies(run_dir / "completions.jsonl", unreadable)
    lost = {name: count for name, count in unreadable.items() if count}
    return Run(run_dir.resolve(), config_text, records, environment, summary, replies, lost)


def starts_of(environment: Record) -> list[Record]:
    """Every start of a run, in order, as environment.json holds them; older files hold the last one alone."""
    starts: list[Record] = environment.get("starts") or ([environment] if environment else [])
    return starts


def commits_of(environment: Record) -> list[str | None]:
    """The commits that a run was made by, each once, in order; None: by what was no git checkout."""
    return list(dict.fromkeys(start.get("commit") for start in starts_of(environment)))


def _read_config(run_dir: Path) -> tuple[str, Record]:
    path = run_dir / "config.yaml"
    if not run_dir.is_dir():
        raise NotARunError(f"{run_dir} is not a folder; give the run folder that the trainer wrote")
    if not path.is_file():
        raise NotARunError(f"{run_dir} is not a run: it has no config.yaml; give the folder that the trainer wrote")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise NotARunError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise NotARunError(f"{path} holds {type(config).__name__}, but a run's configuration has named sections")
    return text, config


def _read_lines(path: Path, unreadable: dict[str, int]) -> Iterator[Record]:
    """The records of a .jsonl file that are whole; how many were not goes into `unreadable`."""
    unreadable[path.name] = 0
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = _parsed(line)
            if isinstance(record.get("step"), int):
                yield record
            elif line.strip():
                unreadable[path.name] += 1


def _parsed(text: str) -> Record:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_json(path: Path, unreadable: dict[str, int]) -> Record:
    if not path.is_file():
        return {}
    value = _parsed(path.read_text(encoding="utf-8", errors="replace"))
    unreadable[path.name] = 0 if value else 1
    return value


def _by_step(records: Iterator[Record]) -> list[Record]:
    """In order of steps; of a step recorded twice, as a run that went on may, the later record counts."""
    latest = {record["step"]: record for record in records}
    return [latest[step] for step in sorted(latest)]


def _before_and_after(summary: Record, evaluations: list[Record]) -> tuple[Scores, Scores]:
    before = evaluations[0]["sets"] if evaluations else {}
    after = evaluations[-1]["sets"] if len(evaluations) > 1 else {}
    return summary.get("before") or before, summary.get("after") or after


def _read_replies(path: Path, unreadable: dict[str, int]) -> dict[int, list[Record]]:
    """A few replies of the first, the middle and the last recorded step.

    The file is read twice, once for its steps: that of a long run need not fit into memory.
    """
    steps = sorted({record["step"] for record in _read_lines(path, unreadable)})
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    found: dict[int, list[Record]] = {step: [] for step in shown}
    for record in _read_lines(path, unreadable):
        if record["step"] in found:
            found[record["step"]].append(record)
    return {step: _choose(replies) for step, replies in found.items()}


def _choose(replies: list[Record]) -> list[Record]:
    """Replies to different questions where there are enough, right and wrong ones in turn."""
    firsts = {reply.get("question_id"): reply for reply in reversed(replies)}
    one_each = list(reversed(firsts.values()))
    right = [reply for reply in one_each if is_right(reply)]
    wrong = [reply for reply in one_each if not is_right(reply)]
    half = REPLIES_PER_STEP // 2
    num_right = max(half, REPLIES_PER_STEP - len(wrong))
    chosen = right[:num_right] + wrong[: REPLIES_PER_STEP - min(len(right), num_right)]
    return sorted(chosen, key=one_each.index)


def is_right(reply: Record) -> bool:
    """Whether a recorded reply was judged correct."""
    return bool((reply.get("reward") or 0) > 0)
