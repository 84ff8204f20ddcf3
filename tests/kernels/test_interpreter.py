"""The kernels in Triton's interpreter: each kernel compared with float64, then the public functions with the kernels.

The interpreter must be selected before triton is imported, so each test file runs in its own process. To debug one:
`TRITON_INTERPRET=1 python -m pytest -p tests.kernels.interpreter.kernels_on_cpu FILE`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow  # each test interprets kernels for minutes

TESTS = Path(__file__).parent
# these tests apply to the PyTorch path only, or take minutes in the interpreter
LEFT_OUT = (
    "under_no_grad_only_the_logits_are_made",  # counts calls of the PyTorch path, as do the next two
    "a_frozen_input_costs_no_gradient",
    "self_check",
    "(whatever_the_number_of_chunks and float32)",  # bfloat16 covers more code
    "beyond_65_535_tokens",  # the kernels treat all rows alike; `check_memory.py` tests offsets beyond 2^31
    "inductor",  # compiles the code around the ops, which both paths share
    "masked_contents_never_matter",  # hundreds of examples: `check_loss.py` has a few
)
FILES = (
    "interpreter/check_loss.py",
    "interpreter/check_logps.py",
    "interpreter/check_memory.py",
    "interpreter/check_curriculum.py",
    "interpreter/check_exponentials.py",
    "interpreter/check_kept_columns.py",
    "test_policy_loss.py",
    "test_linear_loss.py",
    "test_sequence_chunks.py",
    "test_every_objective.py",
    "test_token_losses.py",
    "test_logps.py",
    "test_temperatures.py",
    "test_temperatures_compiled.py",
    "test_compile.py",
)


@pytest.mark.parametrize("file", FILES)
def test_kernels_pass_in_the_interpreter(file):
    selection = [] if file.startswith("interpreter/") else ["-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:xdist",
            "-p",
            "tests.kernels.interpreter.kernels_on_cpu",
            TESTS / file,
            *selection,
        ],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            # skipped rows hold numbers that are computed but never used
            "PYTHONWARNINGS": "ignore:::triton.runtime.interpreter",
        },
        cwd=TESTS.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
