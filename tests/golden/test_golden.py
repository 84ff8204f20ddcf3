"""Today's numbers are the recorded ones: equal bits on a machine that has a record, nearly equal on any other."""

import copy
from pathlib import Path

import pytest

from tests.golden.digests import HOW_TO_RECORD, differences, load
from tests.golden.trees import ROOT, record_of

MOST_LINES = 20


def said(part: str, lines: list[str]) -> str:
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join([f"{len(lines)} golden entries of {part} differ", *lines[:MOST_LINES], *more, HOW_TO_RECORD])


@pytest.mark.parametrize("path", ["torch", pytest.param("kernels", marks=pytest.mark.slow)])
def test_losses_metrics_and_gradients_are_the_recorded_ones(path: str, tmp_path: Path) -> None:
    expected, is_exact = load(path)
    lines = differences(expected, record_of(path, ROOT, tmp_path), exact=is_exact)
    assert not lines, said(path, lines)
