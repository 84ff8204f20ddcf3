"""The page of a run: one HTML file with its own pictures and style, from top to bottom.

It holds no script and fetches nothing, so that it can be mailed alone and read offline. Everything that a model wrote
is escaped.
"""

import base64
import math
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from expo.reporting.figures import Picture
from expo.reporting.reader import (
    Comparison,
    Record,
    Records,
    Run,
    compare,
    interval_text,
    is_right,
    main_set,
    series,
    starts_of,
    table_cells,
)

MAX_REPLY_CHARS = 6000  # a reply of 3072 tokens rarely has more, and a page stays one that can be mailed

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --tint: #eef2f6; --line: #dfe3e8;
  --ink: #1c2128; --soft: #5b6470; --good: #00734f; --bad: #b34700;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0c0e11; --card: #141414; --tint: #20252b; --line: #2b3138;
    --ink: #e4e7eb; --soft: #9aa4b0; --good: #4cc79a; --bad: #f0925a;
  }
  /* turns light paper dark and keeps the hues; 0.922 brings white to the colour of the card */
  figure img { filter: invert(0.922) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 3.4vw, 2.1rem); line-height: 1.25; margin: 0; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 3rem 0 .9rem; }
h3 { font-size: 1.02rem; margin: 0 0 .5rem; }
h3.step { margin-top: 1.6rem; }
p { margin: 0 0 .8rem; }
.soft, figcaption { color: var(--soft); font-size: .92rem; }
.under { margin-top: .8rem; max-width: 54rem; }
.notice {
  border-left: 4px solid var(--bad); border-radius: 0 8px 8px 0; background: var(--tint);
  padding: .6rem 1rem; margin: 1rem 0;
}
.missing { color: var(--soft); border: 1px dashed var(--line); border-radius: 8px; padding: 1.6rem; }

figure, article, details, .facts div, .wide {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.facts {
  display: grid; gap: .75rem; margin: 1.6rem 0 .6rem;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
}
.facts div { padding: .7rem .95rem; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-size: 1.3rem; font-weight: 600; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .95rem; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .86rem; }
tr.first td { border-top: 1px solid var(--line); }
td.num, th.num { text-align: right; }
td small { color: var(--soft); font-weight: 400; font-size: .82rem; margin-left: .4rem; }
.pairs td { white-space: normal; overflow-wrap: anywhere; width: 100%; }
.up { color: var(--good); font-weight: 600; }
.down { color: var(--bad); font-weight: 600; }

.grid {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr));
}
figure { margin: 0; padding: 1rem 1.1rem; }
figure.full { grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; margin: .3rem 0 .6rem; }

article { padding: .9rem 1.1rem; min-width: 0; }
article header { display: flex; flex-wrap: wrap; gap: .3rem .8rem; margin-bottom: .5rem; }
pre {
  font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: var(--tint); border-radius: 8px; padding: .6rem .8rem; margin: .25rem 0 .6rem;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 18rem; overflow: auto;
}
details { margin: .7rem 0; padding: .65rem 1rem; }
details[open] summary { margin-bottom: .7rem; }
details .wide { border: 0; }
details pre { max-height: none; }
summary { cursor: pointer; font-weight: 600; }
@media print { figure, article, tr { break-inside: avoid; } }
"""

# even if a reply got past the escaping, nothing on the page could run or be fetched
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_page(run: Run, pictures: list[Picture]) -> str:
    """The whole page as HTML text."""
    body = (
        _headline(run),
        _notices(run),
        _facts(run),
        section("Before and after", _results(run)),
        section("Pictures", f'<div class="grid">{"".join(figure(p) for p in pictures)}</div>'),
        section("Replies", _replies(run)),
        section("How it was run", _provenance(run)),
    )
    return document(f"{run.folder.name} · EXPO run", body)


def document(title: str, body: Sequence[str]) -> str:
    """A page of the house's style, as HTML text; `title` is plain text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A part of a page under its title."""
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n"


def _headline(run: Run) -> str:
    model, data = (_label(run.records.config.get(name)) for name in ("model", "data"))
    about = [_method(run.records), f"model {model}" if model else "", f"data {data}" if data else ""]
    kicker = " · ".join(escape(part) for part in (f"Run {run.folder.name}", *about) if part)
    return f'<header>\n<p class="soft">{kicker}</p>\n<h1>{escape(_verdict(run))}</h1>\n</header>\n'


def _method(records: Records) -> str:
    """The method's name; each half of it can be switched off, and with both off GRPO remains."""
    is_gaussian = records.setting("curriculum", "kind") != "uniform"
    is_conditioned = records.setting("kl", "rho") != "constant"
    names = {
        (True, True): "EXPO",
        (True, False): "GRPO with the Gaussian curriculum",
        (False, True): "GRPO with accuracy-conditioned KL",
        (False, False): "GRPO",
    }
    return names[is_gaussian, is_conditioned]


def _label(section: Any) -> str:
    """What a section calls its subject: the first plain text it holds, which for a path is its last part."""
    texts = [value for value in section.values() if isinstance(value, str)] if isinstance(section, dict) else []
    return Path(texts[0]).name if texts else ""


def _verdict(run: Run) -> str:
    """The one sentence that the run comes down to."""
    before, after = run.records.before, run.records.after
    name = main_set(before | after)
    lines = [line for line in compare(before, after) if line.set_name == name and line.metric == "pass@1"]
    if not lines:
        return "Nothing evaluated yet"
    words, first, last, gain = _words(name or ""), lines[0].before, lines[0].after, lines[0].change
    if first is None or last is None or gain is None:
        only = first or last
        return f"{words} pass@1 is {interval_text(only)}; there is no second evaluation to compare it with yet"
    verb = "rose" if gain.low > 0 else "fell" if gain.high < 0 else "did not clearly move: it went"
    _, interval = _minus(interval_text(gain, "+")).split(" ", 1)
    return (
        f"{words} pass@1 {verb} from {first.mean:.3f} to {last.mean:.3f}, a change of "
        f"{_minus(f'{gain.mean:+.3f}')} (95\u00a0% interval {interval.strip('[]').replace(', ', ' to ')})"
    )


def _words(set_name: str) -> str:
    return set_name.replace("_", "-").capitalize()


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _notices(run: Run) -> str:
    notices = []
    if not run.summary:
        where = _progress(run.records)
        notices.append(f"No summary yet: the run is still going, or stopped early, at step {where}.")
    for name, count in run.unreadable.items():
        notices.append(f"{name}: {count} unreadable {'line' if count == 1 else 'lines'} left out.")
    return "".join(f'<p class="notice">{escape(notice)}</p>\n' for notice in notices)


def _progress(records: Records) -> str:
    planned = records.setting("run", "steps")
    return f"{_last_step(records)} of {planned}" if planned else str(_last_step(records))


def _last_step(records: Records) -> int:
    return int(records.metrics[-1]["step"]) if records.metrics else 0


def _facts(run: Run) -> str:
    metrics = run.records.metrics
    seconds = run.summary.get("seconds") or sum(v for v in series(metrics, "seconds") if not math.isnan(v))
    facts = {
        "Steps": str(run.summary.get("steps") or _last_step(run.records)),
        "Seed": str(run.summary.get("seed", run.records.setting("run", "seed"))),
        "Wall time": _duration(seconds),
        "Seconds per step": _median(metrics, "seconds", ".2f"),
        "Tokens per second": _median(metrics, "tokens_per_second", ",.0f"),
        "Tokens per reply": _median(metrics, "completion_length", ".1f"),
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{cells}</dl>\n<p class="soft">Rates and lengths are medians over steps.</p>\n'


def _median(metrics: list[Record], key: str, style: str) -> str:
    values = [value for value in series(metrics, key) if not math.isnan(value)]
    return format(statistics.median(values), style) if values else "–"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _results(run: Run) -> str:
    lines = compare(run.records.before, run.records.after)
    if not lines:
        return '<p class="missing">Nothing evaluated yet.</p>'
    table = comparison_table(lines, "Set")
    by_level = _level_lines(run.records)
    levels = _folded("The same by level", comparison_table(by_level, "Level")) if by_level else ""
    return f"{table}\n{_reading_guide(run.records)}\n{levels}"


def _reading_guide(records: Records) -> str:
    how = records.evaluations[-1] if records.evaluations else {}
    samples = f", from {how['num_samples']} replies a question" if "num_samples" in how else ""
    temperature = f" at temperature {how['temperature']}" if "temperature" in how else ""
    return (
        '<p class="soft under">pass@k: the chance that at least one of k replies is right, by the unbiased '
        f"estimator{escape(samples + temperature)}. Brackets hold 95 % intervals. That of a change adds "
        "both half-widths in squares, as if the two were independent; as the questions are the same, it is "
        "cautious. Coloured: a change whose interval leaves out zero.</p>"
    )


def _level_lines(records: Records) -> list[Comparison]:
    lines = []
    for name in records.before | records.after:
        scores = (s.get(name, {}).get("by_level", {}) for s in (records.before, records.after))
        lines += compare(*scores)
    return lines


def comparison_table(
    lines: Sequence[Comparison], what: str, names: Sequence[str] = ("Metric", "Before", "After", "Change")
) -> str:
    """Lines as a table; `what` heads their sets, `names` the other columns."""
    rows, shown = [], None
    for line in lines:
        is_first = line.set_name != shown
        shown = line.set_name
        rows.append(_row(line, is_first=is_first))
    heads = f'<th>{what}</th><th class="num">Questions</th>' + "".join(f"<th>{escape(name)}</th>" for name in names)
    body = f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>\n{body}</table></div>'


def _row(line: Comparison, *, is_first: bool) -> str:
    name, num_questions, metric, before, after, gain = table_cells(line)
    left = f'<td>{escape(name)}</td><td class="num">{escape(num_questions)}</td>'
    cells = (
        left if is_first else "<td></td><td></td>",
        *(f"<td>{cell}</td>" for cell in (metric, _split(before), _split(after))),
        f'<td class="{_direction(line)}">{_split(gain)}</td>',
    )
    return f"<tr{' class=first' if is_first else ''}>{''.join(cells)}</tr>\n"


def _direction(line: Comparison) -> str:
    """Style of a change: up or down where its interval leaves out zero."""
    if line.change is None or line.change.low <= 0 <= line.change.high:
        return ""
    return "up" if line.change.mean > 0 else "down"


def _split(interval: str) -> str:
    """The mean in full size, its interval small beside it."""
    mean, _, rest = _minus(interval).partition(" ")
    return f"{mean}<small>{rest}</small>" if rest else "–"


def figure(picture: Picture) -> str:
    """A picture with its title and what to look at in it."""
    if picture.png is None:
        content = '<p class="missing">Nothing recorded for this picture yet.</p>'
    else:
        data = base64.b64encode(picture.png).decode()
        content = f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
    style = ' class="full"' if picture.wide else ""
    return (
        f'<figure id="{picture.name}"{style}>\n<h3>{escape(picture.title)}</h3>\n{content}\n'
        f"<figcaption>{escape(picture.sentence)}</figcaption>\n</figure>\n"
    )


def _replies(run: Run) -> str:
    if not run.replies:
        return '<p class="missing">No replies recorded yet.</p>'
    guide = "From the first, the middle and the last recorded step; right and wrong ones where there are both."
    parts = [f'<p class="soft">{guide}</p>']
    for step, replies in run.replies.items():
        cards = "".join(_reply(reply) for reply in replies)
        parts.append(f'<h3 class="step">Step {step}</h3>\n<div class="grid">{cards}</div>')
    return "\n".join(parts)


def _reply(reply: Record) -> str:
    was_right = is_right(reply)
    verdict = str(reply.get("verdict", "right" if was_right else "wrong"))
    notes = [str(reply.get("level", "")), f"{reply.get('num_tokens', '?')} tokens"]
    notes += ["cut at the length limit"] if reply.get("truncated") else []
    about = " · ".join(escape(note) for note in notes if note)
    mark = f'<span class="{"up" if was_right else "down"}">{"✓" if was_right else "✗"} {escape(verdict)}</span>'
    return (
        f'<article>\n<header>{mark}<span class="soft">{about}</span></header>\n'
        f'<div class="soft">Question</div><pre>{_model_text(reply.get("question"))}</pre>\n'
        f'<div class="soft">Reply</div><pre>{_model_text(reply.get("reply"))}</pre>\n'
        f'<div class="soft">Answer wanted: <b>{_model_text(reply.get("answer"))}</b></div>\n</article>\n'
    )


def _model_text(text: Any) -> str:
    """Escaped, cut where it is very long, and with a word for nothing at all."""
    whole = "" if text is None else str(text)
    if not whole:
        return "<i>(empty)</i>"
    rest = len(whole) - MAX_REPLY_CHARS
    return escape(whole[:MAX_REPLY_CHARS]) + (f"<i> … {rest} more characters</i>" if rest > 0 else "")


def _provenance(run: Run) -> str:
    starts = starts_of(run.environment)
    environment = starts[-1] if starts else {}
    machine = environment.get("machine") or {}
    gpus = ", ".join(str(gpu) for gpu in machine.get("gpus") or []) or "none"
    facts = {
        "Started": starts[0].get("started") if starts else None,
        "Commit": _commits(starts, run.summary),
        "Command": " ".join(str(word) for word in environment.get("command") or []),
        "CPUs": machine.get("cpus"),
        "GPUs": gpus if machine else None,
        "Python": machine.get("python"),
    }
    versions = environment.get("versions") or {}
    return (
        pairs({name: value for name, value in facts.items() if value})
        + _folded("Configuration", f"<pre>{escape(run.config_text)}</pre>")
        + (_folded("Versions", pairs(versions)) if versions else "")
    )


def _commits(starts: Sequence[Record], summary: Record) -> str:
    """The commit; or each, with the step from which it was used where that is known."""
    known = summary.get("commits") or [summary.get("commit")]
    used = [start for start in starts if start.get("commit")] or [{"commit": commit} for commit in known if commit]
    said = []
    for index, start in enumerate(used):
        if index == 0 or start["commit"] != used[index - 1]["commit"]:
            since = f" from step {start['first_step']}" if "first_step" in start and len(used) > 1 else ""
            said.append(f"{start['commit']}{since}")
    return ", ".join(said) or "not recorded"


def pairs(facts: Record) -> str:
    """Facts by name, as a table."""
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<div class="wide"><table class="pairs"><tbody>{rows}</tbody></table></div>' if rows else ""


def _folded(title: str, content: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n{content}\n</details>\n"
