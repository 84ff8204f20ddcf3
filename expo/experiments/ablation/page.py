"""Markdown tables and figures of an ablation, generated from its results.json.

    python -m expo.ablation.page DIR docs/experiment.md

writes the results in DIR/results.json between the page's two marks, and copies results.json and the figures into a
folder `ablation` next to the page.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expo.errors import ConfigError
from expo.experiments.ablation.paired import Mean
from expo.experiments.ablation.plan import BASELINE
from expo.experiments.ablation.results import (
    MEASURES,
    Contrast,
    Outcome,
    contrasts,
    curves,
    from_record,
    names,
    of_arm,
    scores,
    secondary_contrasts,
)
from expo.reporting.figures import draw_lines
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.endings import errors_on_one_line
from expo.runtime.parser import OneLineParser

PROGRAM = "python -m expo.ablation.page"
MARKS = ("<!-- ablation: begin -->", "<!-- ablation: end -->")


def tables(record: Mapping[str, Any]) -> str:
    """The runs, the scores by arm, and for each family of differences a summary sentence and the differences."""
    outcomes = from_record(record)
    primary, secondary = contrasts(outcomes), secondary_contrasts(outcomes)
    parts = [_provenance(record, outcomes), _scores_table(outcomes), _summary(primary), _contrasts_table(primary)]
    if secondary:
        parts += [_secondary_summary(secondary), _contrasts_table(secondary)]
    return "\n\n".join(parts) + "\n"


def figures(record: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name: pass@1 along the token budget, and its paired differences to the baseline."""
    outcomes, budget = from_record(record), record["settings"]["reply_tokens"]
    return {
        "curves": draw_lines(curves(outcomes, budget, is_paired=False), "reply tokens sampled", "held-out pass@1"),
        "differences": draw_lines(
            curves(outcomes, budget, is_paired=True), "reply tokens sampled", f"held-out pass@1 minus {BASELINE}'s"
        ),
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes results.json and its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_whole(folder / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    for name, png in figures(record).items():
        write_bytes_whole(folder / f"{name}.png", png)


def section(record: Mapping[str, Any]) -> str:
    """The section of a page: a heading, the tables, and the figures in the folder `ablation` next to the page."""
    return f"""## Results

{tables(record)}
Lines are means over seeds, bands are standard errors. pass@1 on the held-out questions:

![pass@1 of every arm along the token budget](ablation/curves.png)

Paired differences to {BASELINE}:

![paired differences along the token budget](ablation/differences.png)
"""


def with_section(page: Path, text: str, marks: tuple[str, str] = MARKS) -> str:
    """The page's text with the part between its two marks replaced.

    Raises: ConfigError if the marks are missing.
    """
    before = page.read_text(encoding="utf-8")
    begin, end = marks
    if before.count(begin) != 1 or before.count(end) != 1:
        raise ConfigError(f"{page} needs exactly one line {begin} and one line {end}; add them where the tables belong")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n\n{text}\n{end}", before, flags=re.DOTALL)


def _provenance(record: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    settings, versions = record["settings"], record["environment"]["versions"]
    return (
        f"{len(outcomes)} runs = {len(settings['arms'])} arms x {len(settings['pools'])} pools x {settings['seeds']} "
        f"seeds; {settings['reply_tokens']:,} reply tokens each; torch {versions['torch']}, commit "
        f"{', '.join(record['commits'])}."
    )


def _scores_table(outcomes: Sequence[Outcome]) -> str:
    rows = [("pool", "arm", "steps", *MEASURES)]
    for pool in names(outcomes, "pool"):
        starts = [outcome.curve[0] for outcome in of_arm(outcomes, pool, BASELINE)]
        first, eighth = (sum(point[k] for point in starts) / len(starts) for k in (2, 3))
        rows.append((pool, "before training", "0", "", f"{first:.3f}", f"{eighth:.3f}"))
        for arm in names(outcomes, "arm"):
            steps = [outcome.steps for outcome in of_arm(outcomes, pool, arm)]
            cells = (_cell(scores(outcomes, pool, arm, measure)) for measure in MEASURES)
            rows.append((pool, arm, f"{min(steps)} to {max(steps)}", *cells))
    return "Mean over seeds ± standard error:\n\n" + markdown(rows)


def _summary(family: Sequence[Contrast]) -> str:
    return (
        f"Of {len(family)} differences to {BASELINE}, {_num_significant(family)} statistically significant (paired "
        f"t tests with Holm's correction for all {len(family)}, family-wise error rate 5 %)"
        f"{_list_significant(family)}."
    )


def _secondary_summary(family: Sequence[Contrast]) -> str:
    arm, reference = family[0].arm, family[0].reference
    details = _list_significant(family) or f": these runs show no difference between {arm} and {reference}"
    return (
        f"Secondary analysis, added after the plan: of {len(family)} differences between {arm} and {reference}, "
        f"{_num_significant(family)} statistically significant (Holm's correction for these {len(family)} only, a "
        f"separate family-wise error rate of 5 %){details}."
    )


def _num_significant(family: Sequence[Contrast]) -> str:
    count = sum(contrast.is_significant for contrast in family)
    return f"{count or 'none'} {'is' if count < 2 else 'are'}"


def _list_significant(family: Sequence[Contrast]) -> str:
    texts = [_describe(contrast) for contrast in family if contrast.is_significant]
    return ": " + "; ".join(texts) if texts else ""


def _describe(contrast: Contrast) -> str:
    return f"{contrast.arm} on the {contrast.pool} pool, {contrast.measure}: {contrast.difference.mean:+.3f}"


def _contrasts_table(family: Sequence[Contrast]) -> str:
    difference = f"difference to {family[0].reference}"
    rows = [("pool", "arm", "measure", difference, "95 % CI, uncorrected", "p, uncorrected", "after correction")]
    for contrast in family:
        mean, error, low, high, p = contrast.difference
        verdict = "significant" if contrast.is_significant else "not significant"
        interval = f"[{low:+.3f}, {high:+.3f}]"
        rows.append((contrast.pool, contrast.arm, contrast.measure, _cell(Mean(mean, error), "+"), interval,
                     f"{p:.3f}" if p >= 0.001 else "< 0.001", verdict))  # fmt: skip
    return "Paired differences (by seed):\n\n" + markdown(rows)


def _cell(value: Mean, sign: str = "") -> str:
    return f"{value.mean:{sign}.3f} ± {value.error:.3f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table; the first one is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The results of an ablation, and their section of a page."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record, section(record)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}); run the ablation again") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 1 or 2 if the page or the results cannot be read or written."""
    parser = OneLineParser(prog=PROGRAM, description="Write the results of an ablation into a Markdown page.")
    parser.add_argument("dir", type=Path, metavar="DIR", help="the --out of the ablation")
    parser.add_argument("page", type=Path, metavar="PAGE.md", help=f"page with the lines {MARKS[0]} and {MARKS[1]}")
    options = parser.parse_args(argv)
    with errors_on_one_line(PROGRAM):
        try:
            record, text = _read(options.dir / "results.json")
            write_bytes_whole(options.page, with_section(options.page, text).encode())
            write_record(options.page.parent / "ablation", record)
        except OSError as error:
            raise ConfigError(str(error)) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
