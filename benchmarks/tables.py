"""Rows of results to Markdown tables: a cell without a number in the JSON cannot be."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.contenders import OURS

Row = dict[str, Any]
CLEARLY = 1.02  # a peer's number counts as better where ours is more than this many times it


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
    """Each round's time over that of the floor just before it."""
    return [ms / floor for ms, floor in zip(row["ms"]["both"], row["floor_ms"], strict=True)]


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
                f"{median(paired(ours)) / median(paired(row)):.2f}",
                number(row["extra_peak_mib"]),
                ratio(ours["extra_peak_mib"], row["extra_peak_mib"]),
                *(error(row["errors"].get(name)) for name in ("logps", "grad_hidden", "grad_weight")),
            ]
        )
    table = markdown([*header, "log-prob", "dHidden", "dWeight"], lines)
    return f"{table}\n\nOf the memory {number(sum(ours['gradients_mib'].values()))} MiB are the gradients themselves."


def ratio(ours: float | None, other: float | None) -> str:
    """Ours over another's; "" where one is missing."""
    return "" if not ours or not other else f"{ours / other:.2f}"


LOSS_NUMBERS: dict[str, tuple[Callable[[Row], float | None], Callable[[float | None], str]]] = {
    "time over the floor": (lambda row: median(paired(row)), lambda value: f"{value:.2f}"),
    "MiB": (lambda row: row["extra_peak_mib"], number),
    "error of log-probs, nats": (lambda row: row["errors"].get("logps"), error),
    "error of dHidden": (lambda row: row["errors"].get("grad_hidden"), error),
    "error of dWeight": (lambda row: row["errors"].get("grad_weight"), error),
}


def better_peers(rows: Sequence[Row]) -> list[str]:
    """A line for every number in which something else is better than ours."""
    lines = []
    for case, group in by_case(measured(rows)).items():
        ours = ours_of(group)
        for what, (value_of, text) in LOSS_NUMBERS.items():
            mine = value_of(ours)
            beaten_by = [
                f"{row['contender']} {text(value_of(row))}"
                for row in group
                if mine is not None and (value := value_of(row)) is not None and mine > CLEARLY * value
            ]
            if beaten_by:
                lines.append(f"- {case}, {what}: ours {text(mine)}; {', '.join(beaten_by)}")
    return lines


def summary_table(rows: Sequence[Row]) -> str:
    """The plain cases in short: milliseconds and MiB of each contender."""
    cases = [group for group in by_case(rows).values() if "settings" in group[0] and _is_plain(group[0]["settings"])]
    names = list(dict.fromkeys(row["contender"] for group in cases for row in measured(group)))

    def cell(name: str, group: list[Row]) -> str:
        row = next((row for row in measured(group) if row["contender"] == name), None)
        return "" if row is None else f"{number(least(row))} ms, {number(row['extra_peak_mib'])} MiB"

    return markdown(
        ["", *(_size(group[0]["settings"]["shape"]) for group in cases)],
        [[name, *(cell(name, group) for group in cases)] for name in names],
    )


def _is_plain(settings: Row) -> bool:
    return settings["active_share"] == 1 and not settings["frozen_head"] and settings["ratio"] == "token"


def _size(shape: Row) -> str:
    num_tokens = shape["num_sequences"] * shape["length"]
    return f"N = {num_tokens:,}, H = {shape['hidden_size']:,}, V = {shape['vocab_size']:,}"


# --- the rest


def timed_table(rows: Sequence[Row]) -> str:
    """Cases that have a time, a floor and errors."""
    names = list(dict.fromkeys(name for row in measured(rows) for name in row["errors"]))
    lines = [
        [
            row["contender"],
            number(least(row)),
            number(median(row["ms"]["both"])),
            f"{median(paired(row)):.2f}",
            *(error(row["errors"].get(name)) for name in names),
        ]
        for row in measured(rows)
    ]
    return markdown(["", "ms, least", "median", "x floor", *(f"error of {name}" for name in names)], lines)


def rows_table(rows: Sequence[Row]) -> str:
    """The loss on ready logits: GB/s, counting two reads and one write of every logit, beside a copy's."""
    lines = [
        [
            row["contender"],
            number(least(row)),
            number(bandwidth(row)),
            number(copy_bandwidth(row)),
            error(row["errors"]["gradient"]),
        ]
        for row in measured(rows)
    ]
    return markdown(["", "ms, least", "GB/s", "a copy's GB/s", "error of the gradient"], lines)


def bandwidth(row: Row) -> float:
    """GB/s of the loss on ready logits."""
    return 3e-6 * float(row["num_bytes"]) / least(row)


def copy_bandwidth(row: Row) -> float:
    """GB/s of the copy that ran beside it."""
    return 2e-6 * float(row["num_bytes"]) / min(row["floor_ms"])


def growth_table(rows: Sequence[Row]) -> str:
    """Log-log slopes of time and memory along N and V, with what they were fitted to."""
    lines = []
    for series, group in by_case(rows).items():
        for name in dict.fromkeys(row["contender"] for row in group):
            points = [row for row in group if row["contender"] == name]
            sizes = [_along(series, row) for row in points]
            times = [least(row) for row in points]
            memory = [row["extra_peak_mib"] for row in points]
            lines.append([f"{name}, along {series}", _span(sizes), _span(times), number(slope(sizes, times))])
            if all(memory):
                beyond = [mib - row["gradients_mib"]["hidden"] for mib, row in zip(memory, points, strict=True)]
                lines[-1] += [_span(memory), number(slope(sizes, memory)), _span(beyond)]
    return markdown(["", "from ... to", "ms", "slope", "MiB", "slope", "MiB beyond dHidden"], lines)


def _along(series: str, row: Row) -> float:
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
    names = list(dict.fromkeys(row["contender"] for row in rows))
    phases = ["rollout", "reference", "reward", "step"]

    def middle(name: str, phase: str) -> float:
        return median(row["seconds"][phase] for row in rows if row["contender"] == name)

    lines = []
    for name in names:
        others = middle(name, "step") - sum(middle(name, phase) for phase in phases[:-1])
        rate = middle(name, "reply_tokens") / middle(name, "step")
        lines.append([name, *(number(middle(name, phase)) for phase in phases), number(others), number(rate)])
    table = markdown(["seconds", *phases[:-1], "whole step", "update and the rest", "reply tokens/s"], lines)
    ratios = ", ".join(f"{value:.2f}" for value in step_ratios(rows))
    return f"{table}\n\n{names[0]} over {names[1]}, one pair of runs after the other: {ratios}."


def step_ratios(rows: Sequence[Row]) -> list[float]:
    """Our median step over the other's, by pair of runs."""
    ours, other = dict.fromkeys(row["contender"] for row in rows)

    def middle(name: str, pair: int) -> float:
        return median(row["seconds"]["step"] for row in rows if (row["contender"], row["pair"]) == (name, pair))

    return [middle(ours, pair) / middle(other, pair) for pair in sorted({row["pair"] for row in rows})]
