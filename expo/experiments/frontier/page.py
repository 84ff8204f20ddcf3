"""The results of a plan as a section of a Markdown page, between its two marks, with a figure beside the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expo.experiments.ablation.page import with_section
from expo.experiments.ablation.paired import mean_over_seeds
from expo.experiments.frontier.plan import Plan
from expo.experiments.frontier.tables import Results, without_a_part_of_the_extension
from expo.reporting.figures import draw_lines
from expo.runtime.atomic_io import write_bytes_whole

MARKS = ("<!-- frontier: begin -->", "<!-- frontier: end -->")
CURVE_POINTS = 41
CURVE_ARMS = ("grpo", "expo", "akl", "gcs", "grpo-dynamic", "expo-dynamic")  # more lines cannot be told apart


def section(tables: str) -> str:
    """The tables of `report` and the figure, which is in the folder `frontier` next to the page."""
    return f"""### Frontier results

{tables}
pass@1 on the held-out questions, 16 replies each; lines are means over seeds, bands are standard errors:

![pass@1 of six arms along the token budget](frontier/curves.png)
"""


def curves_png(plan: Plan, results: Results) -> bytes:
    """pass@1 along the token budget, by KL coefficient and arm."""
    settled = without_a_part_of_the_extension(plan, results)
    panels = {f"beta = {beta:g}": _lines(plan, settled, beta) for beta in plan.betas}
    return draw_lines(panels, "thousand reply tokens sampled", "held-out pass@1")


def _lines(plan: Plan, results: Results, beta: float) -> dict[str, list[tuple[float, float, float]]]:
    grid, lines = np.linspace(0, plan.reply_tokens, CURVE_POINTS), {}
    for arm in CURVE_ARMS:
        found = [result for key, result in sorted(results.items()) if (key.arm, key.beta) == (arm, beta)]
        if len(found) > 1:
            values = np.stack([_along(result["curve"], grid) for result in found], axis=1)
            lines[arm] = [
                (float(x) / 1000, *mean_over_seeds(row.tolist())) for x, row in zip(grid, values, strict=True)
            ]
    return lines


def _along(curve: Sequence[Sequence[float]], grid: Any) -> Any:
    """pass@1 at the reply tokens of `grid`, interpolated linearly between the evaluations of one run."""
    _, tokens, values = zip(*curve, strict=True)
    return np.interp(grid, tokens, values)


def write_section(page: Path, plan: Plan, results: Results, tables: str) -> None:
    """Writes the section and the figure.

    Raises: ConfigError if the page has no marks.
    """
    text = with_section(page, section(tables), MARKS)
    folder = page.parent / "frontier"
    folder.mkdir(exist_ok=True)
    write_bytes_whole(folder / "curves.png", curves_png(plan, results))
    write_bytes_whole(page, text.encode())
