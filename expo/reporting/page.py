"""The report of a run as one HTML page with its figures and style embedded; the template is `run.html.j2`."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo.reporting import clean
from expo.reporting.comparison import TOO_FEW, Comparison, Scores, compare_scores, headline_set, interval_text
from expo.reporting.figures import RenderedFigure
from expo.reporting.reader import Record, RunRecords, TrainingHistory, is_correct, series, starts_of
from expo.reporting.templates import Table, comparison_table, render, with_minus_signs

MAX_REPLY_CHARS = 6000  # few replies of 3,072 tokens are longer, and the page stays small enough for e-mail


@dataclass(frozen=True)
class ModelText:
    """Question, reply or answer as the page shows it."""

    shown: str
    num_omitted: int  # characters beyond `MAX_REPLY_CHARS`


@dataclass(frozen=True)
class ReplyCard:
    """One reply as the page shows it."""

    is_correct: bool
    verdict: str
    notes: list[str]
    question: ModelText
    reply: ModelText
    answer: ModelText


def render_page(run: RunRecords, figures: Sequence[RenderedFigure]) -> str:
    """The page as HTML text."""
    environment, provenance = _provenance(run)
    return render(
        "run.html.j2",
        title=f"{run.folder.name} · EXPO run",
        subtitle=_subtitle(run),
        headline=_headline(run.history.before, run.history.after),
        notices=_notices(run),
        facts=_facts(run),
        results=_results(run.history),
        results_by_level=_results_by_level(run.history),
        sampling=_sampling(run.history),
        figures=figures,
        replies={step: [_reply_card(reply) for reply in replies] for step, replies in run.replies.items()},
        provenance=provenance,
        config_text=run.config_text,
        versions=clean.mapping(environment.get("versions")),
    )


def _subtitle(run: RunRecords) -> str:
    model, data = (_first_text(run.history.config.get(name)) for name in ("model", "data"))
    parts = [f"Run {run.folder.name}", _method(run.history), _named("model", model), _named("data", data)]
    return " · ".join(part for part in parts if part)


def _named(word: str, path: str) -> str:
    """The word and the last part of a path, as in "model Qwen3-8B"; "" without a path.

    If that part is the word itself, the part before it is named too ("model sft/model"), or the word once.
    """
    parts = Path(path).parts
    if not parts:
        return ""
    if parts[-1].lower() != word.lower():
        return f"{word} {parts[-1]}"
    before = parts[-2] if len(parts) > 1 else ""
    return f"{word} {before}/{parts[-1]}" if before.strip("./") else word


def _method(history: TrainingHistory) -> str:
    """The method's name: EXPO has two parts that can be switched off; without both it is GRPO."""
    is_gaussian = history.setting("curriculum", "kind") != "uniform"
    is_conditioned = history.setting("kl", "rho") != "constant"
    names = {
        (True, True): "EXPO",
        (True, False): "GRPO with the Gaussian curriculum",
        (False, True): "GRPO with accuracy-conditioned KL",
        (False, False): "GRPO",
    }
    return names[is_gaussian, is_conditioned]


def _first_text(section: Any) -> str:
    """The first text of a section of the configuration."""
    return next((value for value in clean.mapping(section).values() if isinstance(value, str)), "")


def _headline(before: Scores, after: Scores) -> str:
    """The main result in one sentence."""
    set_name = headline_set(before | after)
    rows = [row for row in compare_scores(before, after) if (row.set_name, row.metric) == (set_name, "pass@1")]
    if not rows:
        return "No evaluation recorded yet"
    title = (set_name or "").replace("_", "-").capitalize()
    first, last, change = rows[0].before, rows[0].after, rows[0].change
    if first is None or last is None or change is None:
        return f"{title} pass@1 is {interval_text(first or last)}; there is no second evaluation to compare it with yet"
    mean, low, high = with_minus_signs(f"{change.mean:+.3f} {change.low:+.3f} {change.high:+.3f}").split()
    verb = {"up": "rose", "down": "fell", "": "went"}[rows[0].trend]
    remark = f" ({TOO_FEW})" if rows[0].remark else ""
    return (
        f"{title} pass@1 {verb} from {first.mean:.3f} to {last.mean:.3f}{remark}, a change of {mean} "
        f"(95\u00a0% interval {low} to {high})"
    )


def _notices(run: RunRecords) -> list[str]:
    notices = []
    if not run.summary:
        notices.append(f"No summary yet: the run is in progress, or stopped early, at step {_progress(run.history)}.")
    for name, count in run.unreadable.items():
        notices.append(f"{name}: {count} unreadable {'line' if count == 1 else 'lines'} skipped.")
    return notices


def _progress(history: TrainingHistory) -> str:
    num_steps = history.setting("run", "steps")
    return f"{_last_step(history)} of {num_steps}" if clean.is_step(num_steps) else str(_last_step(history))


def _last_step(history: TrainingHistory) -> int:
    return int(history.metrics[-1]["step"]) if history.metrics else 0


def _facts(run: RunRecords) -> dict[str, str]:
    metrics = run.history.metrics
    seed = run.summary.get("seed", run.history.setting("run", "seed"))
    seconds = clean.number(run.summary.get("seconds")) or sum(
        v for v in series(metrics, "seconds") if not math.isnan(v)
    )
    return {
        "Steps": str(run.summary.get("steps") or _last_step(run.history)),
        "Seed": str(seed) if isinstance(seed, int) else "–",
        "Wall time": _duration(seconds),
        "Seconds per step": _median(metrics, "seconds", ".2f"),
        "Tokens per second": _median(metrics, "tokens_per_second", ",.0f"),
        "Tokens per reply": _median(metrics, "completion_length", ".1f"),
    }


def _median(metrics: list[Record], key: str, number_format: str) -> str:
    values = [value for value in series(metrics, key) if not math.isnan(value)]
    return format(statistics.median(values), number_format) if values else "–"


def _duration(seconds: float) -> str:
    minutes, remainder = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {remainder:02d} s" if minutes else f"{remainder} s"


def _results(history: TrainingHistory) -> Table | None:
    rows = compare_scores(history.before, history.after)
    return comparison_table(rows, "Set") if rows else None


def _results_by_level(history: TrainingHistory) -> Table | None:
    rows: list[Comparison] = []
    for name in history.before | history.after:
        before, after = (scores.get(name, {}).get("by_level", {}) for scores in (history.before, history.after))
        rows += compare_scores(before, after)
    return comparison_table(rows, "Level") if rows else None


def _sampling(history: TrainingHistory) -> str:
    """How the replies of the last evaluation were sampled; "" if that was not recorded."""
    evaluation = history.evaluations[-1] if history.evaluations else {}
    parts = []
    if "num_samples" in evaluation:
        parts.append(f"{evaluation['num_samples']} replies per question")
    if "temperature" in evaluation:
        parts.append(f"at temperature {evaluation['temperature']}")
    return " ".join(parts)


def _reply_card(reply: Record) -> ReplyCard:
    verdict = str(reply.get("verdict", "correct" if is_correct(reply) else "wrong"))
    notes = [str(reply.get("level", "")), f"{reply.get('num_tokens', '?')} tokens"]
    notes += ["truncated at the length limit"] if reply.get("truncated") else []
    question, text, answer = (_model_text(reply.get(name)) for name in ("question", "reply", "answer"))
    return ReplyCard(is_correct(reply), verdict, [note for note in notes if note], question, text, answer)


def _model_text(text: Any) -> ModelText:
    full = "" if text is None else str(text)
    return ModelText(full[:MAX_REPLY_CHARS], max(0, len(full) - MAX_REPLY_CHARS))


def _provenance(run: RunRecords) -> tuple[Record, Record]:
    """The environment of the last start of the run, and what the page shows of all starts."""
    starts = starts_of(run.environment)
    environment = starts[-1] if starts else {}
    machine = clean.mapping(environment.get("machine"))
    gpus = ", ".join(str(gpu) for gpu in clean.listing(machine.get("gpus"))) or "none"
    facts = {
        "Started": starts[0].get("started") if starts else None,
        "Commit": _commits(starts, run.summary),
        "Command": " ".join(str(word) for word in clean.listing(environment.get("command"))),
        "CPUs": machine.get("cpus"),
        "GPUs": gpus if machine else None,
        "Python": machine.get("python"),
    }
    return environment, {name: value for name, value in facts.items() if value}


def _commits(starts: Sequence[Record], summary: Record) -> str:
    """The commit of the code; if it changed between starts, each commit and its first step where known."""
    summarized = clean.listing(summary.get("commits")) or [summary.get("commit")]
    used = [start for start in starts if start.get("commit")] or [{"commit": commit} for commit in summarized if commit]
    texts = []
    for index, start in enumerate(used):
        if index == 0 or start["commit"] != used[index - 1]["commit"]:
            since = f" from step {start['first_step']}" if "first_step" in start and len(used) > 1 else ""
            texts.append(f"{start['commit']}{since}")
    return ", ".join(texts) or "not recorded"
