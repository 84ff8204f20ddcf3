"""The benchmarks: contenders are checked before they are timed, and pages show only committed results."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare
from benchmarks.contenders import CONTENDERS, OURS, contender, log_softmax_logps, our_linear_loss
from benchmarks.events import counted
from benchmarks.inputs import CLIP, make_inputs, policy_loss
from benchmarks.machine import Machine, RoundRobin
from benchmarks.measured_loss import measure_losses
from benchmarks.report import BEGIN, END, ReportError, write
from benchmarks.shapes import GPU_SHAPES, TINY, Case, Shape
from benchmarks.tables import better_peers, slope, spread, time_ratio, time_slope
from benchmarks.targets import MISSED_REASONS, TARGETS, targets_section
from benchmarks.truth import WrongResultError, check_formula, checked_errors, truth_of
from expo_kernels import _launch, linear_token_logps
from tests.ranks.running import environment_of_no_rank

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CPU_CONTENDERS = [candidate for candidate in CONTENDERS if not candidate.needs_gpu]
CASES = (
    Case(TINY),
    Case(TINY, active_share=0.5),
    Case(TINY, frozen_head=True),
    Case(TINY, ratio="sequence"),
)


@pytest.mark.medium
@pytest.mark.parametrize("candidate", CPU_CONTENDERS, ids=lambda candidate: candidate.name)
def test_every_contender_that_runs_on_a_cpu_is_correct(candidate):
    assert candidate.obstacle(CPU) is None
    for case in CASES[:1] if "compile" in candidate.name else CASES:
        inputs = make_inputs(case, CPU)
        errors = checked_errors(candidate, inputs, truth_of(inputs))
        assert max(errors.values()) < 1e-5


def test_a_contender_that_computes_something_else_is_rejected():
    inputs = make_inputs(Case(TINY), CPU)
    ours = contender(OURS)
    doubled = dataclasses.replace(ours, prepare=lambda inputs: lambda: 2 * ours.prepare(inputs)())
    with pytest.raises(WrongResultError, match="expo_kernels on tiny"):
        checked_errors(doubled, inputs, truth_of(inputs))


def without_penalty(logps, inputs):
    return policy_loss(logps, inputs, beta=0.0)


def without_clip(logps, inputs):
    mask, ratio = inputs.mask, (logps - inputs.old_logps).exp()
    # adds the part of the surrogate that clipping removes
    clipped = torch.min(
        ratio * inputs.advantages[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * inputs.advantages[:, None]
    )
    removed = (ratio * inputs.advantages[:, None] - clipped).masked_fill(~mask, 0.0)
    return policy_loss(logps, inputs) - (removed.sum(1) / mask.sum(1)).mean()


def with_loss(loss_of):
    eager = contender("eager log_softmax")
    return dataclasses.replace(eager, prepare=lambda inputs: lambda: loss_of(log_softmax_logps(inputs), inputs))


@pytest.mark.parametrize("loss_of", [without_penalty, without_clip])
def test_a_missing_term_is_found_in_float32(loss_of):
    inputs = make_inputs(Case(TINY), CPU)
    with pytest.raises(WrongResultError):
        checked_errors(with_loss(loss_of), inputs, truth_of(inputs))


@pytest.mark.parametrize("loss_of", [without_penalty, without_clip])
@pytest.mark.parametrize("candidate", [None, "Apple CCE"])
def test_a_missing_term_is_found_before_bfloat16_is_timed(loss_of, candidate):
    wrong = with_loss(loss_of)
    if candidate is not None:  # the loosest bound of all contenders
        wrong = dataclasses.replace(wrong, formula_bound=10 * contender(candidate).formula_bound)
    with pytest.raises(WrongResultError):
        check_formula(wrong, Case(TINY, "bfloat16"), CPU)


@pytest.mark.parametrize("loss_of", [without_penalty, without_clip])
def test_a_missing_term_in_bfloat16_is_a_failure_and_not_timed(loss_of):
    inputs = make_inputs(Case(TINY, "bfloat16"), CPU)
    entries = [("tiny", with_loss(loss_of), inputs), ("tiny", contender(OURS), inputs)]
    measured = measure_losses(entries, Machine(CPU), once_each, lambda name: None)
    assert [failure.split(" on ")[0] for failure in measured.failures] == ["eager log_softmax"]
    assert ["ms" in row for row in measured.rows] == [False, True]


@pytest.mark.parametrize("case", [dataclasses.replace(case, dtype="bfloat16") for case in CASES], ids=str)
def test_correct_contenders_pass_the_check_of_the_formula(case):
    for name in (OURS, "eager log_softmax", "Liger fused linear"):
        check_formula(contender(name), case, CPU)


def test_every_contender_runs_once_per_round_after_the_floor():
    ran = []

    def once(name):
        return lambda: ran.append(name) or {"both": float(len(ran))}

    robin = RoundRobin(Machine(CPU), {name: once(name) for name in "abcd"}, lambda: ran.append("floor"))
    for _ in range(6):
        robin()
    rounds = [ran[start : start + 5] for start in range(0, 30, 5)]
    assert all(names[0] == "floor" and sorted(names[1:]) == ["a", "b", "c", "d"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    times = robin.times()
    assert {len(candidate["ms"]["both"]) for candidate in times.values()} == {6}
    assert [names.index("a") + 5 * index + 1 for index, names in enumerate(rounds)] == times["a"]["ms"]["both"]
    assert len(times["a"]["floor_ms"]) == 6


def once_each(robin):
    robin()
    return robin.times()


def test_a_failing_contender_does_not_affect_the_others():
    def broken(inputs):
        raise RuntimeError("no kernel for this device")

    inputs = make_inputs(Case(TINY), CPU)
    ours = contender(OURS)
    doubled = dataclasses.replace(ours, name="doubled", prepare=lambda inputs: lambda: 2 * ours.prepare(inputs)())
    wrong = (dataclasses.replace(ours, name="broken", prepare=broken), doubled)
    entries = [("tiny", candidate, inputs) for candidate in (*wrong, ours)]
    measured = measure_losses(entries, Machine(CPU), once_each, lambda name: None)
    assert [("ms" in row, "note" in row) for row in measured.rows] == [(False, True), (False, True), (True, False)]
    assert "no kernel for this device" in measured.rows[0]["note"]
    assert [failure.split(" on ")[0] for failure in measured.failures] == ["broken", "doubled"]
    assert inputs.hidden.grad is None
    assert inputs.weight.grad is None


def timed(name, *ms, case="small", errors=None, mib=1.0, **more):
    return {
        **{"case": case, "contender": name, "ms": {"both": list(ms)}, "errors": errors or {}},
        **{"extra_peak_mib": mib, "gradients_mib": {"hidden": 0.0}, **more},
    }


def test_times_are_compared_within_rounds():
    # the machine was ten times slower in the second round, which affects both
    ratio = time_ratio(timed(OURS, 1.0, 10.0, 1.0), timed("eager log_softmax", 2.0, 20.0, 2.0))
    assert (ratio.low, ratio.middle, ratio.high) == (0.5, 0.5, 0.5)
    assert str(spread([0.0, 0.1, 0.2, 0.3, 0.4, 1.0])) == "0.25 [0.10, 0.40]"


def test_a_slope_is_computed_within_a_round():
    def point(num_tokens, *ms):
        return timed(OURS, *ms, settings={"shape": {"num_sequences": 1, "length": num_tokens}})

    assert time_slope("N", [point(10, 1.0, 5.0), point(100, 10.0, 50.0)]).middle == pytest.approx(1)


def loss_rows(ours_ms, eager_ms, ours_error):
    errors = {"logps": ours_error, "grad_hidden": 1.0, "grad_weight": 1.0}
    theirs = {"logps": 1.0, "grad_hidden": 1.0, "grad_weight": 1.0}
    return [
        timed(OURS, *ours_ms, errors=errors, mib=30.0),
        timed("eager log_softmax", *eager_ms, errors=theirs, mib=100.0),
    ]


def lines_of(section):
    return {line.split(" | ")[0].removeprefix("| "): line for line in section.splitlines()}


def test_a_missed_target_is_shown_with_its_reason(monkeypatch):
    target = "time at most 1.0 x eager log_softmax"
    tables = {"loss": loss_rows((3.0, 3.0), (2.0, 2.0), 1.02)}
    lines = lines_of(targets_section(tables, "cpu"))
    assert "| 1.50 [1.50, 1.50] (small) | **missed** |" in lines[target]
    assert "| 0.30 (small) | met |" in lines["extra peak memory at most 0.35 x eager log_softmax"]
    assert "**missed**" in lines["error of log-probs at most the best peer's"]
    assert "| met; 1 tied within 1 % |" in lines["error of dHidden at most the best peer's"]
    assert "not measured" in lines["a training step at most 0.8 x TRL's"]
    monkeypatch.setitem(MISSED_REASONS, ("cpu", target), "the machine was slow")
    assert f"- {target}: the machine was slow" in targets_section(tables, "cpu")
    assert "the machine was slow" not in targets_section({"loss": loss_rows((1.0,), (2.0,), 1.0)}, "cpu")


def test_an_error_within_a_percent_is_a_tie():
    lines = lines_of(targets_section({"loss": loss_rows((1.0,), (2.0,), 1.005)}, "cpu"))
    assert "| met; 1 tied within 1 % |" in lines["error of log-probs at most the best peer's"]


def test_every_reason_belongs_to_a_target():
    assert {target for _, target in MISSED_REASONS} <= set(TARGETS)


def test_measures_in_which_peers_are_better_are_listed():
    draws = [
        timed(name, *ms, case="draw", questions=10**6) for name, ms in ((OURS, (11.0, 12.0)), ("numpy", (7.0, 8.0)))
    ]
    assert better_peers("curriculum", draws) == [
        "- draw, 1,000,000 questions, median ms: ours 11.5; numpy 7.50",
    ]
    seconds = {"rollout": 1.0, "reference": 1.0, "reward": 1.0, "step": 3.0}
    steps = [
        {"contender": "expo", "seconds": seconds},
        {"contender": "TRL GRPOTrainer", "seconds": {**seconds, "reward": 0.5, "step": 4.0}},
    ]
    assert better_peers("step", steps) == ["- reward, median seconds: ours 1.00; TRL GRPOTrainer 0.500"]


def test_the_slope_of_a_power_law_is_its_power():
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def run_python(*arguments, folder=ROOT):
    environment = {**environment_of_no_rank(), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
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
    """The results of the benchmarks at tiny sizes; the two slowest tables are written by hand."""
    folder = tmp_path_factory.mktemp("results")
    run_python(
        *("pytest", "benchmarks", "--device", "cpu", "--tiny", "--benchmark-disable", "--results", str(folder)),
        *("--skip", "compile", "-k", "not steadiness and not test_step"),
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


@pytest.mark.medium
def test_all_results_are_published(results, tmp_path):
    root = make_root(tmp_path / "root")
    write(results, root)
    page, readme = (root / "docs" / "benchmarks.md").read_text(), (root / "README.md").read_text()
    for candidate in CPU_CONTENDERS:
        assert (f"| {candidate.name} |" in page) == ("compile" not in candidate.name)
    assert "Liger Triton: runs on GPUs only" in page
    for target in TARGETS:
        assert f"| {target} | " in page
    assert "### tiny, bfloat16" in page
    assert "| expo_kernels, 64 MiB |" in page
    assert "by pair of runs: 0.75, 0.75" in page
    assert "Commit 0123456" in readme
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    drawn = sorted(path.name for path in (root / "docs" / "benchmarks").iterdir())
    assert drawn == ["cpu-growth.svg", "cpu-loss.svg", "cpu-roofline.svg"]
    for name in drawn:
        assert f"(benchmarks/{name})" in page


def test_pages_are_deterministic(results, tmp_path):
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


def test_the_committed_page_is_generated_from_the_committed_results(tmp_path):
    root = make_root(tmp_path / "root")
    write(ROOT / "benchmarks" / "results", root)
    assert (root / "docs" / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.medium
def test_two_commits_are_compared(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], check=True)
    output = run_python("benchmarks.compare", "HEAD", "--tiny", "--rounds", "1", "--device", "cpu", folder=clone)
    assert "loss: ratio per sequence" in output
    assert "curriculum draw" in output
    assert "--rounds=1 cannot show significance for 8 jobs: use 9 or more" in output


def test_noise_is_significant_in_at_most_one_of_twenty_comparisons():
    draws = torch.Generator().manual_seed(0)
    ratios = torch.randn(400, 9, 15, generator=draws).mul(0.05).exp().tolist()
    false = sum(any(compare.verdicts({str(job): r for job, r in enumerate(jobs)}).values()) for jobs in ratios)
    assert false <= 20


def test_a_job_that_is_slower_in_every_round_is_reported():
    noise = [0.9, 1.1] * 7 + [1.05]
    found = compare.verdicts({"slower": [1.01] * 15, "noise": noise, "faster": [0.97] * 15})
    assert found == {"slower": "slower", "noise": "", "faster": "faster"}
    assert compare.sign_test([1.1] * 4 + [0.9]) == pytest.approx(12 / 32)


@pytest.mark.medium
def test_the_benchmarks_for_gpus_are_collected():
    listed = run_python("pytest", "benchmarks", "--device", "cuda", "--collect-only")
    for shape in GPU_SHAPES:
        assert f"test_loss[{shape.name}, bfloat16]" in listed
    assert "test_growth[N]" in listed


@pytest.mark.slow
def test_a_step_of_both_trainers_is_checked_and_timed(tmp_path):
    pytest.importorskip("trl")
    arguments = ("--device", "cpu", "--tiny", "--benchmark-disable", "--results", str(tmp_path))
    run_python("pytest", "benchmarks/bench_step.py", *arguments)
    rows = json.loads((tmp_path / "step-cpu.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["expo", "TRL GRPOTrainer"]
    assert all(row["seconds"]["step"] > 0 and row["errors"]["grad_norm"] < 1e-4 for row in rows)


@pytest.fixture
def kernels_on_cpu():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.skip("TRITON_INTERPRET is set: this process interprets kernels")
    _launch._switch.kernels_on_cpu = True
    yield
    _launch._switch.kernels_on_cpu = False


@pytest.mark.medium
def test_the_kernels_of_the_benchmarks_compile_for_a_gpu(kernels_on_cpu):
    from tests.kernels import compiling

    inputs = make_inputs(Case(Shape("GPU", 2, 2, 64, 151_936), "bfloat16"), CPU)
    with compiling.launches(compiling.TARGETS["sm_90"]) as launched, counted(CPU) as counts:
        our_linear_loss(inputs)
        contender(f"{OURS} on logits").prepare(inputs)()
        linear_token_logps(inputs.hidden, inputs.weight, inputs.ids)
    assert len(launched.compiled) >= 3
    assert counts.binaries == len(launched.compiled)
