"""Kills a run on two ranks at random moments: `python -m tests.ranks.kill_ranks FOLDER NUMBER`.

Each kill hits one rank or both as they enter a phase; the next launch resumes the run. It prints the kills, and ends
with an error if the bits of the run differ from those of one that was never killed.
"""

import random
import sys
from pathlib import Path

from tests.ranks.running import argv, launch, log_of, outcome_of, run_launches

PHASES = ("start", "rollout", "reward", "reference", "gradient", "update", "weights", "checkpoint", "record", "sync")
SETTINGS = {"run__checkpoint_every": 2, "evaluation__every": 4, "policy__zero_stage": 2}


def killed_plan(folder, number, seed=0, **settings):
    """The launches: a run that is never killed, `number` launches of another that are, and its last launch."""
    generator = random.Random(seed)
    settings = {**SETTINGS, "run__steps": 2 * number + 4, **settings}
    command = argv(folder, "run", **settings)
    plan = [launch("whole", argv(folder, "whole", **settings))]
    for kill in range(number):
        phase = generator.choice(PHASES)
        nth = 1 if phase in ("start", "checkpoint") else generator.randint(1, 2)
        fault = {"phase": phase, "do": "kill", "nth": nth}
        on_ranks = generator.choice([[0], [1], [0, 1]])
        resume = ["--resume"] if kill else []
        plan.append(launch(f"kill-{kill}", [*command, *resume], fault={**fault, "on_ranks": on_ranks}))
    return [*plan, launch("last", [*command, "--resume"])]


def run_killed(folder, number, **settings):
    """Runs the plan; one line for each kill, with the exit codes of the ranks."""
    plan = killed_plan(folder, number, **settings)
    codes = run_launches(folder, plan)
    assert codes["whole"] == codes["last"] == [0, 0], log_of(folder, "last") + log_of(folder, "last", rank=1)
    kills = {entry["name"]: entry["fault"] for entry in plan if entry["fault"]}
    for name, fault in kills.items():
        assert all(codes[name][rank] == -9 for rank in fault["on_ranks"]), (name, fault, codes[name])
        assert 0 not in codes[name], (name, fault, codes[name])
    assert outcome_of(folder / "run") == outcome_of(folder / "whole")
    return [
        f"{fault['phase']} {fault['nth']}, ranks {fault['on_ranks']}: {codes[name]}" for name, fault in kills.items()
    ]


if __name__ == "__main__":
    print(*run_killed(Path(sys.argv[1]).resolve(), int(sys.argv[2])), sep="\n")
