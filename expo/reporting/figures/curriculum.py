"""The picture of the curriculum: how pass rates spread over a run, beside the weight with which questions are drawn.

The weight is computed here (arXiv 2605.11403, eq. 7), from the run's own configuration.
"""

import math
from typing import TYPE_CHECKING

from expo.reporting.figures.drawing import BLUE, VERMILION, make_panels, percent_format, step_axis, step_edges
from expo.reporting.reader import Record, Records, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gaussian_weight(pass_rate: float, mean: float, std: float) -> float:
    """Unnormalised weight with which a question of this pass rate is drawn (eq. 7)."""
    return math.exp(-((pass_rate - mean) ** 2) / (2 * std**2))


def draw_curriculum(records: Records) -> "Figure | None":
    """How the questions' pass rates spread over time, beside the weight with which they are drawn."""
    rows = [row for row in records.curriculum if sum(row.get("histogram", ())) > 0]
    # a heat map needs one bin count throughout: the newest record decides
    rows = [row for row in rows if len(row["histogram"]) == len(rows[-1]["histogram"])]
    if not rows:
        return None
    figure, (heat, last, weight) = make_panels(3, wide=True, sharey=True, width_ratios=(5, 1.3, 1.3))
    _heat_map(figure, heat, rows)
    shares = _shares(rows[-1])
    middles = [(i + 0.5) / len(shares) for i in range(len(shares))]
    last.barh(middles, shares, height=0.92 / len(shares), color=BLUE)
    last.set_title(f"at step {rows[-1]['step']}")
    last.set_xlabel("share of\nquestions")
    last.xaxis.set_major_formatter(percent_format())
    _weight_curve(weight, records)
    return figure


def _shares(row: Record) -> list[float]:
    total = sum(row["histogram"])
    return [count / total for count in row["histogram"]]


def _heat_map(figure: "Figure", axes: "Axes", rows: list[Record]) -> None:
    columns = [_shares(row) for row in rows]
    bins = len(columns[0])
    # early columns hold every question in one bin: the scale ends where the run's second half does
    top = max(max(column) for column in columns[len(columns) // 2 :])
    by_bin = [[column[i] for column in columns] for i in range(bins)]
    mesh = axes.pcolormesh(
        step_edges(steps_of(rows)), [i / bins for i in range(bins + 1)], by_bin, cmap="Blues", vmin=0, vmax=top
    )
    bar = figure.colorbar(mesh, ax=axes, label="share of questions", pad=0.02, format=percent_format(), extend="max")
    bar.outline.set_visible(False)
    axes.grid(visible=False)
    axes.set_ylim(0, 1)
    axes.set_ylabel("estimated pass rate of a question")
    step_axis(axes)


def _weight_curve(axes: "Axes", records: Records) -> None:
    mean, std = records.setting("curriculum", "mean"), records.setting("curriculum", "std")
    rates = [i / 100 for i in range(101)]
    is_uniform = records.setting("curriculum", "kind") == "uniform"
    if is_uniform:
        axes.plot([1.0] * len(rates), rates, color=VERMILION)
    elif isinstance(mean, int | float) and isinstance(std, int | float) and std > 0:
        weights = [gaussian_weight(rate, mean, std) for rate in rates]
        axes.plot(weights, rates, color=VERMILION)
        axes.fill_betweenx(rates, weights, color=VERMILION, alpha=0.12, linewidth=0)
    axes.set_title("draw weight")
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("share of the\nlargest weight")
