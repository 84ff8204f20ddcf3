"""Rows of results to Markdown tables: a cell without a number in the JSON cannot be."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.contenders import OURS
from benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, TINY

Row = dict[str, Any]
CLEARLY = 1.02  # a peer's number counts as better where ours is more than this many times it
EAGER, LIGER = "eager log_softmax", "Liger fused linear"
SHAPE_NAMES = {shape.name for shape in (TINY, *CPU_SHAPES, *GPU_SHAPES)}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each case, in order; those that only say why something did not run stay among them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def least(row: Row, part: str = "both") -> float:
    """Least milliseconds of all rounds."""
    return min(row["ms"][part])


def paired(row: Row) -> list[float]:
    """Each round's time over that of the floor in it."""
    return [ms / floor for ms, floor in zip(row["ms"]["both"], row["floor_ms"], strict=True)]


@dataclass(frozen=True)
class Spread:
    """A median and the 20th and 80th percentiles around it."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = quantiles(values, n=5, method="inclusive")
    return Spread(median(values), fifths[0], fifths[-1])


def time_ratio(ours: Row, other: Row) -> Spread:
    """Our time over another's, round by round of those that they shared."""
    return spread([mine / its for mine, its in zip(ours["ms"]["both"], other["ms"]["both"], strict=True)])


def measured(rows: Iterable[Row]) -> list[Row]:
    """Those that ran."""
    return [row for row in rows if "ms" in row]


def ours_of(rows: Iterable[Row]) -> Row:
    """Our row among those of one case."""
    return next(row for row in rows if row["contender"] == OURS)


def number(value: float | None, digits: int = 3) -> str:
    """To `digits` significant digits, thousands grouped; "" where there is none."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def error(value: float | None) -> str:
    """An error in two digits."""
    return "" if value is None else f"{value:.1e}"


def notes(rows: Iterable[Row]) -> str:
    """What did not run, and why."""
    said = list(dict.fromkeys(f"{row['contender']}: {row['note']}" for row in rows if "note" in row))
    return f"Not measured here: {'; '.join(said)}." if said else ""


# --- the loss


def loss_table(rows: Sequence[Row]) -> str:
    """One case of the loss: time, memory and error of every contender."""
    ran = measured(rows)
    ours = ours_of(ran)
    header = ["", "ms, least", "median", "forward", "backward", "x floor", "ours/it", "MiB", "ours/it"]
    lines = []
    for row in ran:
        lines.append(
            [
                row["contender"],
                number(least(row)),
                *(number(median(row["ms"][part])) for part in ("both", "forward", "backward")),
                f"{median(paired(row)):.2f}",
                beside(ours, row),
                number(row["extra_peak_mib"]),
                ratio(ours["extra_peak_mib"], row["extra_peak_mib"]),
                *(error(row["errors"].get(name)) for name in ("logps", "grad_hidden", "grad_weight")),
            ]
        )
    table = markdown([*header, "log-prob", "dHidden", "dWeight"], lines)
    gradients = f"of the memory {number(sum(ours['gradients_mib'].values()))} MiB are the gradients themselves"
    return f"{table}\n\nRounds: {len(ours['ms']['both'])}; {gradients}."


def beside(ours: Row, row: Row) -> str:
    """Our time over a row's; "" for our own."""
    return "" if row is ours else str(time_ratio(ours, row))


def ratio(ours: float | None, other: float | None) -> str:
    """Ours over another's; "" where one is missing."""
    return "" if not ours or not other else f"{ours / other:.2f}"


@dataclass(frozen=True)
class Measure:
    """A number in which a peer may be better: the smaller, the better.

    value_of: of a row; None where it has none.
    text: how it is printed.
    ratio_of: ours over a peer's; None: the quotient of the values.
    """

    name: str
    value_of: Callable[[Row], float | None]
    text: Callable[[float | None], str]
    ratio_of: Callable[[Row, Row], float] | None = None


def error_measure(name: str, title: str) -> Measure:
    """An error against float64."""
    return Measure(f"error of {title}", lambda row: row["errors"].get(name), error)


TIME = Measure("ms, median", lambda row: median(row["ms"]["both"]), number, lambda o, r: time_ratio(o, r).middle)
MEMORY = Measure("MiB", lambda row: row["extra_peak_mib"], number)
ERRORS = (
    error_measure("logps", "log-probs, nats"),
    error_measure("grad_hidden", "dHidden"),
    error_measure("grad_weight", "dWeight"),
)
# by table: every number of it that a peer has too
MEASURES: dict[str, tuple[Measure, ...]] = {
    "loss": (TIME, MEMORY, *ERRORS),
    "chunks": (TIME, MEMORY, *ERRORS),
    "growth": (TIME, MEMORY, *ERRORS),
    "logps": (TIME, ERRORS[0], error_measure("entropies", "entropies, nats")),
    "rows": (TIME, error_measure("gradient", "the gradient")),
    "curriculum": (TIME,),
    "verifier": (TIME,),
    "step": (),  # of seconds by phase
}
PHASES = ("rollout", "reference", "reward", "step")


def is_ours(row: Row) -> bool:
    """Whether a row is of this project, by whichever of its functions."""
    return bool(row["contender"].startswith("expo"))


def better_peers(name: str, rows: Sequence[Row]) -> list[str]:
    """A line for every number of a table in which something else is better than ours, the first that is ours."""
    if name == "step":
        return _faster_phases(rows)
    lines = []
    for label, group in by_point(measured(rows)).items():
        ours = next(row for row in group if is_ours(row))
        for measure in MEASURES[name]:
            beaten_by = [
                f"{row['contender']} {measure.text(measure.value_of(row))}"
                for row in group
                if (found := _ours_over(measure, ours, row)) is not None and found > CLEARLY
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
        f"- {phase}, seconds, median: ours {number(ours)}; {names[1]} {number(other)}"
        for phase, (ours, other) in medians.items()
        if ours > CLEARLY * other
    ]


def _ours_over(measure: Measure, ours: Row, row: Row) -> float | None:
    mine, its = measure.value_of(ours), measure.value_of(row)
    if row is ours or mine is None or its is None:
        return None
    if measure.ratio_of is not None:
        return measure.ratio_of(ours, row)
    return mine / its if its else (math.inf if mine else 1.0)


def by_point(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that are compared with each other: of one case, and of one size where a case has several."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        label = row["case"]
        if "questions" in row:
            label = f"{label}, {row['questions']:,} questions"
        elif "settings" in row and row["case"] in ("N", "V"):
            label = f"along {row['case']}, {row['settings']['shape']['name']}"
        found.setdefault(label, []).append(row)
    return found


def summary_table(rows: Sequence[Row]) -> str:
    """The plain cases in short: least milliseconds, our time over it, and MiB of each contender."""
    groups = list(by_case(measured(rows)).values())
    dtype = groups[0][0]["settings"]["dtype"]
    cases = [group for group in groups if _is_plain(group[0]["settings"]) and group[0]["settings"]["dtype"] == dtype]
    names = list(dict.fromkeys(row["contender"] for group in cases for row in measured(group)))

    def cell(name: str, group: list[Row]) -> str:
        row, ours = next((row for row in measured(group) if row["contender"] == name), None), ours_of(group)
        if row is None:
            return ""
        beside = "" if row is ours else f" ({time_ratio(ours, row).middle:.2f})"
        return f"{number(least(row))} ms{beside}, {number(row['extra_peak_mib'])} MiB"

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


# --- the rest


def timed_table(rows: Sequence[Row]) -> str:
    """Cases that have a time, a floor and errors."""
    names = list(dict.fromkeys(name for row in measured(rows) for name in row["errors"]))
    ours = ours_of(measured(rows))
    lines = [
        [
            row["contender"],
            number(least(row)),
            number(median(row["ms"]["both"])),
            f"{median(paired(row)):.2f}",
            beside(ours, row),
            *(error(row["errors"].get(name)) for name in names),
        ]
        for row in measured(rows)
    ]
    return markdown(["", "ms, least", "median", "x floor", "ours/it", *(f"error of {name}" for name in names)], lines)


def rows_table(rows: Sequence[Row]) -> str:
    """The loss on ready logits: GB/s, counting two reads and one write of every logit, beside a copy's."""
    ours = ours_of(rows)
    lines = [
        [
            row["contender"],
            number(least(row)),
            beside(ours, row),
            number(bandwidth(row)),
            number(copy_bandwidth(row)),
            error(row["errors"]["gradient"]),
        ]
        for row in measured(rows)
    ]
    return markdown(["", "ms, least", "ours/it", "GB/s", "a copy's GB/s", "error of the gradient"], lines)


def bandwidth(row: Row) -> float:
    """GB/s of the loss on ready logits."""
    return 3e-6 * float(row["num_bytes"]) / least(row)


def copy_bandwidth(row: Row) -> float:
    """GB/s of the copy that ran beside it."""
    return 2e-6 * float(row["num_bytes"]) / min(row["floor_ms"])


def chunks_table(rows: Sequence[Row]) -> str:
    """Time and memory by the size of a chunk, beside eager PyTorch's and the default's."""
    ran = measured(rows)
    default, eager = ours_of(ran), next(row for row in ran if row["contender"] == EAGER)
    lines = [
        [
            row["contender"],
            number(least(row)),
            number(median(row["ms"]["both"])),
            str(time_ratio(row, default)),
            str(time_ratio(row, eager)),
            number(row["extra_peak_mib"]),
            ratio(row["extra_peak_mib"], eager["extra_peak_mib"]),
        ]
        for row in ran
    ]
    table = markdown(["", "ms, least", "median", "it/default", "it/eager", "MiB", "it/eager"], lines)
    return f"{ran[0]['case']}; rounds: {len(default['ms']['both'])}.\n\n{table}"


def growth_table(rows: Sequence[Row]) -> str:
    """Log-log slopes of time and memory along N and V, with what they were fitted to."""
    lines = []
    for series, group in by_case(measured(rows)).items():
        for name in dict.fromkeys(row["contender"] for row in group):
            points = [row for row in group if row["contender"] == name]
            sizes, memory = [along(series, row) for row in points], [row["extra_peak_mib"] for row in points]
            times = [median(row["ms"]["both"]) for row in points]
            lines.append([f"{name}, along {series}", _span(sizes), _span(times), str(time_slope(series, points))])
            if all(memory):
                beyond = [mib_beyond_hidden(row) for row in points]
                lines[-1] += [_span(memory), number(slope(sizes, memory)), _span(beyond)]
    return markdown(["", "from ... to", "ms, median", "slope", "MiB", "slope", "MiB beyond dHidden"], lines)


def time_slope(series: str, points: Sequence[Row]) -> Spread:
    """Of the slopes of time that each round gives; in a round all points ran."""
    sizes = [along(series, row) for row in points]
    return spread([slope(sizes, times) for times in zip(*(row["ms"]["both"] for row in points), strict=True)])


def mib_beyond_hidden(row: Row) -> float:
    """Extra peak memory but for dHidden, which every contender hands out."""
    return float(row["extra_peak_mib"] - row["gradients_mib"]["hidden"])


def along(series: str, row: Row) -> float:
    """The size that a series varies."""
    shape = row["settings"]["shape"]
    return float(shape["vocab_size"] if series == "V" else shape["num_sequences"] * shape["length"])


def _span(values: Sequence[float]) -> str:
    return f"{number(values[0])} ... {number(values[-1])}"


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log(values) over log(sizes): 1 where cost is proportional to size."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - mean_x) ** 2 for x in xs)


def steadiness_table(rows: Sequence[Row]) -> str:
    """What was compiled and waited for while beta changed."""
    counts = {"graphs at the first step": "first_graphs", "graphs after it": "graphs"}
    counts |= {"Triton binaries after it": "binaries", "waits for the device": "waits"}
    counts = {title: name for title, name in counts.items() if any(name in row for row in rows)}
    lines = [
        [f"{row['contender']}, {row['case']} changing", *(str(row.get(name, "")) for name in counts.values())]
        for row in rows
    ]
    return markdown([f"{rows[0]['steps']} steps", *counts], lines)


def curriculum_table(rows: Sequence[Row]) -> str:
    """Milliseconds by number of questions."""
    sizes = sorted({row["questions"] for row in rows})
    kinds = list(dict.fromkeys((row["case"], row["contender"]) for row in rows))

    def line(case: str, name: str) -> list[str]:
        found = {row["questions"]: row for row in measured(rows) if (row["case"], row["contender"]) == (case, name)}
        cells = [number(least(found[size])) if size in found else "" for size in sizes]
        grows = number(slope(list(found), [least(row) for row in found.values()])) if len(found) > 1 else ""
        return [f"{case}, {name}", *cells, grows]

    return markdown(["ms, least", *(f"{size:,}" for size in sizes), "slope"], [line(*kind) for kind in kinds])


def verifier_table(rows: Sequence[Row]) -> str:
    """Replies per second."""
    kinds = list(by_case(rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))

    def rate(name: str, kind: str) -> str:
        row = next((row for row in measured(rows) if (row["contender"], row["case"]) == (name, kind)), None)
        return "" if row is None else number(1e3 * row["replies"] / median(row["ms"]["both"]))

    return markdown(["replies a second", *kinds], [[name, *(rate(name, kind) for kind in kinds)] for name in names])


def step_table(rows: Sequence[Row]) -> str:
    """Seconds of a step by phase, medians over all steps, and the ratio of each pair of runs."""
    names, phases = list(dict.fromkeys(row["contender"] for row in rows)), PHASES

    def middle(name: str, phase: str) -> float:
        return median(row["seconds"][phase] for row in rows if row["contender"] == name)

    lines = []
    for name in names:
        others = middle(name, "step") - sum(middle(name, phase) for phase in phases[:-1])
        rate = middle(name, "reply_tokens") / middle(name, "step")
        lines.append([name, *(number(middle(name, phase)) for phase in phases), number(others), number(rate)])
    table = markdown(["seconds", *phases[:-1], "whole step", "update and the rest", "reply tokens/s"], lines)
    ratios = ", ".join(f"{value:.2f}" for value in step_ratios(rows))
    text = f"{table}\n\n{names[0]} over {names[1]}, one pair of runs after the other: {ratios}."
    if "errors" in rows[0]:
        norm, update = (error(rows[0]["errors"][name]) for name in ("grad_norm", "update"))
        text += f" On the same replies their first updates differ by {update} of their length, the gradients' norms by"
        text += f" {norm}."
    return text


def step_ratios(rows: Sequence[Row]) -> list[float]:
    """Our median step over the other's, by pair of runs."""
    ours, other = dict.fromkeys(row["contender"] for row in rows)

    def middle(name: str, pair: int) -> float:
        return median(row["seconds"]["step"] for row in rows if (row["contender"], row["pair"]) == (name, pair))

    return [middle(ours, pair) / middle(other, pair) for pair in sorted({row["pair"] for row in rows})]
