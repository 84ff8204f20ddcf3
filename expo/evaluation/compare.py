"""Compares two evaluations of the same questions: `python -m expo.evaluate compare A B`.

The interval of a difference B - A is that of the paired differences over questions (`expo.evaluation.intervals`), so
the spread of the questions' difficulty does not widen it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo.errors import ConfigError, FolderError, first_line
from expo.evaluation.intervals import difference_with_interval
from expo.evaluation.protocol import RESULTS, differences
from expo.evaluation.scores import pass_at_k, powers_of_two
from expo.evaluation.tables import estimates_of, fractions_text
from expo.reporting.comparison import Comparison, Estimate, comparison_text, pass_at
from expo.reporting.figures import RenderedFigure, draw_curves
from expo.reporting.templates import comparison_table
from expo.reporting.templates import render as render_template
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.endings import errors_on_one_line
from expo.runtime.parser import OneLineParser
from expo.runtime.stdout import write_stdout

PROGRAM = "python -m expo.evaluate compare"
SAME = 1e-9  # between scores of a question that are equal but for rounding


@dataclass(frozen=True)
class Results:
    """The content of a results.json, and the name of its folder."""

    label: str
    content: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """n, replies per question."""
        return int(self.content["protocol"]["num_samples"])

    def correct(self, name: str) -> dict[str, int]:
        """c, the number of correct replies, of every question of a set by its id."""
        return {question["id"]: question["correct"] for question in self.content["sets"][name]["questions"]}

    def majority(self, name: str) -> dict[str, float]:
        """The majority vote's score on every question of a set by its id."""
        return {question["id"]: question["majority"] for question in self.content["sets"][name]["questions"]}


def compare(a: Results, b: Results, *, anyway: bool = False) -> list[Comparison]:
    """pass@k at powers of two and maj@n of every set in both: of A, of B, and B - A over the questions in both.

    Args:
        anyway: compare although protocols or questions differ. Differences then cover the questions in both; the
            columns of A and B still cover all their questions.

    Raises: ConfigError if A and B share no questions, or differ in more than the model.
    """
    differing = incomparable(a, b)
    if differing and not anyway:
        raise ConfigError(
            f"A and B differ in more than the model: {', '.join(differing)}; repeat one of the evaluations, or add "
            f"--anyway"
        )
    names = [name for name in a.content["sets"] if name in b.content["sets"]]
    lines = [line for name in names for line in _compare_set(a, b, name)]
    if not lines:
        raise ConfigError("A and B have no question in common; compare evaluations of the same sets")
    return lines


def incomparable(a: Results, b: Results) -> list[str]:
    """The differences between two evaluations beside the model: settings, sets, and checksums of the questions.

    Seeds may differ: they change the sampled replies, not their distribution.
    """

    def comparable(results: Results) -> dict[str, Any]:
        questions = {name: metadata["questions_sha256"] for name, metadata in results.content["questions"].items()}
        protocol = {name: value for name, value in results.content["protocol"].items() if name != "seed"}
        return {"protocol": protocol, "questions_sha256": questions}

    return differences(comparable(a), comparable(b))


def _compare_set(a: Results, b: Results, name: str) -> list[Comparison]:
    correct_a, correct_b = a.correct(name), b.correct(name)
    common = [question_id for question_id in correct_a if question_id in correct_b]
    if not common:
        return []
    n = min(a.num_samples, b.num_samples)
    before, after = (estimates_of(results.content["sets"][name], results.num_samples) for results in (a, b))
    lines = []
    for k in powers_of_two(n):
        gains = [
            pass_at_k(b.num_samples, correct_b[question_id], k) - pass_at_k(a.num_samples, correct_a[question_id], k)
            for question_id in common
        ]
        lines.append(_line(name, f"pass@{k}", before, after, gains))
    if a.num_samples == b.num_samples:
        majority_a, majority_b = a.majority(name), b.majority(name)
        gains = [majority_b[question_id] - majority_a[question_id] for question_id in common]
        lines.append(_line(name, f"maj@{n}", before, after, gains))
    return lines


def _line(
    name: str, metric: str, before: Mapping[str, Estimate], after: Mapping[str, Estimate], gains: Sequence[float]
) -> Comparison:
    difference = Estimate(**difference_with_interval(gains))
    num_differing = sum(abs(gain) > SAME for gain in gains)
    return Comparison(name, len(gains), metric, before[metric], after[metric], difference, num_differing)


def read_results(folder: Path) -> Results:
    """Reads the results of an evaluation from its folder, or from a results.json.

    Raises: ConfigError if there is no complete evaluation.
    """
    path = folder / RESULTS if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Results(path.parent.name, {name: content[name] for name in ("model", "protocol", "questions", "sets")})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not the result of an evaluation ({type(error).__name__}); give a folder that a finished "
            f"`python -m expo.evaluate` wrote"
        ) from error


def _labelled(a: Results, b: Results) -> dict[str, Results]:
    return {f"A: {a.label}": a, f"B: {b.label}": b}


def draw(a: Results, b: Results, lines: Sequence[Comparison]) -> list[RenderedFigure]:
    """A figure for each set: pass@k of A and of B over k."""
    figures = []
    for name in dict.fromkeys(line.set_name for line in lines):
        curves = {}
        for label, results in _labelled(a, b).items():
            estimates = [pass_at(results.content["sets"][name], k) for k in range(1, results.num_samples + 1)]
            curves[label] = [estimate for estimate in estimates if estimate is not None]
        figures.append(draw_curves(name, curves))
    return figures


def render(a: Results, b: Results, lines: Sequence[Comparison], figures: Sequence[RenderedFigure]) -> str:
    """The page as HTML text."""
    shares = {
        f"{name}, {label}": fractions_text(scores)
        for label, results in _labelled(a, b).items()
        for name, scores in results.content["sets"].items()
    }
    models = {label: results.content["model"] for label, results in _labelled(a, b).items()}
    return render_template(
        "compare.html.j2",
        title=f"{a.label} and {b.label} · EXPO evaluations",
        label_a=a.label,
        label_b=b.label,
        other_differences=incomparable(a, b),
        scores=comparison_table(lines, "Set", ("Metric", "A", "B", "Difference")),
        figures=figures,
        reply_shares=shares,
        protocol={**models, **a.content["protocol"]},
    )


def main(argv: Sequence[str], prog: str = PROGRAM) -> int:
    """Prints the table and writes the page. Exit codes: 0, 1 if the page cannot be written, 2 if A and B cannot be
    compared, 130 after Ctrl-C."""
    parser = OneLineParser(
        prog=prog, description="Paired differences B - A with 95 % intervals, and a page with pass@k curves."
    )
    parser.add_argument("a", metavar="A", type=Path, help="folder of results")
    parser.add_argument("b", metavar="B", type=Path, help="folder of results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for compare.html and its figures (default: B)")
    parser.add_argument("--anyway", action="store_true", help="compare even if protocols or questions differ")
    arguments = parser.parse_args(list(argv))
    with errors_on_one_line(prog):
        try:
            text = _write_comparison(arguments.a, arguments.b, arguments.out or arguments.b, arguments.anyway)
        except OSError as error:
            raise FolderError(f"the comparison cannot be written ({error}); give another folder as --out") from error
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            kind = type(error).__name__
            damaged = f"{arguments.a} or {arguments.b} holds damaged results ({kind}: {first_line(error)})"
            raise ConfigError(f"{damaged}; repeat that evaluation") from error
        write_stdout(text)
    return 0


def _write_comparison(folder_a: Path, folder_b: Path, out: Path, anyway: bool) -> str:
    """Writes the page and its figures to `out`; the table, and the path of the page, as text."""
    a, b = read_results(folder_a), read_results(folder_b)
    lines = compare(a, b, anyway=anyway)
    heads = ("set", "questions", "metric", "A [95 %]", "B [95 %]", "B - A [95 %]")
    table = comparison_text(heads, lines)
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(a, b, lines)
    for figure in figures:
        assert figure.png is not None
        write_bytes_whole(out / f"{figure.name}.png", figure.png)
    write_bytes_whole(out / "compare.html", render(a, b, lines, figures).encode())
    return f"{table}\npage: {out / 'compare.html'}\n"
