"""A named plan in one command: `python -m expo.ablation --plan frontier`.

Finished runs are those whose small result is in the results folder, which is committed; they are not run again, on
whichever machine. Unfinished ones are resumed from their checkpoints in --out. Ctrl-C stops all of them, and the same
command continues.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from expo.errors import ConfigError, Interrupted
from expo.experiments.ablation.runs import Job, run_all
from expo.experiments.frontier.page import MARKS, write_section
from expo.experiments.frontier.plan import PLANS, Plan
from expo.experiments.frontier.run import FrontierRun
from expo.experiments.frontier.tables import report
from expo.experiments.frontier.warm_starts import WarmStartJob
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.console import Display
from expo.runtime.endings import errors_on_one_line
from expo.runtime.parser import OneLineParser

MOST_JOBS = 1024


def is_planned(argv: Sequence[str]) -> bool:
    """Whether a command line of the ablation names a plan."""
    return any(argument.split("=")[0] == "--plan" for argument in argv)


def parser(prog: str) -> argparse.ArgumentParser:
    """The arguments of the ablation with --plan."""
    found = OneLineParser(
        prog=prog,
        usage="%(prog)s --plan NAME [options]",
        description="Runs a plan whose arms, seeds and measures are fixed, and resumes it.",
        allow_abbrev=False,
    )
    found.add_argument("--plan", required=True, choices=PLANS, help="which plan")
    found.add_argument("--out", type=Path, metavar="DIR", help="folder for the runs (default: runs/NAME)")
    found.add_argument(
        "--results", type=Path, metavar="DIR", help="folder of the small results (default: benchmarks/results/NAME)"
    )
    found.add_argument("--jobs", type=int, default=2, metavar="N", help="concurrent runs (default: %(default)s)")
    found.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms, and those that they depend on")
    found.add_argument("--extended", action="store_true", help="the further seeds of the primary comparison too")
    found.add_argument("--report", action="store_true", help="run nothing: write the tables of the finished runs")
    marks = " and ".join(MARKS)
    found.add_argument(
        "--page", type=Path, metavar="PAGE.md", help=f"a page with the lines {marks}, for the tables too"
    )
    return found


def main(argv: Sequence[str], prog: str) -> int:
    """The command line. Exit codes: as `expo.experiments.ablation.command.main`."""
    options = parser(prog).parse_args(argv)
    with errors_on_one_line(prog):
        plan: Plan = PLANS[options.plan]
        if not 1 <= options.jobs <= MOST_JOBS:
            raise ConfigError(f"--jobs = {options.jobs} is out of range; expected 1 to {MOST_JOBS}")
        out = options.out or Path("runs") / plan.name
        results = options.results or Path("benchmarks/results") / plan.name
        runs = [FrontierRun(plan, key, out, results) for key in plan.keys(extended=options.extended)]
        selected = _selected(runs, plan, options.arms)
        display = Display()
        if not options.report:
            starts = [WarmStartJob(results, out, seed) for seed in plan.warm_starts]
            missing: list[Job] = [start for start in starts if not start.is_finished]
            try:
                run_all([*missing, *selected], options.jobs, display)
            except KeyboardInterrupt:
                raise Interrupted("stopped; run the same command again to continue") from None
        display.line(write_report(plan, runs, results, options.page))
    return 0


def _selected(runs: Sequence[FrontierRun], plan: Plan, arms: Sequence[str] | None) -> list[FrontierRun]:
    if arms is None:
        return list(runs)
    unknown = [arm for arm in arms if arm not in plan.arms]
    if unknown:
        raise ConfigError(f"--arms {unknown[0]} is not an arm of {plan.name}; expected some of {', '.join(plan.arms)}")
    needed = {run.key.pair for run in runs if run.key.arm in arms}
    return [run for run in runs if run.key.arm in arms or run.key in needed]


def write_report(plan: Plan, runs: Sequence[FrontierRun], results: Path, page: Path | None = None) -> str:
    """Writes results.md of the finished runs, and into the page if one is given; returns it."""
    found = {run.key: run.result() for run in runs if run.is_finished}
    if not found:
        return f"no run of {plan.name} is finished"
    text = report(plan, found)
    write_bytes_whole(results / "results.md", text.encode())
    if page is not None:
        write_section(page, plan, found, text)
    return text
