"""docs/losses.md: its examples run as printed, in order, and every objective in its tables exists."""

import re
from pathlib import Path
from typing import get_args

from expo_kernels import Objective
from expo_kernels.objective import Surrogate

TEXT = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")


def test_the_examples_run_as_printed(capsys):
    names = {}
    for example in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(example, names)
    assert names["hidden"].grad.isfinite().all()
    assert 'clip_high=0.28 has no effect with surrogate "sapo"' in capsys.readouterr().out


def test_every_objective_of_the_tables_can_be_made():
    tables = [line for line in TEXT.splitlines() if line.startswith("|")]
    made = [
        eval(f"Objective{call}", {"Objective": Objective})
        for line in tables
        for call in re.findall(r"`(\([^`]*\))`", line)
    ]
    assert len(made) > 20
    assert {objective.surrogate for objective in made} == set(get_args(Surrogate))
