"""Two evaluations of the same questions, beside each other: `python -m expo.evaluate compare A B`.

The interval of a difference B - A is a percentile bootstrap over questions of the paired differences: how hard the
questions are is the same for both, and falls out.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo.errors import ConfigError
from expo.evaluation.protocol import RESULTS, differences
from expo.evaluation.scores import mean_with_interval, pass_at_k, powers_of_two
from expo.evaluation.tables import SHARES, estimates_of
from expo.reporting.comparison import Comparison, Estimate, pass_at, table_cells, text_table
from expo.reporting.figures import RenderedFigure, draw_curves
from expo.reporting.templates import comparison_table
from expo.reporting.templates import render as render_template
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.cli import fail

PROGRAM = "python -m expo.evaluate compare"


@dataclass(frozen=True)
class Results:
    """A results.json, and what it is called."""

    label: str
    facts: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """n, replies per question."""
        return int(self.facts["protocol"]["num_samples"])

    def correct(self, name: str) -> dict[str, int]:
        """c of every question of a set, by its id."""
        return {question["id"]: question["correct"] for question in self.facts["sets"][name]["questions"]}

    def majority(self, name: str) -> dict[str, float]:
        """The majority's score on every question of a set, by its id."""
        return {question["id"]: question["majority"] for question in self.facts["sets"][name]["questions"]}


def compare(a: Results, b: Results, *, anyway: bool = False) -> list[Comparison]:
    """For every set of both pass@k at powers of two, and the majority's score: A, B, and B - A over the same questions.

    Args:
        anyway: compare where protocols or questions differ, on the sets and questions that both have; the columns of A
            and B are then still of all their questions.

    Raises: ConfigError if there is nothing to compare, or the evaluations differ in more than the model.
    """
    differing = incomparable(a, b)
    if differing and not anyway:
        raise ConfigError(
            f"A and B differ in more than the model: {', '.join(differing)}; evaluate one of them again, or add "
            f"--anyway"
        )
    names = [name for name in a.facts["sets"] if name in b.facts["sets"]]
    lines = [line for name in names for line in _compare_set(a, b, name)]
    if not lines:
        raise ConfigError("A and B have no question in common; compare evaluations of the same sets")
    return lines


def incomparable(a: Results, b: Results) -> list[str]:
    """What the two differ in beside the model: settings, sets, and questions by their checksums.

    The seed may differ: other replies of the same kind.
    """

    def comparable(results: Results) -> dict[str, Any]:
        questions = {name: found["questions_sha256"] for name, found in results.facts["questions"].items()}
        protocol = {name: value for name, value in results.facts["protocol"].items() if name != "seed"}
        return {"protocol": protocol, "questions_sha256": questions}

    return differences(comparable(a), comparable(b))


def _compare_set(a: Results, b: Results, name: str) -> list[Comparison]:
    ours, theirs = a.correct(name), b.correct(name)
    common = [key for key in ours if key in theirs]
    if not common:
        return []
    n = min(a.num_samples, b.num_samples)
    before, after = (estimates_of(results.facts["sets"][name], results.num_samples) for results in (a, b))
    lines = []
    for k in powers_of_two(n):
        gains = [pass_at_k(b.num_samples, theirs[key], k) - pass_at_k(a.num_samples, ours[key], k) for key in common]
        lines.append(_line(name, f"pass@{k}", before, after, gains))
    if a.num_samples == b.num_samples:
        of_a, of_b = a.majority(name), b.majority(name)
        lines.append(_line(name, f"maj@{n}", before, after, [of_b[key] - of_a[key] for key in common]))
    return lines


def _line(
    name: str, metric: str, before: Mapping[str, Estimate], after: Mapping[str, Estimate], gains: Sequence[float]
) -> Comparison:
    difference = Estimate(**mean_with_interval(gains))
    return Comparison(name, len(gains), metric, before[metric], after[metric], difference)


def read_results(folder: Path) -> Results:
    """What an evaluation left in its folder.

    Raises: ConfigError if there is no whole evaluation.
    """
    path = folder / RESULTS if folder.is_dir() else folder
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return Results(path.parent.name, {name: facts[name] for name in ("model", "protocol", "questions", "sets")})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the result of an evaluation ({type(error).__name__}); give a folder that a finished "
            f"`python -m expo.evaluate` wrote"
        ) from error


def _labelled(a: Results, b: Results) -> dict[str, Results]:
    return {f"A: {a.label}": a, f"B: {b.label}": b}


def draw(a: Results, b: Results, lines: Sequence[Comparison]) -> list[RenderedFigure]:
    """pass@k over k of both, a picture for each set."""
    pictures = []
    for name in dict.fromkeys(line.set_name for line in lines):
        curves = {}
        for label, results in _labelled(a, b).items():
            found = [pass_at(results.facts["sets"][name], k) for k in range(1, results.num_samples + 1)]
            curves[label] = [estimate for estimate in found if estimate is not None]
        pictures.append(draw_curves(name, curves))
    return pictures


def render(a: Results, b: Results, lines: Sequence[Comparison], figures: Sequence[RenderedFigure]) -> str:
    """The page as HTML text."""
    shares = {
        f"{name}, {label}": ", ".join(f"{found[f'{share}_fraction']:.1%} {share}" for share in SHARES)
        for label, results in _labelled(a, b).items()
        for name, found in results.facts["sets"].items()
    }
    models = {label: results.facts["model"] for label, results in _labelled(a, b).items()}
    return render_template(
        "compare.html.j2",
        title=f"{a.label} and {b.label} · EXPO evaluations",
        label_a=a.label,
        label_b=b.label,
        other_differences=incomparable(a, b),
        scores=comparison_table(lines, "Set", ("Metric", "A", "B", "Difference")),
        figures=figures,
        reply_shares=shares,
        protocol={**models, **a.facts["protocol"]},
    )


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes the page: 0, or 2 if the two cannot be compared."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="B - A, question by question, with 95 % intervals, and pass@k curves as a page."
    )
    parser.add_argument("a", metavar="A", type=Path, help="folder of results")
    parser.add_argument("b", metavar="B", type=Path, help="folder of results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for compare.html and pictures (default: B)")
    parser.add_argument("--anyway", action="store_true", help="compare even if protocols or questions differ")
    given = parser.parse_args(list(argv))
    try:
        a, b = read_results(given.a), read_results(given.b)
        lines = compare(a, b, anyway=given.anyway)
    except ConfigError as error:
        fail(PROGRAM, error)
    heads = ("set", "questions", "metric", "A [95 %]", "B [95 %]", "B - A [95 %]")
    sys.stdout.write(text_table(heads, [table_cells(line) for line in lines]) + "\n")
    out = given.out or given.b
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(a, b, lines)
    for picture in pictures:
        assert picture.png is not None
        write_bytes_whole(out / f"{picture.name}.png", picture.png)
    write_bytes_whole(out / "compare.html", render(a, b, lines, pictures).encode())
    sys.stdout.write(f"page: {out / 'compare.html'}\n")
    return 0
