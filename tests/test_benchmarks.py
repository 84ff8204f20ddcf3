"""The benchmarks: what is measured is right, what is published was measured."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.bench_steadiness import counted
from benchmarks.contenders import CONTENDERS, OURS, contender, our_linear_loss
from benchmarks.inputs import make_inputs
from benchmarks.report import BEGIN, END, ReportError, write
from benchmarks.shapes import GPU_SHAPES, TINY, Case, Shape
from benchmarks.tables import slope
from benchmarks.truth import WrongResultError, checked_errors, truth_of
from expo_kernels import _launch, linear_token_logps

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
HERE = [found for found in CONTENDERS if not found.needs_gpu]
CASES = (
    Case(TINY),
    Case(TINY, active_share=0.5),
    Case(TINY, frozen_head=True),
    Case(TINY, ratio="sequence"),
)


@pytest.mark.parametrize("found", HERE, ids=lambda found: found.name)
def test_every_contender_that_runs_here_is_right(found):
    assert found.obstacle(CPU) is None
    for case in CASES[:1] if "compile" in found.name else CASES:
        inputs = make_inputs(case, CPU)
        errors = checked_errors(found, inputs, truth_of(inputs))
        assert max(errors.values()) < 1e-5


def test_a_contender_that_computes_something_else_is_refused():
    inputs = make_inputs(Case(TINY), CPU)
    ours = contender(OURS)
    doubled = dataclasses.replace(ours, prepare=lambda inputs: lambda: 2 * ours.prepare(inputs)())
    with pytest.raises(WrongResultError, match="expo_kernels on tiny"):
        checked_errors(doubled, inputs, truth_of(inputs))


def test_the_slope_of_a_power_law_is_its_power():
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def run_python(*arguments, folder=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_root(folder):
    (folder / "docs").mkdir(parents=True)
    (folder / "README.md").write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the benchmarks write at tiny sizes; the two tables that take long are given by hand."""
    folder = tmp_path_factory.mktemp("results")
    run_python(
        *("pytest", "benchmarks", "--device", "cpu", "--tiny", "--benchmark-disable", "--results", str(folder)),
        *("-k", "not compile and not steadiness and not test_step"),
    )
    stamp = json.loads((folder / "loss-cpu.json").read_text())["stamp"] | {"commit": "0123456"}
    counts = {"case": "beta", "contender": OURS, "steps": 100, "first_graphs": 0, "graphs": 0}
    seconds = {"rollout": 1.0, "reference": 0.5, "reward": 0.1, "step": 3.0, "reply_tokens": 900}
    steps = [
        {"case": "step", "contender": name, "pair": pair, "seconds": {**seconds, "step": total}}
        for name, total in (("expo", 3.0), ("TRL GRPOTrainer", 4.0))
        for pair in (0, 1)
    ]
    for name, rows in (("steadiness", [counts]), ("step", steps)):
        (folder / f"{name}-cpu.json").write_text(json.dumps({"stamp": stamp, "rows": rows}))
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"stamp": stamp}))
    return folder


def test_what_is_measured_is_published(results, tmp_path):
    root = make_root(tmp_path / "root")
    write(results, root)
    page, readme = (root / "docs" / "benchmarks.md").read_text(), (root / "README.md").read_text()
    for found in HERE:
        assert (f"| {found.name} |" in page) == ("compile" not in found.name)
    assert "Liger Triton: runs on GPUs only" in page
    assert "one pair of runs after the other: 0.75, 0.75" in page
    assert "Commit 0123456" in readme
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    drawn = sorted(path.name for path in (root / "docs" / "benchmarks").iterdir())
    assert drawn == ["cpu-growth.svg", "cpu-loss.svg", "cpu-roofline.svg"]
    for name in drawn:
        assert f"(benchmarks/{name})" in page


def test_the_same_results_make_the_same_files(results, tmp_path):
    roots = [make_root(tmp_path / name) for name in ("one", "other")]
    for root in roots:
        write(results, root)
    files = [sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file()) for root in roots]
    assert files[0] == files[1]
    assert all((roots[0] / name).read_bytes() == (roots[1] / name).read_bytes() for name in files[0])


def test_results_of_an_uncommitted_tree_are_not_published(results, tmp_path):
    table = json.loads((results / "step-cpu.json").read_text())
    table["stamp"]["commit"] += "-dirty"
    (tmp_path / "step-cpu.json").write_text(json.dumps(table))
    with pytest.raises(ReportError, match=r"commit first, then measure again with make bench"):
        write(tmp_path, make_root(tmp_path / "root"))


def test_the_published_page_is_what_the_committed_results_make(tmp_path):
    root = make_root(tmp_path / "root")
    write(ROOT / "benchmarks" / "results", root)
    assert (root / "docs" / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


def test_two_commits_are_compared(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], check=True)
    said = run_python("benchmarks.compare", "HEAD", "--tiny", "--rounds", "2", "--device", "cpu", folder=clone)
    assert "loss: ratio per sequence" in said
    assert "curriculum draw" in said


def test_the_gpus_benchmarks_are_collected():
    listed = run_python("pytest", "benchmarks", "--device", "cuda", "--collect-only")
    for shape in GPU_SHAPES:
        assert f"test_loss[{shape.name}, bfloat16, Liger Triton]" in listed
    assert "test_growth[N: N = 32,768, V = 65,536, expo_kernels]" in listed


@pytest.fixture
def kernels_on_cpu():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.skip("TRITON_INTERPRET is set: this process interprets kernels")
    _launch._switch.kernels_on_cpu = True
    yield
    _launch._switch.kernels_on_cpu = False


def test_the_kernels_that_a_gpu_would_time_compile_for_it(kernels_on_cpu):
    import compiling

    inputs = make_inputs(Case(Shape("GPU", 2, 2, 64, 151_936), "bfloat16"), CPU)
    with compiling.launches(compiling.TARGETS["sm_90"]) as launched, counted(CPU) as counts:
        our_linear_loss(inputs)
        contender(f"{OURS} on logits").prepare(inputs)()
        linear_token_logps(inputs.hidden, inputs.weight, inputs.ids)
    assert len(launched.compiled) >= 3
    assert counts.binaries == len(launched.compiled)
