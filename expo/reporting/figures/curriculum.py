"""The figure of the curriculum: the distribution of pass rates during a run, and the sampling weight by pass rate.

The weight is computed here (arXiv 2605.11403, eq. 7) from the run's configuration.
"""

import math
from typing import TYPE_CHECKING

from expo.reporting.clean import number
from expo.reporting.figures.drawing import BLUE, VERMILION, Width, make_panels, percent_format, step_axis, step_edges
from expo.reporting.reader import Record, TrainingHistory, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


RATIOS: dict[Width, tuple[float, float, float]] = {"full": (5, 1.3, 1.3), "narrow": (1.6, 1, 1)}
LEAST_STD = 1e-6  # a narrower weight cannot be drawn, and the square of a far smaller one is 0


def gaussian_weight(pass_rate: float, mean: float, std: float) -> float:
    """Unnormalised sampling weight of a question with this pass rate (eq. 7)."""
    return math.exp(-((pass_rate - mean) ** 2) / (2 * std**2))


def draw_curriculum(history: TrainingHistory, width: Width = "full") -> "Figure | None":
    """The distribution of the questions' pass rates over time, beside the sampling weight by pass rate."""
    rows = [row for row in history.curriculum if sum(row.get("histogram", ())) > 0]
    # a heat map needs one number of bins: that of the newest record
    rows = [row for row in rows if len(row["histogram"]) == len(rows[-1]["histogram"])]
    if not rows:
        return None
    figure, (heat, last, weight) = make_panels(3, width, RATIOS[width], sharey=True)
    _heat_map(figure, heat, rows)
    shares = _shares(rows[-1])
    middles = [(i + 0.5) / len(shares) for i in range(len(shares))]
    last.barh(middles, shares, height=0.92 / len(shares), color=BLUE)
    last.set_title(f"at step {rows[-1]['step']}")
    last.set_xlabel("share of\nquestions")
    last.xaxis.set_major_formatter(percent_format())
    _weight_curve(weight, history)
    return figure


def _shares(row: Record) -> list[float]:
    total = sum(row["histogram"])
    return [count / total for count in row["histogram"]]


def _heat_map(figure: "Figure", axes: "Axes", rows: list[Record]) -> None:
    columns = [_shares(row) for row in rows]
    bins = len(columns[0])
    # early columns have all questions in one bin, so the colour scale covers the second half of the run only
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


def _weight_curve(axes: "Axes", history: TrainingHistory) -> None:
    mean, std = (number(history.setting("curriculum", name)) for name in ("mean", "std"))
    rates = [i / 100 for i in range(101)]
    is_uniform = history.setting("curriculum", "kind") == "uniform"
    if is_uniform:
        axes.plot([1.0] * len(rates), rates, color=VERMILION)
    elif mean is not None and std is not None and std > LEAST_STD:
        weights = [gaussian_weight(rate, mean, std) for rate in rates]
        axes.plot(weights, rates, color=VERMILION)
        axes.fill_betweenx(rates, weights, color=VERMILION, alpha=0.12, linewidth=0)
    axes.set_title("sampling weight")
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("share of the\nlargest weight")
