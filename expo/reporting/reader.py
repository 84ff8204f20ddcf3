"""Reads the files of a run folder: what `report.py` shows.

A run may still be in progress or may have crashed, and its files may be damaged or somebody else's: missing files and
values are left empty, and lines that are no rows are counted and skipped.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expo.errors import NotARunError
from expo.reporting import clean
from expo.reporting.comparison import Scores
from expo.run.logs import parse_object
from expo.runtime.bounded_yaml import YamlError, load_yaml

Record = dict[str, Any]  # one line of a .jsonl file

REPLIES_PER_STEP = 4  # replies that the report shows for each of its steps


@dataclass(frozen=True)
class TrainingHistory:
    """What the figures are drawn from; any part may be empty."""

    config: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)  # one record per step, in order
    curriculum: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)  # one record per evaluated step, in order
    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)

    def setting(self, section: str, name: str) -> Any:
        """The value of `section.name` in the run's configuration; None if it is not set."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None


@dataclass(frozen=True)
class RunRecords:
    """The contents of a run folder."""

    folder: Path
    config_text: str
    history: TrainingHistory
    environment: Record
    summary: Record
    replies: dict[int, list[Record]]  # the replies that the report shows, by step
    unreadable: dict[str, int] = field(default_factory=dict)  # file name: number of lines that could not be parsed


def series(records: Iterable[Record], key: str) -> list[float]:
    """The records' values of `key`, NaN where a record has no number."""
    values = [clean.number(record.get(key)) for record in records]
    return [math.nan if value is None else value for value in values]


def steps_of(records: Iterable[Record]) -> list[int]:
    """The records' steps."""
    return [record["step"] for record in records]


def is_correct(reply: Record) -> bool:
    """Whether a recorded reply earned a reward."""
    return (clean.number(reply.get("reward")) or 0) > 0


def starts_of(environment: Record) -> list[Record]:
    """Every start of a run, in order, from its environment.json; older files record only the last one."""
    starts = environment.get("starts") or ([environment] if environment else [])
    return [start for start in clean.listing(starts) if isinstance(start, dict)]


def commits_of(environment: Record) -> list[str | None]:
    """The commits of the code that ran, without repeats, in order; None where it was not a git checkout."""
    commits = [start.get("commit") for start in starts_of(environment)]
    return list(dict.fromkeys(commit for commit in commits if commit is None or isinstance(commit, str)))


def read_run(run_dir: Path) -> RunRecords:
    """Everything in a run folder that the report shows.

    Raises:
        NotARunError: if the folder does not exist or has no readable `config.yaml`.
    """
    config_text, config = _read_config(run_dir)
    unreadable: dict[str, int] = {}
    metrics, curriculum = (
        _by_step(_read_lines(run_dir / f"{name}.jsonl", unreadable)) for name in ("metrics", "curriculum")
    )
    evaluations = evaluations_by_step(
        {**row, "sets": clean.scores(row.get("sets"))} for row in _read_lines(run_dir / "evaluations.jsonl", unreadable)
    )
    curriculum = [{**row, "histogram": clean.histogram(row.get("histogram"))} for row in curriculum]
    summary = _read_json(run_dir / "summary.json", unreadable)
    before, after = _before_and_after(summary, evaluations)
    history = TrainingHistory(config, metrics, curriculum, evaluations, before, after)
    environment = _read_json(run_dir / "environment.json", unreadable)
    replies = _read_replies(run_dir / "completions.jsonl", unreadable)
    unreadable = {name: count for name, count in unreadable.items() if count}
    return RunRecords(run_dir.resolve(), config_text, history, environment, summary, replies, unreadable)


def _read_config(run_dir: Path) -> tuple[str, Record]:
    path = run_dir / "config.yaml"
    if not run_dir.is_dir():
        raise NotARunError(f"{run_dir} is not a folder; give the run folder that the trainer wrote")
    if not path.is_file():
        raise NotARunError(f"{run_dir} is not a run: it has no config.yaml; give the folder that the trainer wrote")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = load_yaml(text)
    except YamlError as error:
        raise NotARunError(f"{path} is not YAML as expected: {error}") from error
    if not isinstance(config, dict):
        raise NotARunError(f"{path} contains {type(config).__name__}, but a run's configuration has named sections")
    return text, config


def _read_lines(path: Path, unreadable: dict[str, int]) -> Iterator[Record]:
    """The complete records of a .jsonl file; the number of lines that could not be parsed goes into `unreadable`."""
    unreadable[path.name] = 0
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = parse_object(line)
            if clean.is_step(record.get("step")):
                yield record
            elif line.strip():
                unreadable[path.name] += 1


def _read_json(path: Path, unreadable: dict[str, int]) -> Record:
    if not path.is_file():
        return {}
    value = parse_object(path.read_text(encoding="utf-8", errors="replace"))
    unreadable[path.name] = 0 if value else 1
    return value


def _by_step(records: Iterator[Record]) -> list[Record]:
    """The records sorted by step; a resumed run may record a step twice, and the later record wins."""
    latest = {record["step"]: record for record in records}
    return [latest[step] for step in sorted(latest)]


def evaluations_by_step(records: Iterable[Record]) -> list[Record]:
    """One record for each evaluated step, in order; a run that was resumed with other sets has several lines of a step,
    each with its own sets.
    """
    merged: dict[int, Record] = {}
    for record in records:
        if record.get("sets"):
            earlier = merged.get(record["step"], {"sets": {}})
            merged[record["step"]] = {**earlier, **record, "sets": {**earlier["sets"], **record["sets"]}}
    return [merged[step] for step in sorted(merged)]


def _before_and_after(summary: Record, evaluations: list[Record]) -> tuple[Scores, Scores]:
    initial = [evaluation["sets"] for evaluation in evaluations if evaluation["step"] == 0]
    later = [evaluation["sets"] for evaluation in evaluations if evaluation["step"] > 0]
    before, after = initial[0] if initial else {}, later[-1] if later else {}
    return clean.scores(summary.get("before")) or before, clean.scores(summary.get("after")) or after


def _read_replies(path: Path, unreadable: dict[str, int]) -> dict[int, list[Record]]:
    """A few replies from the first, middle and last recorded steps.

    The file is read twice, first for its steps only, because the replies of a long run may not fit in memory.
    """
    steps = sorted({record["step"] for record in _read_lines(path, unreadable)})
    chosen_steps = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    replies: dict[int, list[Record]] = {step: [] for step in chosen_steps}
    for record in _read_lines(path, unreadable):
        if record["step"] in replies:
            replies[record["step"]].append(record)
    return {step: _select_replies(of_step) for step, of_step in replies.items()}


def _select_replies(replies: list[Record]) -> list[Record]:
    """At most one reply per question, half of them correct and half incorrect if there are enough of both."""
    first_by_question = {str(reply.get("question_id")): reply for reply in reversed(replies)}
    candidates = list(reversed(first_by_question.values()))
    correct = [reply for reply in candidates if is_correct(reply)]
    incorrect = [reply for reply in candidates if not is_correct(reply)]
    half = REPLIES_PER_STEP // 2
    num_correct = max(half, REPLIES_PER_STEP - len(incorrect))
    chosen = correct[:num_correct] + incorrect[: REPLIES_PER_STEP - min(len(correct), num_correct)]
    return sorted(chosen, key=candidates.index)
