"""Some checks of `tests/kernels/interpreter` on the compiled kernels: the memory layout of rows, and exact results."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from tests import ROOT

pytestmark = pytest.mark.medium  # compiles and emulates kernels

FOLDER = "tests/kernels/interpreter"
SELECTED = {
    "check_memory.py": "not (bfloat16_gradients and 4099)",
    "check_logps.py": "ten_thousand or exactly_one or nats_apart",
    "check_loss.py": "all_masked or out_of_range or made_in_the_kernel or add_up or equal_bits",
}


def test_compiled_kernels_pass():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "tests.ptx.kernels_as_ptx"]
    selection = " or ".join(f"({file} and ({names}))" for file, names in SELECTED.items())
    done = subprocess.run(
        [*command, *(f"{FOLDER}/{file}" for file in SELECTED), "-k", selection],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
