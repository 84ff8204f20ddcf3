"""Pictures of a run: one function per picture, each from the run's records to a figure.

Everything drawn is what the run recorded; only the two curves taken from formulas, `beta * rho(accuracy)` and
the curriculum's weight, are computed here (arXiv 2605.11403, eq. 5 and 7), from the run's own configuration.
A picture whose records are not there yet is `None`, and the report says so in its place.
matplotlib is imported where a figure is made, so that importing this file costs nothing.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]  # one line of a .jsonl file
Scores = dict[str, Any]  # the scores of one evaluation: set name -> {"num_questions", "pass_at", "by_level", ...}

# Okabe and Ito's palette: told apart under the common kinds of colour blindness
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#333333", "#8A8F98"
BEFORE, AFTER = VERMILION, BLUE  # the same two in every picture
PHASE_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
LINE_COLOURS = (GREY, BLUE, GREEN, VERMILION, PURPLE, ORANGE, SKY, BLACK)
PHASE_ORDER = ("rollout", "reward", "reference", "old", "update", "curriculum", "checkpoint")

DPI = 144  # dots an inch: twice what a page shows, sharp on dense screens
SIZE, WIDE_SIZE = (5.6, 3.4), (10.4, 4.2)  # inches
MAX_WINDOW = 51  # steps averaged into a smoothed line, at most

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


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Records:
    """What the pictures are drawn from; any part may be empty."""

    config: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)  # a record per step, in order
    curriculum: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)  # a record per evaluated step, in order
    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)

    def setting(self, section: str, name: str) -> Any:
        """The value of `section.name` in the run's configuration; None where it has none."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None


@dataclass(frozen=True)
class Picture:
    """One picture of the report, with what to look at in it; `png` is None where nothing is recorded yet."""

    name: str
    title: str
    sentence: str
    wide: bool
    png: bytes | None


def pass_at(scores: Record, k: int | str) -> Estimate | None:
    """pass@k of one set or level; None where it was not evaluated."""
    value = scores.get("pass_at", {}).get(str(k))
    return Estimate(value["mean"], value["low"], value["high"]) if value else None


def main_set(scores: Scores) -> str | None:
    """The set that the headline speaks of: the held-out questions, else the first set there is."""
    return "held_out" if "held_out" in scores else next(iter(scores), None)


def tanh_rho(accuracy: float) -> float:
    """rho(x) = (tanh(x) + 1) / 2, the default scaling of beta (eq. 5)."""
    return (math.tanh(accuracy) + 1) / 2


def gaussian_weight(pass_rate: float, mean: float, std: float) -> float:
    """Unnormalised weight with which a question of this pass rate is drawn (eq. 7)."""
    return math.exp(-((pass_rate - mean) ** 2) / (2 * std**2))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred mean of `window` neighbours, NaN left out; shorter at both ends."""
    half = window // 2
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def draw_pictures(records: Records) -> list[Picture]:
    """Every picture of the report, in reading order."""
    import matplotlib

    pictures = []
    with matplotlib.rc_context(STYLE):
        for draw, title, wide, sentence in PICTURES:
            figure = draw(records)
            png = None if figure is None else _render(figure)
            pictures.append(Picture(draw.__name__.removeprefix("draw_"), title, sentence, wide, png))
    return pictures


Line = Sequence[tuple[float, float, float]]  # x, mean, error


def draw_lines(panels: Mapping[str, Mapping[str, Line]], x_label: str, y_label: str) -> bytes:
    """PNG of lines with their error as a band, by name; one panel for each group of them, all with the same axes."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes_of = _panels(len(panels), wide=True, sharey=True)
        for axes, (title, lines) in zip(axes_of, panels.items(), strict=True):
            axes.set_title(title)
            axes.set_xlabel(x_label)
            for place, (name, line) in enumerate(lines.items()):
                x, means, halves = zip(*line, strict=True)
                low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
                colour = LINE_COLOURS[place % len(LINE_COLOURS)]
                axes.plot(x, means, color=colour, label=name)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes_of[0].set_ylabel(y_label)
        _legend(figure)
        return _render(figure)


def draw_accuracy(records: Records) -> "Figure | None":
    """Accuracy of each step's rollouts, and held-out pass@k where it was evaluated."""
    if not records.metrics and not records.evaluations:
        return None
    figure, (axes,) = _panels(wide=True)
    _noisy_line(axes, records.metrics, "accuracy", GREY, "training rollouts, each step")
    for k, colour in ((1, BLUE), (8, GREEN), (32, VERMILION)):
        _evaluated_line(axes, records.evaluations, k, colour)
    _step_axis(axes)
    _share_axis(axes, "share of questions solved", full=True)
    _legend(figure)
    return figure


def draw_pass_at_k(records: Records) -> "Figure | None":
    """pass@k over k, before and after, one panel per set."""
    sets = _set_names(records)
    if not sets:
        return None
    figure, panels = _panels(len(sets), wide=True, sharey=True)
    for axes, name in zip(panels, sets, strict=True):
        axes.set_title(name.replace("_", " "))
        for scores, label, colour in _both(records):
            _pass_at_line(axes, scores.get(name, {}), label, colour)
        _k_axis(axes)
    _share_axis(panels[0], "pass@k", full=True)
    _legend(figure)
    return figure


def draw_curves(title: str, curves: Mapping[str, Sequence[Estimate]]) -> Picture:
    """pass@k over k with bands, one curve a model.

    Args:
        title: of the picture, which is named after it.
        curves: label: estimates for k = 1, 2, ... in order; at most two.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _panels()
        for (label, estimates), colour in zip(curves.items(), (BEFORE, AFTER), strict=False):
            ks = range(1, len(estimates) + 1)
            axes.plot(ks, [e.mean for e in estimates], color=colour, label=label, marker="o" if len(ks) == 1 else None)
            axes.fill_between(
                ks, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.18, linewidth=0
            )
        _k_axis(axes)
        _share_axis(axes, "pass@k", full=True)
        _legend(figure)
        png = _render(figure)
    sentence = "Bands are the 95 % intervals of each model alone; whether the two differ, the table says."
    return Picture(f"pass_at_k-{title}", title, sentence, False, png)


def draw_levels(records: Records) -> "Figure | None":
    """pass@1 of every level, before and after."""
    levels = [(name, level) for name in _set_names(records) for level in _level_names(records, name)]
    if not levels:
        return None
    figure, (axes,) = _panels(wide=True)
    for side, (scores, label, colour) in zip((-0.13, 0.13), _both(records), strict=False):
        _level_points(axes, scores, levels, side, label, colour)
    axes.set_xticks(range(len(levels)), [level for _, level in levels])
    if len(levels) > 8:
        axes.tick_params(axis="x", rotation=35)
    axes.set_xlim(-0.6, len(levels) - 0.4)
    axes.grid(visible=False, axis="x")
    _mark_sets(axes, [name for name, _ in levels])
    _share_axis(axes, "pass@1", full=True)
    _legend(figure)
    return figure


def draw_beta(records: Records) -> "Figure | None":
    """beta_eff against the accuracy it was made from, over the curve of the configuration."""
    if not records.metrics:
        return None
    figure, (axes,) = _panels()
    _rho_curve(axes, records.setting("kl", "beta"), records.setting("kl", "rho"))
    points = axes.scatter(
        series(records.metrics, "accuracy"),
        series(records.metrics, "beta_eff"),
        c=_steps(records.metrics),
        cmap=_step_colours(),
        s=26,
        zorder=3,
        edgecolors="white",
        linewidths=0.4,
    )
    figure.colorbar(points, ax=axes, label="step", pad=0.02).outline.set_visible(False)
    axes.set_xlim(-0.02, 1.02)
    if records.setting("kl", "rho") != "tanh":
        axes.set_ylim(bottom=0)
    axes.set_xlabel("accuracy of the step's rollouts")
    axes.set_ylabel("KL coefficient beta_eff")
    _legend(figure)
    return figure


def draw_kl(records: Records) -> "Figure | None":
    """KL to the reference policy per step."""
    estimator = str(records.setting("kl", "estimator") or "k3").upper()
    return _one_line(records, "kl", f"KL to the reference\n(nats per token, {estimator})", VERMILION)


def draw_entropy(records: Records) -> "Figure | None":
    """Entropy of the policy per step."""
    return _one_line(records, "entropy", "entropy (nats per token)", GREEN)


def draw_completion_length(records: Records) -> "Figure | None":
    """Mean length of the replies per step."""
    return _one_line(records, "completion_length", "mean reply length (tokens)", PURPLE)


def draw_clip_fractions(records: Records) -> "Figure | None":
    """Share of tokens whose ratio was clipped, below and above."""
    lines = (("clip_low_fraction", "clipped below", BLUE), ("clip_high_fraction", "clipped above", VERMILION))
    return _share_lines(records, lines, "share of reply tokens")


def draw_health(records: Records) -> "Figure | None":
    """Shares of replies and groups that carry no learning signal."""
    lines = (
        ("zero_variance_fraction", "groups all equal", GREY),
        ("unparsed_fraction", "unparsed replies", VERMILION),
        ("truncated_fraction", "truncated replies", BLUE),
        ("timeout_fraction", "verifier timeouts", GREEN),
    )
    return _share_lines(records, lines, "share of groups or replies")


def draw_phases(records: Records) -> "Figure | None":
    """Seconds of each step, stacked by phase."""
    names = _phase_names(records.metrics)
    if not names:
        return None
    figure, (axes,) = _panels(wide=True)
    steps = _steps(records.metrics)
    # every step is drawn from half a step before it to half a step after, so that one step alone is seen too
    edges = [*_edges(steps)]
    lower = [0.0] * len(edges)
    total = sum(sum(_phase_seconds(records.metrics, name)) for name in names) or 1.0
    for name, colour in zip(names, _phase_colours(len(names)), strict=True):
        seconds = _phase_seconds(records.metrics, name)
        upper = [low + s for low, s in zip(lower, [*seconds, seconds[-1]], strict=True)]
        label = f"{name} {sum(seconds) / total:.0%}"
        axes.fill_between(edges, lower, upper, step="post", color=colour, label=label, linewidth=0)
        lower = upper
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    _step_axis(axes)
    axes.set_ylabel("seconds per step")
    _legend(figure)
    return figure


def draw_curriculum(records: Records) -> "Figure | None":
    """How the questions' pass rates spread over time, beside the weight with which they are drawn."""
    rows = [row for row in records.curriculum if sum(row.get("histogram", ())) > 0]
    # a heat map needs one bin count throughout: the newest record decides
    rows = [row for row in rows if len(row["histogram"]) == len(rows[-1]["histogram"])]
    if not rows:
        return None
    figure, (heat, last, weight) = _panels(3, wide=True, sharey=True, width_ratios=(5, 1.3, 1.3))
    _heat_map(figure, heat, rows)
    shares = _shares(rows[-1])
    middles = [(i + 0.5) / len(shares) for i in range(len(shares))]
    last.barh(middles, shares, height=0.92 / len(shares), color=BLUE)
    last.set_title(f"at step {rows[-1]['step']}")
    last.set_xlabel("share of\nquestions")
    last.xaxis.set_major_formatter(_percent())
    _weight_curve(weight, records)
    return figure


Draw = Callable[[Records], "Figure | None"]

# function, title, wide?, what to look at and what good looks like
PICTURES: tuple[tuple[Draw, str, bool, str], ...] = (
    (
        draw_accuracy,
        "Accuracy and pass@k",
        True,
        "Look at the blue line, held-out pass@1: it should climb beyond its own error bars (95 %) while "
        "the lines above it do not fall. The grey line is a different thing, the accuracy on the "
        "questions drawn for training: a curriculum that prefers half-solved questions may hold it near "
        "one half while the policy improves.",
    ),
    (
        draw_pass_at_k,
        "pass@k before and after",
        True,
        "Look at the whole curve: a gain at k = 1 alone is a sharpening of what the policy could already "
        "do, a gain at the right end means that it solves questions which it did not reach before. Good "
        "is the blue curve above the orange one everywhere; where they cross, variety was paid for accuracy.",
    ),
    (
        draw_levels,
        "pass@1 by level",
        True,
        "Look at the distance between the two points of a level. Good is a gain at every level; easy "
        "levels have little room for one, and the hardest move last.",
    ),
    (
        draw_beta,
        "KL coefficient against accuracy",
        False,
        "Every point should lie on the curve of the configuration: with EXPO the coefficient grows with "
        "accuracy, so that the policy is held loosely while it fails and tightly once it succeeds. A point "
        "off the curve is a fault.",
    ),
    (
        draw_kl,
        "KL to the reference",
        False,
        "It starts at zero and grows as the policy learns. Good is a slow, flattening "
        "rise; a sudden jump is the mark of too large a step, and accuracy often falls with it.",
    ),
    (
        draw_entropy,
        "Entropy",
        False,
        "How undecided the policy is about the next token. It falls as the policy grows sure; good is a "
        "gentle slope. Near zero, all replies to a question are the same and nothing is left to learn from.",
    ),
    (
        draw_completion_length,
        "Reply length",
        False,
        "Good is a length that settles. A climb to the limit, with growing truncation, means rambling; a "
        "collapse means that the policy has stopped working the answer out.",
    ),
    (
        draw_clip_fractions,
        "Clipped tokens",
        False,
        "Share of tokens whose ratio to the sampling policy left the clip range, and which so gave the "
        "surrogate no gradient. With one update per batch both are exactly zero; with more, up to a few "
        "per cent is usual, and tens of per cent mean too large a learning rate.",
    ),
    (
        draw_health,
        "Replies and groups without signal",
        False,
        "Unparsed and truncated replies and verifier timeouts should go towards zero. A group whose "
        "rewards are all equal teaches nothing: that share rises as questions are mastered, and a good "
        "curriculum holds it down.",
    ),
    (
        draw_phases,
        "Time per phase",
        True,
        "Where a step's time goes. Good is a flat top with nearly all of it in rollout and update; a band "
        "that thickens as the run goes on is the one to look into.",
    ),
    (
        draw_curriculum,
        "The curriculum's pass rates",
        True,
        "Each column spreads all questions over their estimated pass rate at that step. All start at one "
        "value, then fan out; good is a mass that moves upwards. On the right stands the weight with "
        "which a question of that pass rate is drawn: most training goes to where it bulges.",
    ),
)


def series(records: Iterable[Record], key: str) -> list[float]:
    """The records' values of `key`, NaN where one has none."""
    return [_number(record.get(key)) for record in records]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _steps(records: Iterable[Record]) -> list[int]:
    return [record["step"] for record in records]


def _render(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _panels(num: int = 1, *, wide: bool = False, **layout: Any) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import (
        Figure,
    )  # not pyplot, which keeps figures and a window system in global state

    figure = Figure(figsize=WIDE_SIZE if wide else SIZE, layout="constrained")
    return figure, list(figure.subplots(1, num, squeeze=False, **_gridspec(layout))[0])


def _gridspec(layout: Record) -> Record:
    ratios = layout.pop("width_ratios", None)
    return layout | ({"gridspec_kw": {"width_ratios": ratios}} if ratios else {})


def _legend(figure: "Figure") -> None:
    entries = {label: handle for axes in figure.axes for handle, label in zip(*_legend_of(axes), strict=True)}
    if entries:
        num_columns = 8 if figure.get_figwidth() > SIZE[0] else 2
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=num_columns)


def _legend_of(axes: "Axes") -> tuple[list[Any], list[Any]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(handles), list(labels)


def _step_colours() -> Any:
    """Early to late; no end is near white or black, since a page in dark mode turns lightness around."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("steps", (BLUE, PURPLE, VERMILION))


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=None)


def _step_axis(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("step")


def _k_axis(axes: "Axes") -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("k (replies allowed per question)")


def _share_axis(axes: "Axes", label: str, *, full: bool = False) -> None:
    """A vertical axis in per cent: all of it, or from zero to at least 2 % so that noise stays small."""
    axes.set_ylim(0, 1.03 if full else max(0.02, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(_percent())
    axes.set_ylabel(label)


def _noisy_line(axes: "Axes", metrics: list[Record], key: str, colour: str, label: str | None) -> None:
    """Every step faintly, and a running mean over a twentieth of the run."""
    steps, values = _steps(metrics), series(metrics, key)
    if all(math.isnan(v) for v in values):
        return
    window = min(MAX_WINDOW, len(steps) // 20 * 2 + 1)
    marker = "o" if len(steps) < 3 else None  # a line through one point cannot be seen
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
        label = label and f"{label} (bold: mean of {window})"
    axes.plot(steps, smooth(values, window), color=colour, label=label, marker=marker)


def _one_line(records: Records, key: str, label: str, colour: str) -> "Figure | None":
    if all(math.isnan(v) for v in series(records.metrics, key)):
        return None
    figure, (axes,) = _panels()
    _noisy_line(axes, records.metrics, key, colour, None)
    axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1e-6))
    axes.set_ylabel(label)
    _step_axis(axes)
    return figure


def _share_lines(records: Records, lines: Sequence[tuple[str, str, str]], axis_label: str) -> "Figure | None":
    present = [line for line in lines if not all(math.isnan(v) for v in series(records.metrics, line[0]))]
    if not present:
        return None
    figure, (axes,) = _panels()
    for key, label, colour in present:
        values = series(records.metrics, key)
        marker = "o" if len(values) < 3 else None
        window = min(MAX_WINDOW, len(values) // 20 * 2 + 1)
        axes.plot(_steps(records.metrics), smooth(values, window), color=colour, label=label, marker=marker)
    _step_axis(axes)
    _share_axis(axes, axis_label)
    _legend(figure)
    return figure


def _evaluated_line(axes: "Axes", evaluations: list[Record], k: int, colour: str) -> None:
    steps, estimates = [], []
    for evaluation in evaluations:
        name = main_set(evaluation["sets"])
        estimate = name and pass_at(evaluation["sets"][name], k)
        if estimate:
            steps.append(evaluation["step"])
            estimates.append(estimate)
    if steps:
        name = (main_set(evaluations[0]["sets"]) or "").replace("_", "-")
        _points(axes, steps, estimates, colour, f"{name} pass@{k}")


def _points(
    axes: "Axes", x: Sequence[float], estimates: list[Estimate], colour: str, label: str, line: str = "-"
) -> None:
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


def _both(records: Records) -> list[tuple[Scores, str, str]]:
    both = [(records.before, "before", BEFORE), (records.after, "after", AFTER)]
    return [entry for entry in both if entry[0]]


def _set_names(records: Records) -> list[str]:
    return list(records.before | records.after)


def _level_names(records: Records, set_name: str) -> list[str]:
    scores = [s.get(set_name, {}).get("by_level", {}) for s in (records.before, records.after)]
    return sorted(scores[0] | scores[1], key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which steps-10 comes after steps-9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.replace("-", " ").split()]


def _pass_at_line(axes: "Axes", scores: Record, label: str, colour: str) -> None:
    points = {int(k): pass_at(scores, k) for k in scores.get("pass_at", {})}
    known = sorted((k, estimate) for k, estimate in points.items() if estimate)
    if known:
        _points(axes, [k for k, _ in known], [estimate for _, estimate in known], colour, label)
        axes.set_xticks(sorted({*(round(tick) for tick in axes.get_xticks() if tick in points), *points}))


def _level_points(
    axes: "Axes", scores: Scores, levels: list[tuple[str, str]], side: float, label: str, colour: str
) -> None:
    x, estimates = [], []
    for place, (name, level) in enumerate(levels):
        estimate = pass_at(scores.get(name, {}).get("by_level", {}).get(level, {}), 1)
        if estimate:
            x.append(place + side)
            estimates.append(estimate)
    if x:
        _points(axes, x, estimates, colour, label, line="")


def _mark_sets(axes: "Axes", names: list[str]) -> None:
    """Name the set over its levels, with a line where one set ends and the next begins."""
    for place, name in enumerate(names):
        if place == 0 or names[place - 1] != name:
            axes.text(place - 0.45, 1.04, name.replace("_", " "), va="bottom", color="#5B616B")
            if place:
                axes.axvline(place - 0.5, color=GREY, linewidth=1, linestyle=":")


def _rho_curve(axes: "Axes", beta: Any, rho: Any) -> None:
    if not isinstance(beta, int | float) or rho not in ("tanh", "constant"):
        return
    x = [i / 100 for i in range(101)]
    y = [beta * (tanh_rho(v) if rho == "tanh" else 1.0) for v in x]
    label = f"{beta:g} × (tanh(accuracy) + 1) / 2" if rho == "tanh" else f"constant {beta:g}"
    axes.plot(x, y, color=GREY, linewidth=1.6, label=label)


def _phase_names(metrics: list[Record]) -> list[str]:
    found = {key.removeprefix("seconds/") for record in metrics for key in record if key.startswith("seconds/")}
    known = [name for name in PHASE_ORDER if name in found]
    names = known + sorted(found - set(known))
    return [*names, "other"] if names and any("seconds" in record for record in metrics) else names


def _phase_seconds(metrics: list[Record], name: str) -> list[float]:
    """Seconds of one phase in every step; "other" is what the step took beyond its timed phases."""
    if name == "other":
        return [max(0.0, _seconds(record, "seconds") - _timed(record)) for record in metrics]
    return [_seconds(record, f"seconds/{name}") for record in metrics]


def _timed(record: Record) -> float:
    return sum(_seconds(record, key) for key in record if key.startswith("seconds/"))


def _seconds(record: Record, key: str) -> float:
    """A phase that a step did without took no time."""
    value = _number(record.get(key))
    return 0.0 if math.isnan(value) else value


def _phase_colours(num: int) -> list[str]:
    return [PHASE_COLOURS[i % len(PHASE_COLOURS)] for i in range(num - 1)] + ["#C9CDD3"]


def _edges(steps: Sequence[int]) -> list[float]:
    """Borders between the steps' columns: half-way to each neighbour, and as far beyond both ends."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


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
        _edges(_steps(rows)), [i / bins for i in range(bins + 1)], by_bin, cmap="Blues", vmin=0, vmax=top
    )
    bar = figure.colorbar(mesh, ax=axes, label="share of questions", pad=0.02, format=_percent(), extend="max")
    bar.outline.set_visible(False)
    axes.grid(visible=False)
    axes.set_ylim(0, 1)
    axes.set_ylabel("estimated pass rate of a question")
    _step_axis(axes)


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
