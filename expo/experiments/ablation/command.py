"""The ablation in one command: `python -m expo.ablation --out DIR`.

Every combination of arm, pool and seed is an ordinary training run of the embedded task with the same budget of sampled
tokens. Finished runs are skipped and unfinished ones resumed, so the same command continues an interrupted ablation. At
the end DIR contains results.json, results.md and two figures; `python -m expo.ablation.page` puts them into a page.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expo.config import RunConfig
from expo.errors import ConfigError, Interrupted
from expo.experiments.ablation.page import tables, write_record
from expo.experiments.ablation.plan import ARMS, BASELINE, POOLS, PROGRAM, SHARED, PlannedRun, plan_runs, with_arms
from expo.experiments.ablation.results import as_record, read_outcome
from expo.experiments.ablation.runs import run_all
from expo.experiments.frontier import command as frontier
from expo.reporting.reader import starts_of
from expo.run.environment import ENVIRONMENT
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.cli import field_names
from expo.runtime.console import Display
from expo.runtime.endings import errors_on_one_line
from expo.runtime.nearest import nearest
from expo.runtime.parser import HELP_HINT, OneLineParser

REPLY_TOKENS = 225_000  # 80 steps of the balanced pool: about half of the default run

BOUNDS = {"seeds": (2, 10_000), "jobs": (1, 1024), "tokens": (1, 10**15)}


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        usage="%(prog)s --out DIR [options] [--section.field=value ...]",
        description="GRPO, each of EXPO's two parts alone, and both: paired runs on two pools of the embedded task.",
        epilog="--section.field=value applies to every run; python -m expo.train --help-all lists the fields. "
        "--plan NAME runs a fixed plan instead; --plan NAME --help shows its options.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all runs and results")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="concurrent runs (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=REPLY_TOKENS, metavar="N", help="reply tokens per run (default: %(default)s)"
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help=f"arms; {BASELINE} always runs")
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS), help="question pools")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=--A.B=V,...",
        help="an additional arm: its name, and flags that override EXPO's settings",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`. Exit codes: 0 if all runs succeeded, 1 if one failed, 2 if the arguments are invalid,
    130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if frontier.is_planned(arguments):
        return frontier.main(arguments, prog)
    options, flags = _parser(prog).parse_known_args(arguments)
    with errors_on_one_line(prog):
        settings, runs = _plan(options, flags, prog)
        display = Display()
        try:
            run_all(runs, options.jobs, display)
        except KeyboardInterrupt:
            raise Interrupted("stopped; run the same command again to continue") from None
        display.line(_write_results(runs, settings, options.out))
    return 0


def _plan(options: argparse.Namespace, flags: Sequence[str], prog: str) -> tuple[dict[str, Any], list[PlannedRun]]:
    for flag in flags:
        if not re.fullmatch(r"--\w+\.\w+=.*", flag, flags=re.DOTALL):
            raise ConfigError(_unknown(flag, [f"--{name}" for name in (*vars(options), *field_names(RunConfig))]))
    for name, (least, most) in BOUNDS.items():
        if not least <= getattr(options, name) <= most:
            raise ConfigError(f"--{name} is out of range; expected {least} to {most}")
    selected = {name: arm_flags for name, arm_flags in ARMS.items() if name in (BASELINE, *options.arms)}
    arms = with_arms(selected, options.arm)
    shared = [*SHARED, f"--run.reply_tokens={options.tokens}", *flags]
    settings = {
        "reply_tokens": options.tokens,
        "seeds": options.seeds,
        "pools": options.pools,
        "arms": {name: list(arm_flags) for name, arm_flags in arms.items()},
        "shared": shared,
    }
    return settings, plan_runs(options.out, arms, options.pools, options.seeds, shared, prog)


def _unknown(flag: str, known: Sequence[str]) -> str:
    if flag in known:
        return f"{flag} has no value; give it as {flag}=VALUE"
    return f"unknown argument {flag}{nearest(flag.split('=')[0], known, HELP_HINT)}"


def _write_results(runs: Sequence[PlannedRun], settings: dict[str, Any], out: Path) -> str:
    """Writes results.json, results.md and the figures, and returns the tables."""
    environment = json.loads((runs[0].folder / ENVIRONMENT).read_text(encoding="utf-8"))
    first = starts_of(environment)[0]
    facts = {name: first[name] for name in ("started", "versions", "machine")}
    record = as_record([read_outcome(run) for run in runs], settings, facts)
    text = tables(record)
    write_bytes_whole(out / "results.md", text.encode())
    write_record(out, record)
    return text
