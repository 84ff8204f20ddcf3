"""The plan of a run, `python -m expo.train CONFIG.yaml --dry-run`: what it needs, and whether it can start.

`checks.py` makes the checks of the run's start, `machine.py` says for which machine, `memory.py` and `duration.py`
estimate, `fit.py` searches settings that fit, `tables.py` writes it all down; this file puts them together.
"""

import os
from pathlib import Path

from expo.config import RunConfig
from expo.errors import ConfigError
from expo.planning.checks import Facts, check_run
from expo.planning.fit import Fit, find_fit, problem_of
from expo.planning.machine import Machine, bare_machine, for_config
from expo.planning.memory import GIB, Footprint
from expo.planning.tables import count, describe
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.cli import Invocation
from expo.runtime.stdout import write_stdout

NO_FIT = "take more or larger GPUs, a smaller model, or a lower data.max_prompt_tokens"


def print_plan(invocation: Invocation[RunConfig]) -> int:
    """Prints the plan of a run and returns the exit code, 0; with --fit, writes the configuration of that plan.

    Raises: ConfigError if the run cannot start; if it does not fit the GPUs, after the plan, with settings that do.
    """
    config, bare = invocation.config, bare_machine(invocation)
    machine = for_config(bare, config)
    if invocation.fit is not None:
        _check_target(invocation.fit)
    facts = check_run(config, machine, resume=invocation.resume)
    fit = Fit(config, machine, _footprint(config, machine, facts), {})
    problem = problem_of(fit.footprint, machine)
    found = find_fit(fit.footprint, bare) if problem else fit
    if invocation.fit is not None and found is not None:
        fit, problem = found, None
    if os.environ.get("RANK", "0") == "0":
        write_stdout(describe(fit.footprint, fit.machine, facts))
        if invocation.fit is not None and found is not None:
            _write(invocation.fit, found)
    if problem:
        raise ConfigError(f"{problem}; {_suggestion(found)}")
    return 0


def _footprint(config: RunConfig, machine: Machine, facts: Facts) -> Footprint:
    longest = max(facts.prompt_lengths, default=None)
    return Footprint(config, facts.shape, machine.num_ranks, longest, on_cpu=machine.is_cpu)


def _suggestion(found: Fit | None) -> str:
    if found is None:
        return f"no settings were found that fit: {NO_FIT}"
    peak = found.footprint.peak()[1] / GIB
    return f"this fits, with {peak:.1f} GiB at most: {found.flags} (--fit=FILE.yaml writes it)"


def _check_target(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"--fit={path} exists; give the name of a new file")
    if not path.parent.is_dir():
        raise ConfigError(f"--fit={path}: there is no folder {path.parent}; make it first")


def _write(path: Path, found: Fit) -> None:
    changed = f"changed so that it fits: {found.flags}" if found.changes else "it fits as it was given"
    machine = found.machine
    unit = "share of the machine's memory" if machine.is_cpu else "GPU"
    text = f"# written by --dry-run for {count(machine.num_ranks, 'rank')}, {machine.memory_gib:.1f} GiB a {unit}\n"
    try:
        write_bytes_whole(path, f"{text}# {changed}\n{found.config.to_yaml()}".encode())
    except OSError as error:
        raise ConfigError(f"--fit={path} cannot be written: {error.strerror}; give another path") from error
    write_stdout(f"\n{path}: {changed}\n")
