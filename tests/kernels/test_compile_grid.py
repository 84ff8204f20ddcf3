"""The kernels compiled for many GPUs by several versions of Triton: the recorded resources and the docs' tables."""

import json
import os
import shutil

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from benchmarks import compile_grid
from tests.kernels import test_compile_budgets as budgets

# kernels over their budget, by version of Triton: NVIDIA's by one spilled value of 8 bytes, which costs less than one
# program less on a multiprocessor; AMD's, which have 256 registers a thread and more, by registers alone
KNOWN = {
    "3.4.0": {
        ("exponentials, softcap, entropies", "gfx1100"),
        ("logps, bfloat16, entropies", "gfx1100"),
        ("logps, softcap, entropies", "gfx1100"),
        ("loss, bfloat16, every option", "gfx1100"),
        ("loss, entropy bonus", "gfx1100"),
        ("loss, every option", "gfx1100"),
        ("loss, every option and a bonus", "gfx1100"),
        ("shard, softcap, entropies", "gfx1100"),
        ("gradient of exponentials", "sm_80"),
        ("sequences, gmpo, a bonus", "sm_75"),
        ("sequences, vespo", "sm_120"),
    },
    "3.6.0": {
        ("loss, bfloat16 over float32", "sm_120"),
        ("loss, cispo", "sm_120"),
        ("loss, sapo", "sm_120"),
        ("exponentials, softcap, entropies", "gfx1100"),
        ("logps, bfloat16, entropies", "gfx1100"),
        ("logps, softcap, entropies", "gfx1100"),
        ("loss, bfloat16 in place", "gfx1100"),
        ("loss, bfloat16, every option", "gfx1100"),
        ("loss, every option", "gfx1100"),
        ("loss, every option and a bonus", "gfx1100"),
        ("shard, softcap, entropies", "gfx1100"),
        ("loss, every option", "sm_86"),
        ("sequences", "sm_86"),
        ("loss, every option", "sm_89"),
        ("sequences", "sm_89"),
        ("loss, every option", "sm_90"),
        ("loss, every option", "sm_100"),
        ("sequences, every option", "sm_100"),
        ("sequences, vespo", "sm_100"),
        ("loss, bfloat16, every option", "gfx942"),
        ("sequences", "sm_80"),
    },
    "3.9.0": {
        ("exponentials, softcap, entropies", "gfx1100"),
        ("logps, bfloat16, entropies", "gfx1100"),
        ("logps, softcap, entropies", "gfx1100"),
        ("loss, bfloat16 in place", "gfx1100"),
        ("loss, bfloat16, every option", "gfx1100"),
        ("loss, every option", "gfx1100"),
        ("loss, every option and a bonus", "gfx1100"),
        ("shard, softcap, entropies", "gfx1100"),
        ("sequences", "sm_75"),
        ("sequences, every option", "sm_75"),
        ("sequences, gmpo, a bonus", "sm_75"),
    },
}
RECORDS = sorted(compile_grid.RESULTS.glob("compile-triton-*.json"))


def cell(registers=64, spilled_bytes=0):
    return {"registers": registers, "spilled_bytes": spilled_bytes, "shared_bytes": 256}


def test_a_kernel_over_budget_and_one_that_does_not_compile_stand_out():
    cases = {
        "loss": {"sm_80": cell(), "gfx942": {"error": "RuntimeError: no linker"}},
        "sequences": {"sm_80": cell(150), "gfx942": cell(100, 16)},
    }
    lines = compile_grid.section([{"triton": "3.6.0", "cases": cases}]).splitlines()
    assert lines[0] == "Triton 3.6.0: 3 of 4 kernels compile; 2 of them exceed 128 registers or spill."
    assert lines[2:] == [
        "| Kernel | sm_80 | gfx942 |",
        "| --- | --- | --- |",
        "| loss | 64 | fails |",
        "| sequences | **150** | **100 + 16 B** |",
    ]


@pytest.mark.medium
def test_a_kernel_is_compiled_for_a_target_and_an_error_is_recorded():
    found = compile_grid.compiled(lambda: budgets.run_scale(151_936, budgets.BF16), "sm_120")
    assert 0 < found["registers"] <= compile_grid.MOST_REGISTERS
    assert found["wide_accesses"]["load"] > 0
    failed = compile_grid.compiled(lambda: budgets.run_scale(151_936, budgets.BF16), "sm_1")
    assert failed.keys() == {"error"}


def test_the_docs_show_the_recorded_grids(tmp_path):
    page = tmp_path / "kernels.md"
    shutil.copy(compile_grid.PAGE, page)
    compile_grid.write_table(compile_grid.RESULTS, page)
    assert page.read_text() == compile_grid.PAGE.read_text()


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_recorded_kernel_is_within_budget(path):
    grid = json.loads(path.read_text())
    assert set(grid["cases"]) == set(budgets.CASES)
    over = {
        (name, target)
        for name, cells in grid["cases"].items()
        for target, recorded in cells.items()
        if "error" in recorded or compile_grid.is_over_budget(recorded)
    }
    assert over == KNOWN.get(grid["triton"], set())
