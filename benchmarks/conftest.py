"""Device, threads, tables and provenance of the benchmarks: `python -m pytest benchmarks --results DIR`.

A test measures a case: every contender is checked against float64, then all contenders run in rounds. Each table is
written to one JSON file with its stamp, after each test; a file of the same commit and machine keeps the cases that
this run does not measure, so that `-k` can split a table over several commands. Without --results nothing is written;
with --benchmark-disable there is only one round.
"""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contenders import contender
from benchmarks.machine import Machine, RoundRobin
from benchmarks.shapes import Case, dtype_for, side_shape
from benchmarks.stamp import is_committed, stamp, write_results

# files whose imports need more than PyTorch: without these packages they are not collected
NEEDED = {"bench_step.py": ("deepspeed", "pydantic", "trl"), "bench_verifier.py": ("math_verify", "pydantic")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder for the JSON files, one per table")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.addoption("--threads", type=int, help="threads of PyTorch (default: PyTorch's)")
    parser.addoption("--rounds", type=int, default=0, help="fewest rounds of a case (default: 3 on a CPU, 5 on a GPU)")
    parser.addoption("--tiny", action="store_true", help="tiny sizes, to test that everything runs")
    parser.addoption("--skip", action="append", default=[], help="skip contenders with this text in their names")


def missing_packages(file_name: str) -> list[str]:
    """The packages that a file needs and that are not installed."""
    return [name for name in NEEDED.get(file_name, ()) if importlib.util.find_spec(name) is None]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if missing_packages(collection_path.name) else None


def pytest_report_header() -> list[str]:
    return [f"{name} is left out: {', '.join(gaps)} missing" for name in NEEDED if (gaps := missing_packages(name))]


@pytest.fixture(scope="session")
def machine(pytestconfig: pytest.Config) -> Machine:
    if pytestconfig.getoption("--threads"):
        torch.set_num_threads(pytestconfig.getoption("--threads"))
    return Machine(torch.device(pytestconfig.getoption("--device")))


@pytest.fixture(scope="session")
def session_stamp(machine: Machine) -> dict[str, Any]:
    """Recorded before the first measurement."""
    return stamp(machine.device)


@pytest.fixture(scope="session")
def is_tiny(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--tiny"))


@pytest.fixture(scope="session")
def side_case(machine: Machine, is_tiny: bool) -> Case:
    """The case of tables with only one case."""
    kind = machine.device.type
    return Case(side_shape(kind, tiny=is_tiny), dtype_for(kind))


@pytest.fixture(scope="module")
def whole_table() -> tuple[list[dict[str, Any]], float]:
    """The rows of this file's tests so far, and when they began."""
    return [], time.perf_counter()


@pytest.fixture
def table(
    request: pytest.FixtureRequest,
    machine: Machine,
    session_stamp: dict[str, Any],
    whole_table: tuple[list[dict[str, Any]], float],
):
    """The rows of this file's table, written after each test."""
    rows, started = whole_table
    yield rows
    folder = request.config.getoption("--results")
    name = Path(request.module.__file__).stem.removeprefix("bench_")
    if folder is not None and rows:
        results = {"stamp": session_stamp, "seconds": round(time.perf_counter() - started, 1), "rows": rows}
        path = folder / f"{name}-{machine.device.type}.json"
        write_results(path, with_former_cases(results, path))


def with_former_cases(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """`results` after the rows of other cases in the file at `path`, if that is of the same tree and machine."""
    if not path.exists() or not is_committed(results["stamp"]["commit"]):
        return results
    former = json.loads(path.read_text(encoding="utf-8"))
    if any(former["stamp"][key] != results["stamp"][key] for key in ("commit", "machine", "threads", "versions")):
        return results

    def measured_case(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["case"], row.get("questions"), row["contender"]

    measured = {measured_case(row) for row in results["rows"]}
    kept = [row for row in former["rows"] if measured_case(row) not in measured]
    return {**results, "rows": [*kept, *results["rows"]]}


@pytest.fixture
def obstacle_of(machine: Machine, pytestconfig: pytest.Config) -> Callable[[str], str | None]:
    """The reason why a contender, given by name, cannot run or is skipped; None if it runs."""

    def find(name: str) -> str | None:
        if any(text in name for text in pytestconfig.getoption("--skip")):
            return "skipped by --skip"
        return contender(name).obstacle(machine.device)

    return find


@pytest.fixture
def rounds(
    benchmark: Any, machine: Machine, pytestconfig: pytest.Config
) -> Callable[[RoundRobin], dict[Any, dict[str, Any]]]:
    """Runs the rounds of a case, after a warm-up of every contender; returns times by contender.

    The duration of the first round, which counts too, determines the number of rounds.
    """

    def run(robin: RoundRobin) -> dict[Any, dict[str, Any]]:
        if benchmark.disabled:
            benchmark.pedantic(robin)
            return robin.times()
        started = time.perf_counter()
        robin()
        machine.wait()
        num_rounds = machine.num_rounds(time.perf_counter() - started, robin.num_contenders)
        num_rounds = max(num_rounds, pytestconfig.getoption("--rounds"))
        benchmark.pedantic(robin, rounds=num_rounds - 1)
        return robin.times()

    return run
