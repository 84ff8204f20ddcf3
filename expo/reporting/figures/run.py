"""The pictures of a run's report in reading order, each with what to look at in it.

A picture whose records are not there yet has no PNG, and the report says so in its place.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from expo.reporting.figures.curriculum import draw_curriculum
from expo.reporting.figures.drawing import STYLE, Picture, as_png
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
from expo.reporting.reader import Records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def draw_pictures(records: Records) -> list[Picture]:
    """Every picture of the report, in reading order."""
    import matplotlib

    pictures = []
    with matplotlib.rc_context(STYLE):
        for draw, title, wide, sentence in PICTURES:
            figure = draw(records)
            png = None if figure is None else as_png(figure)
            pictures.append(Picture(draw.__name__.removeprefix("draw_"), title, sentence, wide, png))
    return pictures
