"""Pictures: of a run's report, of evaluations beside each other, and what all of them share."""

from expo.reporting.figures.drawing import BLUE, GREY, STYLE, VERMILION, Picture, draw_lines
from expo.reporting.figures.evaluations import draw_curves
from expo.reporting.figures.run import PICTURES, draw_pictures

__all__ = [
    "BLUE",
    "GREY",
    "PICTURES",
    "STYLE",
    "VERMILION",
    "Picture",
    "draw_curves",
    "draw_lines",
    "draw_pictures",
]
