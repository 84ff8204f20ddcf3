"""Figures of results as deterministic SVG: growth with N, time and memory by contender, and the roofline."""

import io
import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import OURS
from benchmarks.tables import Row, best_ms, by_case, floor_ratios, measured
from benchmarks.tables_of_rows import bandwidth, copy_bandwidth
from expo.reporting.figures import BLUE, GREY, STYLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN_STYLE = {**STYLE, "svg.hashsalt": "benchmarks", "svg.fonttype": "none"}
# memory traffic in bytes per logit of the loss from hidden states: written by a matrix product, read twice and
# overwritten by the row kernel, read by two matrix products
LOGIT_BYTES = {"float32": 4 + 2 * 4 + 4 + 2 * 4, "bfloat16": 4 + 2 * 4 + 2 + 2 * 2}
FLOPS_PER_EXISTING_LOGIT = 10  # maximum, exponential and sum, then exponential and gradient


def draw(tables: dict[str, list[Row]]) -> dict[str, bytes]:
    """The figures for which there are rows, by file name."""
    import matplotlib

    svgs = {}
    with matplotlib.rc_context(PLAIN_STYLE):
        if "loss" in tables:
            svgs["loss.svg"] = _svg(_bars(tables["loss"]))
        if "growth" in tables:
            svgs["growth.svg"] = _svg(_growth(tables["growth"]))
        if "loss" in tables and "rows" in tables:
            svgs["roofline.svg"] = _svg(_roofline(tables["loss"], tables["rows"]))
    return svgs


def _svg(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _panels(number: int, width: float, height: float = 3.4) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, number, squeeze=False)[0]


def _bars(rows: Sequence[Row]) -> "Figure":
    """Time relative to the floor, and memory, of every contender in the first case of the table."""
    case, group = next(iter(by_case(measured(rows)).items()))
    names = [row["contender"] for row in group]
    figure, (time, memory) = _panels(2, 10.4)
    for axes, values, title in (
        (
            time,
            [median(floor_ratios(row)) for row in group],
            "forward and backward, relative to the floor",
        ),
        (memory, [row["extra_peak_mib"] or 0.0 for row in group], "extra peak memory, MiB"),
    ):
        axes.barh(names, values, color=[BLUE if name == OURS else GREY for name in names])
        axes.invert_yaxis()
        axes.set_title(title)
        axes.grid(visible=False, axis="y")
    memory.set_yticklabels([])
    figure.suptitle(case, fontsize=10.5)
    return figure


def _growth(rows: Sequence[Row]) -> "Figure":
    """Time, memory and error against N."""
    figure, panels = _panels(3, 10.4)
    along_n = [row for row in rows if row["case"] == "N"]
    colours = dict(zip(dict.fromkeys(row["contender"] for row in along_n), (BLUE, VERMILION), strict=False))
    for axes, title, value_of in zip(
        panels,
        ("ms, forward and backward", "extra peak memory, MiB", "relative error of dWeight"),
        (best_ms, lambda row: row["extra_peak_mib"], lambda row: row["errors"]["grad_weight"]),
        strict=True,
    ):
        for name, colour in colours.items():
            points = [(_tokens(row), value_of(row)) for row in along_n if row["contender"] == name]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("tokens N")
        axes.set_title(title)
    panels[0].legend()
    return figure


def _tokens(row: Row) -> int:
    shape = row["settings"]["shape"]
    return int(shape["num_sequences"] * shape["length"])


def _roofline(loss: Sequence[Row], existing: Sequence[Row]) -> "Figure":
    """Operations per second against operations per byte, limited by the measured rates of copy and products."""
    cases = [row for row in measured(loss) if row["contender"] == OURS and row["settings"]["active_share"] == 1]
    cases = [row for row in cases if not row["settings"]["frozen_head"] and row["settings"]["ratio"] == "token"]
    cases = [row for row in cases if row["settings"]["dtype"] == cases[0]["settings"]["dtype"]]
    copy = max(copy_bandwidth(row) for row in measured(existing))
    products = max(_gflop(row) / min(row["floor_ms"]) * 1e3 for row in cases)
    figure, (axes,) = _panels(1, 6.4, 4.0)
    intensities = [2.0**power for power in range(-1, 13)]
    axes.plot(intensities, [min(copy * x, products) for x in intensities], color=GREY, label="limit: copy, products")
    for row in measured(existing):
        if row["contender"] == OURS and row["case"] == existing[0]["case"]:
            intensity = FLOPS_PER_EXISTING_LOGIT / 3 / _itemsize(row)
            axes.plot(intensity, intensity * bandwidth(row), "s", color=VERMILION, label="loss on existing logits")
    for row in cases:
        intensity = 6 * row["settings"]["shape"]["hidden_size"] / LOGIT_BYTES[row["settings"]["dtype"]]
        label = "loss from hidden states" if row is cases[0] else None
        axes.plot(intensity, _gflop(row) / best_ms(row) * 1e3, "o", color=BLUE, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of logits")
    axes.set_ylabel("GFLOP/s")
    axes.legend()
    return figure


def _itemsize(row: dict[str, Any]) -> int:
    return 4 if row["settings"]["dtype"] == "float32" else 2


def _gflop(row: Row) -> float:
    """GFLOP of the three products."""
    shape = row["settings"]["shape"]
    return 6 * math.prod((_tokens(row), shape["hidden_size"], shape["vocab_size"])) / 1e9
