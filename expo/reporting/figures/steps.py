"""Pictures of training, step by step.

Everything drawn is what the run recorded; only the curve `beta * rho(accuracy)` is computed here (arXiv 2605.11403,
eq. 5), from the run's own configuration.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expo.reporting.figures.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    error_bars,
    legend,
    make_panels,
    share_axis,
    step_axis,
    step_edges,
)
from expo.reporting.reader import Record, Records, main_set, pass_at, series, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
PHASE_ORDER = ("rollout", "reward", "reference", "old", "update", "curriculum", "checkpoint")
MAX_WINDOW = 51  # steps averaged into a smoothed line, at most


def tanh_rho(accuracy: float) -> float:
    """rho(x) = (tanh(x) + 1) / 2, the default scaling of beta (eq. 5)."""
    return (math.tanh(accuracy) + 1) / 2


def draw_accuracy(records: Records) -> "Figure | None":
    """Accuracy of each step's rollouts, and held-out pass@k where it was evaluated."""
    if not records.metrics and not records.evaluations:
        return None
    figure, (axes,) = make_panels(wide=True)
    _noisy_line(axes, records.metrics, "accuracy", GREY, "training rollouts, each step")
    for k, colour in ((1, BLUE), (8, GREEN), (32, VERMILION)):
        _evaluated_line(axes, records.evaluations, k, colour)
    step_axis(axes)
    share_axis(axes, "share of questions solved", full=True)
    legend(figure)
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
        error_bars(axes, steps, estimates, colour, f"{name} pass@{k}")


def draw_beta(records: Records) -> "Figure | None":
    """beta_eff against the accuracy it was made from, over the curve of the configuration."""
    if not records.metrics:
        return None
    figure, (axes,) = make_panels()
    _rho_curve(axes, records.setting("kl", "beta"), records.setting("kl", "rho"))
    points = axes.scatter(
        series(records.metrics, "accuracy"),
        series(records.metrics, "beta_eff"),
        c=steps_of(records.metrics),
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
    legend(figure)
    return figure


def _rho_curve(axes: "Axes", beta: Any, rho: Any) -> None:
    if not isinstance(beta, int | float) or rho not in ("tanh", "constant"):
        return
    x = [i / 100 for i in range(101)]
    y = [beta * (tanh_rho(v) if rho == "tanh" else 1.0) for v in x]
    label = f"{beta:g} × (tanh(accuracy) + 1) / 2" if rho == "tanh" else f"constant {beta:g}"
    axes.plot(x, y, color=GREY, linewidth=1.6, label=label)


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


def _one_line(records: Records, key: str, label: str, colour: str) -> "Figure | None":
    if not _is_recorded(records.metrics, key):
        return None
    figure, (axes,) = make_panels()
    _noisy_line(axes, records.metrics, key, colour, None)
    axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1e-6))
    axes.set_ylabel(label)
    step_axis(axes)
    return figure


def _noisy_line(axes: "Axes", metrics: list[Record], key: str, colour: str, label: str | None) -> None:
    """Every step faintly, and their running mean."""
    if not _is_recorded(metrics, key):
        return
    window = _window(len(metrics))
    if window > 1:
        axes.plot(steps_of(metrics), series(metrics, key), color=colour, alpha=0.35, linewidth=1)
        label = label and f"{label} (bold: mean of {window})"
    _mean_line(axes, metrics, key, colour, label)


def _mean_line(axes: "Axes", metrics: list[Record], key: str, colour: str, label: str | None) -> None:
    """A running mean over a twentieth of the run."""
    marker = "o" if len(metrics) < 3 else None  # a line through one point cannot be seen
    means = smooth(series(metrics, key), _window(len(metrics)))
    axes.plot(steps_of(metrics), means, color=colour, label=label, marker=marker)


def _window(num_steps: int) -> int:
    return min(MAX_WINDOW, num_steps // 20 * 2 + 1)


def _is_recorded(metrics: list[Record], key: str) -> bool:
    return not all(math.isnan(v) for v in series(metrics, key))


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


def _share_lines(records: Records, lines: Sequence[tuple[str, str, str]], axis_label: str) -> "Figure | None":
    present = [line for line in lines if _is_recorded(records.metrics, line[0])]
    if not present:
        return None
    figure, (axes,) = make_panels()
    for key, label, colour in present:
        _mean_line(axes, records.metrics, key, colour, label)
    step_axis(axes)
    share_axis(axes, axis_label)
    legend(figure)
    return figure


def draw_phases(records: Records) -> "Figure | None":
    """Seconds of each step, stacked by phase."""
    names = _phase_names(records.metrics)
    if not names:
        return None
    figure, (axes,) = make_panels(wide=True)
    # every step is drawn from half a step before it to half a step after, so that one step alone is seen too
    edges = step_edges(steps_of(records.metrics))
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
    step_axis(axes)
    axes.set_ylabel("seconds per step")
    legend(figure)
    return figure


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
    (value,) = series([record], key)
    return 0.0 if math.isnan(value) else value


def _phase_colours(num: int) -> list[str]:
    return [PHASE_COLOURS[i % len(PHASE_COLOURS)] for i in range(num - 1)] + ["#C9CDD3"]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred mean of `window` neighbours, NaN left out; shorter at both ends."""
    half = window // 2
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _step_colours() -> Any:
    """Early to late; no end is near white or black, since a page in dark mode turns lightness around."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("steps", (BLUE, PURPLE, VERMILION))
