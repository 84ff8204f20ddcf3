"""Shared by all figures: colours and style, panels, axes, error bars, legend, PNG output.

matplotlib is imported inside the functions, so that importing this module stays cheap.
"""

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from expo.reporting.comparison import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with the common kinds of colour blindness
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#333333", "#8A8F98"
BEFORE, AFTER = VERMILION, BLUE  # the same in every figure
LINE_COLOURS = (GREY, BLUE, GREEN, VERMILION, PURPLE, ORANGE, SKY, BLACK)

DPI = 144  # dots per inch: twice what the page shows, for high-density screens
SIZE, WIDE_SIZE = (5.6, 3.4), (10.4, 4.2)  # inches
Width = Literal["half", "full", "narrow"]  # of a figure on the page: beside another, across it, on a telephone

STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9AA0A8",
    "axes.labelcolor": BLACK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#5B616B",
    "ytick.color": "#5B616B",
    "text.color": BLACK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.columnspacing": 1.3,
    "legend.handlelength": 1.4,
    "lines.linewidth": 2.0,
}

Line = Sequence[tuple[float, float, float]]  # x, mean, error


@dataclass(frozen=True)
class RenderedFigure:
    """One figure of a page; `png` is None where there is no data yet.

    narrow_png: the same of a wide figure for narrow screens, with its panels below each other; None: `png` serves.
    """

    name: str
    title: str
    caption: str
    is_wide: bool
    png: bytes | None
    narrow_png: bytes | None = None


def as_png(figure: "Figure") -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def make_panels(
    num: int = 1, width: Width = "half", ratios: Sequence[float] | None = None, **layout: Any
) -> "tuple[Figure, list[Axes]]":
    """A figure with `num` axes side by side, or below each other if it is narrow.

    Args:
        num: number of axes.
        width: of the figure.
        ratios: of the axes' widths, or of their heights if it is narrow; None: all equal.
        layout: passed to `Figure.subplots`.
    """
    # pyplot would keep figures and a GUI backend in global state
    from matplotlib.figure import Figure

    if width == "narrow":
        figure = Figure(figsize=(SIZE[0], SIZE[1] * (1 + 0.8 * (num - 1))), layout="constrained")
        return figure, list(figure.subplots(num, 1, squeeze=False, height_ratios=ratios, **layout)[:, 0])
    figure = Figure(figsize=WIDE_SIZE if width == "full" else SIZE, layout="constrained")
    return figure, list(figure.subplots(1, num, squeeze=False, width_ratios=ratios, **layout)[0])


def legend(figure: "Figure") -> None:
    """One legend above all axes; a label used in several axes appears once."""
    per_axes = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = {label: handle for handles, labels in per_axes for handle, label in zip(handles, labels, strict=True)}
    if entries:
        num_columns = 8 if figure.get_figwidth() > SIZE[0] else 2
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=num_columns)


def percent_format() -> Any:
    """A tick formatter that writes shares in per cent."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=None)


def step_axis(axes: "Axes") -> None:
    """Label the horizontal axis with integer steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("step")


def share_axis(axes: "Axes", label: str, *, full: bool = False) -> None:
    """A vertical axis in per cent: 0 to 100 % if `full`, else 0 to at least 2 % so that noise stays small."""
    axes.set_ylim(0, 1.03 if full else max(0.02, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(percent_format())
    axes.set_ylabel(label)


def error_bars(
    axes: "Axes", x: Sequence[float], estimates: list[Estimate], colour: str, label: str, line: str = "-"
) -> None:
    """Means with their intervals, joined by `line`, a matplotlib line style; "" joins nothing."""
    means = [e.mean for e in estimates]
    below = [max(0.0, e.mean - e.low) for e in estimates]
    above = [max(0.0, e.high - e.mean) for e in estimates]
    axes.errorbar(
        x,
        means,
        [below, above],
        color=colour,
        label=label,
        fmt=f"o{line}",
        markersize=5,
        capsize=3,
        elinewidth=1.4,
    )


def step_edges(steps: Sequence[int]) -> list[float]:
    """Edges of the steps' columns, half-way between neighbours; the outer columns are symmetric around their step."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


def draw_lines(panels: Mapping[str, Mapping[str, Line]], x_label: str, y_label: str) -> bytes:
    """PNG of lines with error bands, by panel title and line name; the panels share their vertical axis."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes_of = make_panels(len(panels), "full", sharey=True)
        for axes, (title, lines) in zip(axes_of, panels.items(), strict=True):
            axes.set_title(title)
            axes.set_xlabel(x_label)
            for index, (name, line) in enumerate(lines.items()):
                x, means, errors = zip(*line, strict=True)
                low, high = ([m + sign * h for m, h in zip(means, errors, strict=True)] for sign in (-1, 1))
                colour = LINE_COLOURS[index % len(LINE_COLOURS)]
                axes.plot(x, means, color=colour, label=name)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes_of[0].set_ylabel(y_label)
        legend(figure)
        return as_png(figure)
