"""The benchmarks' device, threads, tables and stamp: `python -m pytest benchmarks --results DIR`.

Every contender is checked against float64 before it is timed, each of its rounds has a floor measured just before it,
and each table ends as one JSON file with its stamp. Without --results nothing is written; with --benchmark-disable
every round runs once, as a test.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contenders import Contender, contender
from benchmarks.machine import Machine, Pairs
from benchmarks.shapes import Case, dtype_for, side_shape
from benchmarks.stamp import stamp, write_results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder for one JSON file per table")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.addoption("--threads", type=int, help="threads of PyTorch; default: its own choice")
    parser.addoption("--tiny", action="store_true", help="tiny sizes: whether everything runs, in seconds")


@pytest.fixture(scope="session")
def machine(pytestconfig: pytest.Config) -> Machine:
    if pytestconfig.getoption("--threads"):
        torch.set_num_threads(pytestconfig.getoption("--threads"))
    return Machine(torch.device(pytestconfig.getoption("--device")))


@pytest.fixture(scope="session")
def session_stamp(machine: Machine) -> dict[str, Any]:
    """Taken before anything ran."""
    return stamp(machine.device)


@pytest.fixture(scope="session")
def is_tiny(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--tiny"))


@pytest.fixture(scope="session")
def side_case(machine: Machine, is_tiny: bool) -> Case:
    """The plain case of tables that have one alone."""
    kind = machine.device.type
    return Case(side_shape(kind, tiny=is_tiny), dtype_for(kind))


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest, machine: Machine, session_stamp: dict[str, Any]):
    """Rows of the table that this file makes; what is there when the file ends is written."""
    rows: list[dict[str, Any]] = []
    yield rows
    folder = request.config.getoption("--results")
    name = Path(request.module.__file__).stem.removeprefix("bench_")
    if folder is not None and rows:
        write_results(folder / f"{name}-{machine.device.type}.json", {"stamp": session_stamp, "rows": rows})


@pytest.fixture
def contender_here(machine: Machine) -> Callable[[str], Contender]:
    """The contender of a name; the test is skipped where it cannot run."""

    def find(name: str) -> Contender:
        found = contender(name)
        obstacle = found.obstacle(machine.device)
        if obstacle is not None:
            pytest.skip(obstacle)
        return found

    return find


@pytest.fixture
def rounds(benchmark: Any, machine: Machine) -> Callable[..., dict[str, Any]]:
    """Runs a contender's round as often as its time allows, after one that is thrown away."""

    def run(pairs: Pairs, once: Callable[[], None]) -> dict[str, Any]:
        if benchmark.disabled:
            benchmark.pedantic(once, setup=pairs.before)
            return pairs.row(1)
        pairs.before()
        once()
        num_rounds = machine.num_rounds(pairs.floor_ms[-1] + pairs.ms["both"][-1])
        benchmark.pedantic(once, setup=pairs.before, rounds=num_rounds)
        return pairs.row(num_rounds)

    return run
