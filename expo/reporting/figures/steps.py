"""Figures of training metrics by step.

All values are as recorded, except the curve `beta * rho(accuracy)`, which is computed from the run's configuration
(arXiv 2605.11403, eq. 5).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expo.reporting.clean import label as label_text
from expo.reporting.clean import number
from expo.reporting.comparison import headline_set, pass_at
from expo.reporting.figures.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Width,
    error_bars,
    legend,
    make_panels,
    share_axis,
    step_axis,
    step_edges,
)
from expo.reporting.reader import Record, TrainingHistory, series, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
PHASE_ORDER = ("rollout", "reward", "reference", "old", "update", "curriculum", "checkpoint")
MAX_WINDOW = 51  # largest number of steps that a smoothed line averages


def tanh_rho(accuracy: float) -> float:
    """rho(x) = (tanh(x) + 1) / 2, the default scaling of beta (eq. 5)."""
    return (math.tanh(accuracy) + 1) / 2


def draw_accuracy(history: TrainingHistory, width: Width = "full") -> "Figure | None":
    """Accuracy of each step's rollouts, and held-out pass@k at the evaluated steps."""
    if not history.metrics and not history.evaluations:
        return None
    figure, (axes,) = make_panels(width=width)
    _noisy_line(axes, history.metrics, "accuracy", GREY, "training rollouts, each step")
    for k, colour in ((1, BLUE), (8, GREEN), (32, VERMILION)):
        _evaluated_line(axes, history.evaluations, k, colour)
    step_axis(axes)
    share_axis(axes, "share of questions solved", full=True)
    legend(figure)
    return figure


def _evaluated_line(axes: "Axes", evaluations: list[Record], k: int, colour: str) -> None:
    steps, estimates = [], []
    for evaluation in evaluations:
        name = headline_set(evaluation["sets"])
        estimate = name and pass_at(evaluation["sets"][name], k)
        if estimate:
            steps.append(evaluation["step"])
            estimates.append(estimate)
    if steps:
        name = label_text((headline_set(evaluations[0]["sets"]) or "").replace("_", "-"))
        error_bars(axes, steps, estimates, colour, f"{name} pass@{k}")


def draw_beta(history: TrainingHistory) -> "Figure | None":
    """beta_eff against the accuracy that it was computed from, over the configured curve."""
    if not history.metrics:
        return None
    figure, (axes,) = make_panels()
    _rho_curve(axes, history.setting("kl", "beta"), history.setting("kl", "rho"))
    points = axes.scatter(
        series(history.metrics, "accuracy"),
        series(history.metrics, "beta_eff"),
        c=steps_of(history.metrics),
        cmap=_step_colours(),
        s=26,
        zorder=3,
        edgecolors="white",
        linewidths=0.4,
    )
    figure.colorbar(points, ax=axes, label="step", pad=0.02).outline.set_visible(False)
    axes.set_xlim(-0.02, 1.02)
    if history.setting("kl", "rho") != "tanh":
        axes.set_ylim(bottom=0)
    axes.set_xlabel("accuracy of the step's rollouts")
    axes.set_ylabel("KL coefficient beta_eff")
    legend(figure)
    return figure


def _rho_curve(axes: "Axes", beta: Any, rho: Any) -> None:
    beta = number(beta)
    if beta is None or rho not in ("tanh", "constant"):
        return
    x = [i / 100 for i in range(101)]
    y = [beta * (tanh_rho(v) if rho == "tanh" else 1.0) for v in x]
    label = f"{beta:g} × (tanh(accuracy) + 1) / 2" if rho == "tanh" else f"constant {beta:g}"
    axes.plot(x, y, color=GREY, linewidth=1.6, label=label)


def draw_kl(history: TrainingHistory) -> "Figure | None":
    """KL to the reference policy per step."""
    estimator = history.setting("kl", "estimator")
    estimator = label_text(estimator if isinstance(estimator, str) else "k3").upper()
    return _one_line(history, "kl", f"KL to the reference\n(nats per token, {estimator})", VERMILION)


def draw_entropy(history: TrainingHistory) -> "Figure | None":
    """Entropy of the policy per step."""
    return _one_line(history, "entropy", "entropy (nats per token)", GREEN)


def draw_completion_length(history: TrainingHistory) -> "Figure | None":
    """Mean length of the replies per step."""
    return _one_line(history, "completion_length", "mean reply length (tokens)", PURPLE)


def _one_line(history: TrainingHistory, key: str, label: str, colour: str) -> "Figure | None":
    if not _is_recorded(history.metrics, key):
        return None
    figure, (axes,) = make_panels()
    _noisy_line(axes, history.metrics, key, colour, None)
    axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1e-6))
    axes.set_ylabel(label)
    step_axis(axes)
    return figure


def _noisy_line(axes: "Axes", metrics: list[Record], key: str, colour: str, label: str | None) -> None:
    """Every step as a faint line, and their running mean."""
    if not _is_recorded(metrics, key):
        return
    window = _window(len(metrics))
    if window > 1:
        axes.plot(steps_of(metrics), series(metrics, key), color=colour, alpha=0.35, linewidth=1)
        label = label and f"{label} (bold: mean of {window})"
    _mean_line(axes, metrics, key, colour, label)


def _mean_line(axes: "Axes", metrics: list[Record], key: str, colour: str, label: str | None) -> None:
    """A running mean over about a tenth of the run, at most `MAX_WINDOW` steps."""
    marker = "o" if len(metrics) < 3 else None  # a line needs two points to be visible
    means = smooth(series(metrics, key), _window(len(metrics)))
    axes.plot(steps_of(metrics), means, color=colour, label=label, marker=marker)


def _window(num_steps: int) -> int:
    return min(MAX_WINDOW, num_steps // 20 * 2 + 1)


def _is_recorded(metrics: list[Record], key: str) -> bool:
    return not all(math.isnan(v) for v in series(metrics, key))


def draw_clip_fractions(history: TrainingHistory) -> "Figure | None":
    """Share of tokens whose ratio was clipped, below and above."""
    lines = (("clip_low_fraction", "clipped below", BLUE), ("clip_high_fraction", "clipped above", VERMILION))
    return _share_lines(history, lines, "share of reply tokens")


def draw_health(history: TrainingHistory) -> "Figure | None":
    """Shares of replies and groups that give no learning signal."""
    lines = (
        ("zero_variance_fraction", "groups of equal rewards", GREY),
        ("unparsed_fraction", "unparsed replies", VERMILION),
        ("truncated_fraction", "truncated replies", BLUE),
        ("timeout_fraction", "verifier timeouts", GREEN),
    )
    return _share_lines(history, lines, "share of groups or replies")


def _share_lines(history: TrainingHistory, lines: Sequence[tuple[str, str, str]], axis_label: str) -> "Figure | None":
    present = [line for line in lines if _is_recorded(history.metrics, line[0])]
    if not present:
        return None
    figure, (axes,) = make_panels()
    for key, label, colour in present:
        _mean_line(axes, history.metrics, key, colour, label)
    step_axis(axes)
    share_axis(axes, axis_label)
    legend(figure)
    return figure


def draw_phases(history: TrainingHistory, width: Width = "full") -> "Figure | None":
    """Seconds of each step, stacked by phase."""
    names = _phase_names(history.metrics)
    if not names:
        return None
    figure, (axes,) = make_panels(width=width)
    # each step extends half a step to both sides, so that a single step is visible too
    edges = step_edges(steps_of(history.metrics))
    lower = [0.0] * len(edges)
    total = sum(sum(_phase_seconds(history.metrics, name)) for name in names) or 1.0
    for name, colour in zip(names, _phase_colours(len(names)), strict=True):
        seconds = _phase_seconds(history.metrics, name)
        upper = [low + s for low, s in zip(lower, [*seconds, seconds[-1]], strict=True)]
        label = f"{label_text(name)} {sum(seconds) / total:.0%}"
        axes.fill_between(edges, lower, upper, step="post", color=colour, label=label, linewidth=0)
        lower = upper
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    step_axis(axes)
    axes.set_ylabel("seconds per step")
    legend(figure)
    return figure


def _phase_names(metrics: list[Record]) -> list[str]:
    recorded = {key.removeprefix("seconds/") for record in metrics for key in record if key.startswith("seconds/")}
    known = [name for name in PHASE_ORDER if name in recorded]
    names = known + sorted(recorded - set(known))
    return [*names, "other"] if names and any("seconds" in record for record in metrics) else names


def _phase_seconds(metrics: list[Record], name: str) -> list[float]:
    """Seconds of one phase in every step; "other" is the time outside the timed phases."""
    if name == "other":
        return [max(0.0, _seconds(record, "seconds") - _timed(record)) for record in metrics]
    return [_seconds(record, f"seconds/{name}") for record in metrics]


def _timed(record: Record) -> float:
    return sum(_seconds(record, key) for key in record if key.startswith("seconds/"))


def _seconds(record: Record, key: str) -> float:
    """The recorded seconds, 0 for a phase that the step did not have."""
    (value,) = series([record], key)
    return 0.0 if math.isnan(value) else value


def _phase_colours(num: int) -> list[str]:
    return [PHASE_COLOURS[i % len(PHASE_COLOURS)] for i in range(num - 1)] + ["#C9CDD3"]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values that ignores NaN; the window is shorter at both ends."""
    half = window // 2
    means = []
    for i in range(len(values)):
        neighbours = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        means.append(sum(neighbours) / len(neighbours) if neighbours else math.nan)
    return means


def _step_colours() -> Any:
    """Colours from early to late steps; neither end is near white or black, since dark mode inverts lightness."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("steps", (BLUE, PURPLE, VERMILION))
