"""The ablation as tables in Markdown and pictures, made from its results.json alone.

    python -m expo.ablation.page DIR docs/experiment.md

puts what DIR/results.json shows between the page's two marks, and results.json and the pictures into a folder
`ablation` beside the page.
"""

import argparse
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
from expo.runtime.cli import fail

PROGRAM = "python -m expo.ablation.page"
MARKS = ("<!-- ablation: begin -->", "<!-- ablation: end -->")


def tables(record: Mapping[str, Any]) -> str:
    """What was run, scores by arm, and for each family of differences the verdict in a sentence and the differences."""
    outcomes = from_record(record)
    found, added = contrasts(outcomes), secondary_contrasts(outcomes)
    parts = [_provenance(record, outcomes), _scores_table(outcomes), _verdict(found), _contrasts_table(found)]
    if added:
        parts += [_secondary_verdict(added), _contrasts_table(added)]
    return "\n\n".join(parts) + "\n"


def pictures(record: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name: pass@1 along the budget, and its paired differences to the baseline."""
    outcomes, budget = from_record(record), record["settings"]["reply_tokens"]
    return {
        "curves": draw_lines(curves(outcomes, budget, is_paired=False), "reply tokens sampled", "held-out pass@1"),
        "differences": draw_lines(
            curves(outcomes, budget, is_paired=True), "reply tokens sampled", f"held-out pass@1, less {BASELINE}'s"
        ),
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes results.json and the pictures made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_whole(folder / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    for name, png in pictures(record).items():
        write_bytes_whole(folder / f"{name}.png", png)


def section(record: Mapping[str, Any]) -> str:
    """A page's section of it: a heading, the tables, and the pictures in the folder `ablation` beside the page."""
    return f"""## What we saw

{tables(record)}
Lines are means over seeds, bands their standard errors. pass@1 on held-out questions:

![pass@1 of every arm along the budget](ablation/curves.png)

Paired differences to {BASELINE}:

![paired differences along the budget](ablation/differences.png)
"""


def with_section(page: Path, text: str) -> str:
    """The page's text with what stands between its two marks replaced.

    Raises: ConfigError if it lacks the marks.
    """
    before = page.read_text(encoding="utf-8")
    begin, end = MARKS
    if before.count(begin) != 1 or before.count(end) != 1:
        raise ConfigError(f"{page} has not one line {begin} and one {end}; put them where the tables are to stand")
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
    return "Mean over seeds, ± its standard error:\n\n" + _markdown(rows)


def _verdict(found: Sequence[Contrast]) -> str:
    return (
        f"Of {len(found)} differences to {BASELINE}, {_num_beyond(found)} beyond noise (t tests on pairs, Holm's "
        f"correction for all {len(found)}, 5 % for any false claim){_those_beyond(found)}."
    )


def _secondary_verdict(found: Sequence[Contrast]) -> str:
    arm, less = found[0].arm, found[0].less
    said = _those_beyond(found) or f": these runs do not tell {arm} from {less}"
    return (
        f"Secondary, added after the plan: of {len(found)} differences of {arm} to {less}, {_num_beyond(found)} beyond "
        f"noise (Holm's correction for these {len(found)} alone, a further 5 % for any false claim){said}."
    )


def _num_beyond(found: Sequence[Contrast]) -> str:
    count = sum(contrast.is_beyond_noise for contrast in found)
    return f"{count or 'none'} {'is' if count < 2 else 'are'}"


def _those_beyond(found: Sequence[Contrast]) -> str:
    said = [_sentence(contrast) for contrast in found if contrast.is_beyond_noise]
    return ": " + "; ".join(said) if said else ""


def _sentence(contrast: Contrast) -> str:
    return f"{contrast.arm} on the {contrast.pool} pool, {contrast.measure}: {contrast.difference.mean:+.3f}"


def _contrasts_table(found: Sequence[Contrast]) -> str:
    rows = [("pool", "arm", "measure", f"less {found[0].less}", "95 %, this one alone", "p, uncorrected", "verdict")]
    for contrast in found:
        mean, error, low, high, p = contrast.difference
        verdict = "beyond noise" if contrast.is_beyond_noise else "within noise"
        interval = f"[{low:+.3f}, {high:+.3f}]"
        rows.append((contrast.pool, contrast.arm, contrast.measure, _cell(Mean(mean, error), "+"), interval,
                     f"{p:.3f}" if p >= 0.001 else "< 0.001", verdict))  # fmt: skip
    return "Paired by seed:\n\n" + _markdown(rows)


def _cell(value: Mean, sign: str = "") -> str:
    return f"{value.mean:{sign}.3f} ± {value.error:.3f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 if the page or the results are not as expected."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Put an ablation's results into a Markdown page.")
    parser.add_argument("dir", type=Path, metavar="DIR", help="the --out of the ablation")
    parser.add_argument("page", type=Path, metavar="PAGE.md", help=f"with the lines {MARKS[0]} and {MARKS[1]}")
    options = parser.parse_args(argv)
    try:
        record = json.loads((options.dir / "results.json").read_text(encoding="utf-8"))
        write_bytes_whole(options.page, with_section(options.page, section(record)).encode())
        write_record(options.page.parent / "ablation", record)
    except (ConfigError, OSError) as error:
        fail(PROGRAM, ConfigError(str(error)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
