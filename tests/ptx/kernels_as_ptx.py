"""A pytest plugin (`-p tests.ptx.kernels_as_ptx`): kernels on CPU tensors, as PTX; a test fails if a check does.

It runs the checks of `tests/kernels/interpreter` and the tests of the public functions on the compiled kernels:
`python -m pytest -p tests.ptx.kernels_as_ptx --ptx-orders reversed,lockstep tests/kernels/interpreter/check_loss.py`.
"""

import pytest
from hypothesis import settings

from tests.ptx.checks import kernels_as_ptx
from tests.ptx.launch import LOCKSTEP, REVERSED, Schedule

ORDERS = {
    "lockstep": LOCKSTEP,
    "forward": Schedule("forward"),
    "reversed": REVERSED,
    "shuffled": Schedule("shuffled", seed=1),
    "random": Schedule("random", seed=2),
}


def pytest_addoption(parser):
    group = parser.getgroup("ptx", "kernels as PTX")
    group.addoption("--ptx-target", default="sm_90", choices=["sm_80", "sm_90", "sm_100"])
    group.addoption("--ptx-orders", default="lockstep", help=f"orders of execution, with commas: {', '.join(ORDERS)}")


@pytest.fixture(autouse=True)
def _kernels_as_ptx(request):
    schedules = [ORDERS[name] for name in request.config.getoption("--ptx-orders").split(",")]
    with kernels_as_ptx(target=request.config.getoption("--ptx-target"), schedules=schedules) as report:
        yield
    assert not report.errors, "\n".join(report.lines())


def pytest_collection_modifyitems():
    settings.register_profile("few", deadline=None, database=None, max_examples=6)
    settings.load_profile("few")
