"""Figures of evaluations: pass@k over k, pass@1 by level, and two models compared."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from expo.reporting.clean import label as label_text
from expo.reporting.comparison import Estimate, Scores, pass_at
from expo.reporting.figures.drawing import (
    AFTER,
    BEFORE,
    GREY,
    STYLE,
    RenderedFigure,
    Width,
    as_png,
    error_bars,
    legend,
    make_panels,
    share_axis,
)
from expo.reporting.reader import Record, TrainingHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_pass_at_k(history: TrainingHistory, width: Width = "full") -> "Figure | None":
    """pass@k over k, before and after, one panel per set."""
    sets = _set_names(history)
    if not sets:
        return None
    figure, panels = make_panels(len(sets), width, sharey=True)
    for axes, name in zip(panels, sets, strict=True):
        axes.set_title(label_text(name.replace("_", " ")))
        for scores, label, colour in _both(history):
            _pass_at_line(axes, scores.get(name, {}), label, colour)
        _k_axis(axes)
    for axes in panels if width == "narrow" else panels[:1]:
        share_axis(axes, "pass@k", full=True)
    legend(figure)
    return figure


def draw_levels(history: TrainingHistory, width: Width = "full") -> "Figure | None":
    """pass@1 of every level, before and after."""
    levels = [(name, level) for name in _set_names(history) for level in _level_names(history, name)]
    if not levels:
        return None
    figure, (axes,) = make_panels(width=width)
    for offset, (scores, label, colour) in zip((-0.13, 0.13), _both(history), strict=False):
        _level_points(axes, scores, levels, offset, label, colour)
    axes.set_xticks(range(len(levels)), [label_text(level) for _, level in levels])
    if len(levels) > (4 if width == "narrow" else 8):
        axes.tick_params(axis="x", rotation=60 if width == "narrow" else 35)
    axes.set_xlim(-0.6, len(levels) - 0.4)
    axes.grid(visible=False, axis="x")
    _mark_sets(axes, [name for name, _ in levels])
    share_axis(axes, "pass@1", full=True)
    legend(figure)
    return figure


def draw_curves(title: str, curves: Mapping[str, Sequence[Estimate]]) -> RenderedFigure:
    """pass@k over k with 95 % bands, one curve per model.

    Args:
        title: title of the figure; also part of its name.
        curves: estimates for k = 1, 2, ... in order, by label; at most two curves.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, (axes,) = make_panels()
        for (label, estimates), colour in zip(curves.items(), (BEFORE, AFTER), strict=False):
            ks = range(1, len(estimates) + 1)
            marker = "o" if len(ks) == 1 else None
            axes.plot(ks, [e.mean for e in estimates], color=colour, label=label_text(label), marker=marker)
            axes.fill_between(
                ks, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.18, linewidth=0
            )
        _k_axis(axes)
        share_axis(axes, "pass@k", full=True)
        legend(figure)
        png = as_png(figure)
    caption = "Bands are 95 % intervals of each model alone; see the table for the difference between the models."
    return RenderedFigure(f"pass_at_k-{title}", title, caption, False, png)


def _both(history: TrainingHistory) -> list[tuple[Scores, str, str]]:
    both = [(history.before, "before", BEFORE), (history.after, "after", AFTER)]
    return [entry for entry in both if entry[0]]


def _set_names(history: TrainingHistory) -> list[str]:
    return list(history.before | history.after)


def _level_names(history: TrainingHistory, set_name: str) -> list[str]:
    scores = [s.get(set_name, {}).get("by_level", {}) for s in (history.before, history.after)]
    return sorted(scores[0] | scores[1], key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts steps-10 after steps-9."""
    parts = name.replace("-", " ").split()
    return [(int(part), "") if re.fullmatch(r"\d{1,18}", part) else (-1, part) for part in parts]


def _pass_at_line(axes: "Axes", scores: Record, label: str, colour: str) -> None:
    points = {int(k): pass_at(scores, k) for k in scores.get("pass_at", {})}
    available = sorted((k, estimate) for k, estimate in points.items() if estimate)
    if available:
        error_bars(axes, [k for k, _ in available], [estimate for _, estimate in available], colour, label)
        axes.set_xticks(sorted({*(round(tick) for tick in axes.get_xticks() if tick in points), *points}))


def _level_points(
    axes: "Axes", scores: Scores, levels: list[tuple[str, str]], offset: float, label: str, colour: str
) -> None:
    x, estimates = [], []
    for index, (name, level) in enumerate(levels):
        estimate = pass_at(scores.get(name, {}).get("by_level", {}).get(level, {}), 1)
        if estimate:
            x.append(index + offset)
            estimates.append(estimate)
    if x:
        error_bars(axes, x, estimates, colour, label, line="")


def _mark_sets(axes: "Axes", names: list[str]) -> None:
    """Write the name of each set above its levels, and draw a line between sets."""
    for index, name in enumerate(names):
        if index == 0 or names[index - 1] != name:
            axes.text(index - 0.45, 1.04, label_text(name.replace("_", " ")), va="bottom", color="#5B616B")
            if index:
                axes.axvline(index - 0.5, color=GREY, linewidth=1, linestyle=":")


def _k_axis(axes: "Axes") -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("k (replies per question)")
