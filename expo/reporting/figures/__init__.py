"""The figures of reports, drawn by matplotlib as PNG."""

from expo.reporting.figures.drawing import BLUE, GREY, STYLE, VERMILION, RenderedFigure, draw_lines
from expo.reporting.figures.evaluations import draw_curves
from expo.reporting.figures.run import FIGURES, draw_figures

__all__ = [
    "BLUE",
    "FIGURES",
    "GREY",
    "STYLE",
    "VERMILION",
    "RenderedFigure",
    "draw_curves",
    "draw_figures",
    "draw_lines",
]
