"""Markdown tables from rows of results; every number comes from the JSON files."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.contenders import OURS
from benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, TINY

Row = dict[str, Any]
BETTER_BY = 1.02  # a peer's number is listed as better if ours is more than this factor larger
EAGER, LIGER = "eager log_softmax", "Liger fused linear"
SHAPE_NAMES = {shape.name for shape in (TINY, *CPU_SHAPES, *GPU_SHAPES)}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns except the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_section(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between two marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each case, in order, including those that only state why a contender did not run."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def best_ms(row: Row, part: str = "both") -> float:
    """The smallest time of all rounds, in milliseconds."""
    return min(row["ms"][part])


def floor_ratios(row: Row) -> list[float]:
    """The time of each round relative to the floor's time in that round."""
    return [ms / floor for ms, floor in zip(row["ms"]["both"], row["floor_ms"], strict=True)]


@dataclass(frozen=True)
class Spread:
    """The median and the 20th and 80th percentiles."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = quantiles(values, n=5, method="inclusive")
    return Spread(median(values), fifths[0], fifths[-1])


def time_ratio(ours: Row, other: Row) -> Spread:
    """Our time relative to another's, over the rounds that both ran in."""
    return spread([our_ms / other_ms for our_ms, other_ms in zip(ours["ms"]["both"], other["ms"]["both"], strict=True)])


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows of contenders that ran."""
    return [row for row in rows if "ms" in row]


def ours_of(rows: Iterable[Row]) -> Row:
    """Our row of one case."""
    return next(row for row in rows if row["contender"] == OURS)


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits and grouped thousands; "" for None."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def error(value: float | None) -> str:
    """An error with two significant digits; "" for None."""
    return "" if value is None else f"{value:.1e}"


def notes(rows: Iterable[Row]) -> str:
    """The contenders that did not run, and why."""
    texts = list(dict.fromkeys(f"{row['contender']}: {row['note']}" for row in rows if "note" in row))
    return f"Not measured here: {'; '.join(texts)}." if texts else ""


# --- the loss


def loss_table(rows: Sequence[Row]) -> str:
    """Time, memory and errors of every contender in one case of the loss."""
    ran = measured(rows)
    ours = ours_of(ran)
    header = ["", "best ms", "median ms", "forward", "backward", "x floor", "ours / theirs", "MiB", "ours / theirs"]
    lines = []
    for row in ran:
        lines.append(
            [
                row["contender"],
                number(best_ms(row)),
                *(number(median(row["ms"][part])) for part in ("both", "forward", "backward")),
                f"{median(floor_ratios(row)):.2f}",
                ratio_to(ours, row),
                number(row["extra_peak_mib"]),
                ratio(ours["extra_peak_mib"], row["extra_peak_mib"]),
                *(error(row["errors"].get(name)) for name in ("logps", "grad_hidden", "grad_weight")),
            ]
        )
    table = markdown([*header, "log-prob", "dHidden", "dWeight"], lines)
    gradients = f"the memory includes {number(sum(ours['gradients_mib'].values()))} MiB of gradients"
    return f"{table}\n\n{len(ours['ms']['both'])} rounds; {gradients}."


def tolerance_table(rows: Sequence[Row]) -> str:
    """Time, memory, columns kept, errors and their bound of every contender in one case with a gradient tolerance."""
    lines = [
        [
            row["contender"],
            number(median(row["ms"]["both"])),
            str(spread(floor_ratios(row))),
            number(row["extra_peak_mib"]),
            f"{100 * row['kept_columns']:.1f} %" if "kept_columns" in row else "",
            error(row.get("gradient_error_bound")),
            *(error(row["errors"].get(name)) for name in ("grad_hidden", "grad_weight", "logps")),
        ]
        for row in measured(rows)
    ]
    return markdown(["", "ms", "x floor", "MiB", "columns", "bound", "dHidden", "dWeight", "log-prob"], lines)


def ratio_to(ours: Row, row: Row) -> str:
    """Our time / theirs as text; "" for our own row."""
    return "" if row is ours else str(time_ratio(ours, row))


def ratio(ours: float | None, other: float | None) -> str:
    """Our value / another's as text; "" if one is missing."""
    return "" if not ours or not other else f"{ours / other:.2f}"


@dataclass(frozen=True)
class Measure:
    """A number that is compared with peers; smaller is better.

    value_of: the value of a row, or None.
    text: formats a value.
    ratio_of: our row relative to a peer's row; None for the quotient of the values.
    """

    name: str
    value_of: Callable[[Row], float | None]
    text: Callable[[float | None], str]
    ratio_of: Callable[[Row, Row], float] | None = None


def error_measure(name: str, title: str) -> Measure:
    """The error against float64 that rows store as `name`."""
    return Measure(f"error of {title}", lambda row: row["errors"].get(name), error)


TIME = Measure("median ms", lambda row: median(row["ms"]["both"]), number, lambda o, r: time_ratio(o, r).middle)
MEMORY = Measure("MiB", lambda row: row["extra_peak_mib"], number)
ERRORS = (
    error_measure("logps", "log-probs, nats"),
    error_measure("grad_hidden", "dHidden"),
    error_measure("grad_weight", "dWeight"),
)
# by table: the measures that are compared with peers
MEASURES: dict[str, tuple[Measure, ...]] = {
    "loss": (TIME, MEMORY, *ERRORS),
    "chunks": (TIME, MEMORY, *ERRORS),
    "growth": (TIME, MEMORY, *ERRORS),
    "logps": (TIME, ERRORS[0], error_measure("entropies", "entropies, nats")),
    "rows": (TIME, error_measure("gradient", "the gradient")),
    "curriculum": (TIME,),
    "verifier": (TIME,),
    "step": (),  # compared by phase
}
PHASES = ("rollout", "reference", "reward", "step")


def is_ours(row: Row) -> bool:
    """Whether a row is of this project."""
    return bool(row["contender"].startswith("expo"))


def better_peers(name: str, rows: Sequence[Row]) -> list[str]:
    """A line for every measure in which a peer is better than our first row."""
    if name == "step":
        return _faster_phases(rows)
    lines = []
    for label, group in by_point(measured(rows)).items():
        ours = next(row for row in group if is_ours(row))
        for measure in MEASURES[name]:
            beaten_by = [
                f"{row['contender']} {measure.text(measure.value_of(row))}"
                for row in group
                if (factor := _our_factor(measure, ours, row)) is not None and factor > BETTER_BY
            ]
            if beaten_by:
                lines.append(
                    f"- {label}, {measure.name}: ours {measure.text(measure.value_of(ours))}; {', '.join(beaten_by)}"
                )
    return lines


def _faster_phases(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["contender"] for row in rows))
    medians = {
        phase: [median(row["seconds"][phase] for row in rows if row["contender"] == name) for name in names]
        for phase in PHASES
    }
    return [
        f"- {phase}, median seconds: ours {number(ours)}; {names[1]} {number(other)}"
        for phase, (ours, other) in medians.items()
        if ours > BETTER_BY * other
    ]


def _our_factor(measure: Measure, ours: Row, row: Row) -> float | None:
    our_value, other_value = measure.value_of(ours), measure.value_of(row)
    if row is ours or our_value is None or other_value is None:
        return None
    if measure.ratio_of is not None:
        return measure.ratio_of(ours, row)
    return our_value / other_value if other_value else (math.inf if our_value else 1.0)


def by_point(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows that are compared with each other: of the same case and, if a case has several, the same size."""
    points: dict[str, list[Row]] = {}
    for row in rows:
        label = row["case"]
        if "questions" in row:
            label = f"{label}, {row['questions']:,} questions"
        elif "settings" in row and row["case"] in ("N", "V"):
            label = f"along {row['case']}, {row['settings']['shape']['name']}"
        points.setdefault(label, []).append(row)
    return points


def summary_table(rows: Sequence[Row]) -> str:
    """Best time, our time / theirs, and memory of each contender in the cases without variations."""
    groups = list(by_case(measured(rows)).values())
    dtype = groups[0][0]["settings"]["dtype"]
    cases = [group for group in groups if _is_plain(group[0]["settings"]) and group[0]["settings"]["dtype"] == dtype]
    names = list(dict.fromkeys(row["contender"] for group in cases for row in measured(group)))

    def cell(name: str, group: list[Row]) -> str:
        row, ours = next((row for row in measured(group) if row["contender"] == name), None), ours_of(group)
        if row is None:
            return ""
        ratio_text = "" if row is ours else f" ({time_ratio(ours, row).middle:.2f})"
        return f"{number(best_ms(row))} ms{ratio_text}, {number(row['extra_peak_mib'])} MiB"

    return markdown(
        ["", *(_size(group[0]["settings"]["shape"]) for group in cases)],
        [[name, *(cell(name, group) for group in cases)] for name in names],
    )


def _is_plain(settings: Row) -> bool:
    is_varied = settings["active_share"] != 1 or settings["frozen_head"] or settings["ratio"] != "token"
    return settings["shape"]["name"] in SHAPE_NAMES and not is_varied


def _size(shape: Row) -> str:
    num_tokens = shape["num_sequences"] * shape["length"]
    return f"N = {num_tokens:,}, H = {shape['hidden_size']:,}, V = {shape['vocab_size']:,}"


# --- other tables


def timed_table(rows: Sequence[Row]) -> str:
    """The table of a case with times, a floor and errors."""
    names = list(dict.fromkeys(name for row in measured(rows) for name in row["errors"]))
    ours = ours_of(measured(rows))
    lines = [
        [
            row["contender"],
            number(best_ms(row)),
            number(median(row["ms"]["both"])),
            f"{median(floor_ratios(row)):.2f}",
            ratio_to(ours, row),
            *(error(row["errors"].get(name)) for name in names),
        ]
        for row in measured(rows)
    ]
    return markdown(
        ["", "best ms", "median ms", "x floor", "ours / theirs", *(f"error of {name}" for name in names)], lines
    )


def chunks_table(rows: Sequence[Row]) -> str:
    """Time and memory by chunk size, relative to the default and to eager PyTorch."""
    ran = measured(rows)
    default, eager = ours_of(ran), next(row for row in ran if row["contender"] == EAGER)
    lines = [
        [
            row["contender"],
            number(best_ms(row)),
            number(median(row["ms"]["both"])),
            str(time_ratio(row, default)),
            str(time_ratio(row, eager)),
            number(row["extra_peak_mib"]),
            ratio(row["extra_peak_mib"], eager["extra_peak_mib"]),
        ]
        for row in ran
    ]
    table = markdown(["", "best ms", "median ms", "time / default", "time / eager", "MiB", "MiB / eager"], lines)
    return f"{ran[0]['case']}; {len(default['ms']['both'])} rounds.\n\n{table}"


def growth_table(rows: Sequence[Row]) -> str:
    """Log-log slopes of time and memory along N and V, and the ranges of the fitted values."""
    lines = []
    for series, group in by_case(measured(rows)).items():
        for name in dict.fromkeys(row["contender"] for row in group):
            points = [row for row in group if row["contender"] == name]
            sizes, memory = [along(series, row) for row in points], [row["extra_peak_mib"] for row in points]
            times = [median(row["ms"]["both"]) for row in points]
            lines.append([f"{name}, along {series}", _span(sizes), _span(times), str(time_slope(series, points))])
            if all(memory):
                without_hidden = [mib_without_hidden(row) for row in points]
                lines[-1] += [_span(memory), number(slope(sizes, memory)), _span(without_hidden)]
    return markdown(["", "sizes", "median ms", "slope", "MiB", "slope", "MiB without dHidden"], lines)


def time_slope(series: str, points: Sequence[Row]) -> Spread:
    """The spread of the slopes of time of all rounds; every point ran in every round."""
    sizes = [along(series, row) for row in points]
    return spread([slope(sizes, times) for times in zip(*(row["ms"]["both"] for row in points), strict=True)])


def mib_without_hidden(row: Row) -> float:
    """Extra peak memory without dHidden, which every contender returns."""
    return float(row["extra_peak_mib"] - row["gradients_mib"]["hidden"])


def along(series: str, row: Row) -> float:
    """The size that a series varies."""
    shape = row["settings"]["shape"]
    return float(shape["vocab_size"] if series == "V" else shape["num_sequences"] * shape["length"])


def _span(values: Sequence[float]) -> str:
    return f"{number(values[0])} ... {number(values[-1])}"


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log(values) over log(sizes): 1 if values are proportional to sizes."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - mean_x) ** 2 for x in xs)


def steadiness_table(rows: Sequence[Row]) -> str:
    """Compilations and synchronizations while beta changed."""
    counts = {"graphs in the first step": "first_graphs", "graphs in later steps": "graphs"}
    counts |= {"Triton binaries in later steps": "binaries", "device synchronizations": "waits"}
    counts = {title: name for title, name in counts.items() if any(name in row for row in rows)}
    lines = [
        [f"{row['contender']}, varying {row['case']}", *(str(row.get(name, "")) for name in counts.values())]
        for row in rows
    ]
    return markdown([f"{rows[0]['steps']} steps", *counts], lines)


def curriculum_table(rows: Sequence[Row]) -> str:
    """Milliseconds by number of questions."""
    sizes = sorted({row["questions"] for row in rows})
    kinds = list(dict.fromkeys((row["case"], row["contender"]) for row in rows))

    def line(case: str, name: str) -> list[str]:
        by_size = {row["questions"]: row for row in measured(rows) if (row["case"], row["contender"]) == (case, name)}
        cells = [number(best_ms(by_size[size])) if size in by_size else "" for size in sizes]
        fitted = number(slope(list(by_size), [best_ms(row) for row in by_size.values()])) if len(by_size) > 1 else ""
        return [f"{case}, {name}", *cells, fitted]

    return markdown(["best ms", *(f"{size:,}" for size in sizes), "slope"], [line(*kind) for kind in kinds])


def verifier_table(rows: Sequence[Row]) -> str:
    """Replies per second."""
    kinds = list(by_case(rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))

    def rate(name: str, kind: str) -> str:
        row = next((row for row in measured(rows) if (row["contender"], row["case"]) == (name, kind)), None)
        return "" if row is None else number(1e3 * row["replies"] / median(row["ms"]["both"]))

    return markdown(["replies per second", *kinds], [[name, *(rate(name, kind) for kind in kinds)] for name in names])


def step_table(rows: Sequence[Row]) -> str:
    """Median seconds of a step by phase, and the ratio of each pair of runs."""
    names, phases = list(dict.fromkeys(row["contender"] for row in rows)), PHASES

    def middle(name: str, phase: str) -> float:
        return median(row["seconds"][phase] for row in rows if row["contender"] == name)

    lines = []
    for name in names:
        others = middle(name, "step") - sum(middle(name, phase) for phase in phases[:-1])
        rate = middle(name, "reply_tokens") / middle(name, "step")
        lines.append([name, *(number(middle(name, phase)) for phase in phases), number(others), number(rate)])
    table = markdown(["seconds", *phases[:-1], "step", "update and other", "reply tokens/s"], lines)
    ratios = ", ".join(f"{value:.2f}" for value in step_ratios(rows))
    text = f"{table}\n\nTime of {names[0]} / {names[1]} by pair of runs: {ratios}."
    if "errors" in rows[0]:
        norm, update = (error(rows[0]["errors"][name]) for name in ("grad_norm", "update"))
        text += f" On the same replies the relative difference of the first updates is {update}, that of the gradient"
        text += f" norms {norm}."
    return text


def step_ratios(rows: Sequence[Row]) -> list[float]:
    """Our median step time / the other's, by pair of runs."""
    ours, other = dict.fromkeys(row["contender"] for row in rows)

    def middle(name: str, pair: int) -> float:
        return median(row["seconds"]["step"] for row in rows if (row["contender"], row["pair"]) == (name, pair))

    return [middle(ours, pair) / middle(other, pair) for pair in sorted({row["pair"] for row in rows})]
