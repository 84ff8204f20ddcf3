"""The recipe "Add a surrogate" of CONTRIBUTING, applied to a copy: both paths compute the toy's formula."""

import os
import shutil
import subprocess
import sys

import pytest

from tests import ROOT
from tests.recipes import apply, steps

TITLE = "Add a surrogate"
# compares loss and gradient of the toy with its formula in float64
CHECK = """
import torch
from expo_kernels import Objective, expo_loss
from tests.numerics import make_batch

kernels = {kernels}
if kernels:
    import tests.kernels.interpreter.kernels_on_cpu
batch = make_batch(dtype=torch.float32)
logits = batch.logits.detach().requires_grad_()
made = expo_loss(
    logits, batch.completion_ids, batch.completion_mask, advantages=batch.advantages, old_logps=batch.old_logps,
    beta=0.0, objective=Objective(surrogate="log1p", aggregation="token"),
)
(grad,) = torch.autograd.grad(made.loss, logits)
wide = logits.detach().double().requires_grad_()
logps = torch.log_softmax(wide, -1).gather(-1, batch.completion_ids[..., None]).squeeze(-1)
losses = -torch.log1p((logps - batch.old_logps).exp()) * batch.advantages[:, None]
loss = losses[batch.completion_mask].mean()
(true_grad,) = torch.autograd.grad(loss, wide)
torch.testing.assert_close(made.loss.double(), loss, rtol=1e-6, atol=1e-7)
torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-8)
"""


# some of the table's combinations, in which every pair of values occurs
TABLE = """
import torch
from tests.kernels import test_every_objective as table
from tests.numerics import make_batch

assert "log1p" in table.OPTIONS["surrogate"]
allowed = [case for case in table.cases("log1p") if table.refusal(case) is None]
batch = make_batch(table.B, table.T, table.H, table.V, dtype=torch.float64)
for case, levels in table.with_every_pair(allowed):
    table.check(case, levels, batch)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "expo_kernels", folder / "expo_kernels")
    shutil.copytree(ROOT / "tests" / "kernels", folder / "tests" / "kernels")
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/numerics.py"):
        shutil.copy(ROOT / name, folder / name)
    apply(folder, TITLE)
    return folder


def run(folder, *arguments, interprets=False):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    more = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if interprets:
        more["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=kept | more, capture_output=True, text=True, check=False
    )


def test_the_recipe_has_at_most_four_places():
    assert len({name for name, _, _ in steps(TITLE)}) == 4


@pytest.mark.medium
@pytest.mark.parametrize("kernels", [False, True], ids=["pytorch", "kernels"])
def test_the_toy_has_the_numbers_of_its_formula(copy, kernels):
    if kernels:
        pytest.importorskip("triton")
    done = run(copy, "-c", CHECK.format(kernels=kernels), interprets=kernels)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.medium
def test_the_row_of_the_tests_table_passes(copy):
    done = run(copy, "-c", TABLE)
    assert done.returncode == 0, done.stderr[-3000:]
