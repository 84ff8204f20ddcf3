"""The figures of a run's report in reading order, each with a caption that says how to read it.

A figure without data yet has no PNG; the report shows a note in its place.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from expo.reporting.figures.curriculum import draw_curriculum
from expo.reporting.figures.drawing import STYLE, RenderedFigure, as_png
from expo.reporting.figures.evaluations import draw_levels, draw_pass_at_k
from expo.reporting.figures.steps import (
    draw_accuracy,
    draw_beta,
    draw_clip_fractions,
    draw_completion_length,
    draw_entropy,
    draw_health,
    draw_kl,
    draw_phases,
)
from expo.reporting.reader import TrainingHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[..., "Figure | None"]

# function, title, whether it takes the full width (then its width is an argument too), caption
FIGURES: tuple[tuple[Draw, str, bool, str], ...] = (
    (
        draw_accuracy,
        "Accuracy and pass@k",
        True,
        "The blue line, held-out pass@1, should rise by more than its 95 % error bars while the lines "
        "above it do not fall. The grey line is the accuracy on the questions drawn for training: a "
        "curriculum that prefers half-solved questions may keep it near one half while the policy improves.",
    ),
    (
        draw_pass_at_k,
        "pass@k before and after",
        True,
        "A gain at k = 1 alone means that the policy became more reliable on questions it could already "
        "solve; a gain at large k means that it solves new questions. Ideally the blue curve lies above the "
        "orange one everywhere; where they cross, the policy lost diversity for accuracy.",
    ),
    (
        draw_levels,
        "pass@1 by level",
        True,
        "The distance between the two points of a level is its gain. Ideally every level gains; easy "
        "levels have little left to gain, and the hardest levels improve last.",
    ),
    (
        draw_beta,
        "KL coefficient against accuracy",
        False,
        "Every point should lie on the curve of the configuration: with EXPO the coefficient grows with "
        "accuracy, so that the KL penalty is weak while the policy fails and strong once it succeeds. A "
        "point off the curve indicates a bug.",
    ),
    (
        draw_kl,
        "KL to the reference",
        False,
        "It starts at zero and grows as the policy learns. A slow rise that flattens is healthy; a sudden "
        "jump suggests too large a learning rate, and accuracy often falls with it.",
    ),
    (
        draw_entropy,
        "Entropy",
        False,
        "The uncertainty of the policy about the next token. It falls as the policy becomes confident, "
        "ideally slowly. Near zero, all replies to a question are the same and give no learning signal.",
    ),
    (
        draw_completion_length,
        "Reply length",
        False,
        "Ideally the length stabilises. A rise to the limit with more and more truncated replies means "
        "that the policy rambles; a collapse means that it no longer reasons before it answers.",
    ),
    (
        draw_clip_fractions,
        "Clipped tokens",
        False,
        "Share of tokens whose ratio to the sampling policy left the clip range, so that the surrogate "
        "has no gradient for them. With one update per batch both are exactly zero; with more, a few "
        "per cent are usual, and tens of per cent suggest too large a learning rate.",
    ),
    (
        draw_health,
        "Replies and groups without signal",
        False,
        "Unparsed and truncated replies and verifier timeouts should approach zero. A group whose "
        "rewards are all equal, with shaping terms included, has advantage 0, so only a KL penalty moves the policy "
        "there: that share rises as questions are mastered, and a good curriculum keeps it low.",
    ),
    (
        draw_phases,
        "Time per phase",
        True,
        "How long each phase of a step takes. Ideally the total is constant and nearly all of it is rollout "
        "and update; investigate a phase that takes longer as the run goes on.",
    ),
    (
        draw_curriculum,
        "The curriculum's pass rates",
        True,
        "Each column is the distribution of all questions over their estimated pass rate at that step. "
        "All start at one value and then spread; ideally the distribution moves upwards. The last panel "
        "is the sampling weight by pass rate: training concentrates where it is largest.",
    ),
)


def draw_figures(history: TrainingHistory) -> list[RenderedFigure]:
    """All figures of the report, in reading order."""
    import matplotlib

    figures = []
    with matplotlib.rc_context(STYLE):
        for draw, title, is_wide, caption in FIGURES:
            name = draw.__name__.removeprefix("draw_")
            png = _png(draw(history))
            narrow_png = _png(draw(history, "narrow")) if is_wide and png is not None else None
            figures.append(RenderedFigure(name, title, caption, is_wide, png, narrow_png))
    return figures


def _png(figure: "Figure | None") -> bytes | None:
    return None if figure is None else as_png(figure)
