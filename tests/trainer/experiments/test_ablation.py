"""The ablation: shared settings of pairs, the statistics, and the command, which runs, resumes and reports."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from scipy import stats

from expo.errors import ConfigError
from expo.experiments.ablation.command import main
from expo.experiments.ablation.page import MARKS, section, tables, with_section
from expo.experiments.ablation.page import main as write_page
from expo.experiments.ablation.paired import holm, mean_over_seeds, paired_difference, t_probability, t_quantile
from expo.experiments.ablation.plan import ARMS, EVALUATED, POOLS, SHARED, parse_arm, plan_runs, with_arms
from expo.experiments.ablation.results import (
    MEASURES,
    Outcome,
    Point,
    as_record,
    contrasts,
    curve_mean,
    from_record,
    pass_at_1_after,
    read_outcome,
    secondary_contrasts,
)
from expo.ledger.questions import is_held_out, running_totals
from expo.ledger.skewed import num_crossings, skewed_questions
from tests import ROOT
from tests.ranks.running import RANK

pytestmark = pytest.mark.medium

DOCS = ROOT / "docs"
FACTS = {"versions": {"torch": "2"}}


# --- pools


@pytest.mark.parametrize("pool", POOLS)
def test_pools_are_distinct_questions_by_seed_and_none_is_held_out(pool):
    first, again, other = (POOLS[pool](seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len({question.question for question in first}) == len(first) == len(other)
    assert not any(is_held_out(question.question) for question in first)
    assert all(running_totals(question.question)[-1] == int(question.answer) for question in first)


def test_half_of_the_skewed_pool_is_trivial_or_hopeless():
    levels = [question.level for question in skewed_questions(3)]
    assert levels.count("steps-1") == levels.count("steps-9") + levels.count("steps-10") == len(levels) / 4
    assert not any(num_crossings(q.question) for q in skewed_questions(3) if q.level == "steps-1")
    assert [num_crossings(text) for text in ("8+1=", "8+2=", "9+1-1=", "0+9-9+9=")] == [0, 1, 2, 0]


# --- pairs


def planned(out, *more, arms=ARMS):
    return plan_runs(out, arms, list(POOLS), 2, [*SHARED, "--run.reply_tokens=1000", *more])


def test_paired_runs_differ_only_in_their_arm(tmp_path):
    for pool in POOLS:
        for seed in (0, 1):
            pair = [run for run in planned(tmp_path) if (run.pool, run.seed) == (pool, seed)]
            found = {}
            for run in pair:
                values = run.config.model_dump(mode="json")
                del values["run"]["dir"]
                method = values.pop("curriculum"), values.pop("kl")
                found[run.arm] = method[0]["kind"], method[1]["rho"], method[0]["estimate"]
                assert values == pair[0].config.model_dump(
                    mode="json", exclude={"run": {"dir"}, "curriculum": True, "kl": True}
                )
            assert found == {
                "grpo": ("uniform", "constant", "ema"),
                "akl": ("uniform", "tanh", "ema"),
                "gcs": ("gcs", "constant", "ema"),
                "expo": ("gcs", "tanh", "ema"),
                "expo-counted": ("gcs", "tanh", "counted"),
            }


def test_an_additional_arm_is_any_set_of_flags(tmp_path):
    name, flags = parse_arm("hot=--rollout.temperature=1.2,--curriculum.std=0.2")
    runs = planned(tmp_path, arms={"grpo": ARMS["grpo"], name: flags})
    (hot,) = [run for run in runs if (run.arm, run.pool, run.seed) == ("hot", "skewed", 1)]
    assert (hot.config.rollout.temperature, hot.config.curriculum.std, hot.config.curriculum.kind) == (1.2, 0.2, "gcs")
    for wrong in ("hot", "hot=1", "=--a.b=1", "a/b=--a.b=1"):
        with pytest.raises(ConfigError, match="is not an arm"):
            parse_arm(wrong)


def test_a_name_that_is_taken_is_refused_for_an_arm():
    for taken in ARMS:
        with pytest.raises(ConfigError, match=f"would redefine an arm: {taken} is {' '.join(ARMS[taken])}; .* another"):
            with_arms({"grpo": ARMS["grpo"]}, [f"{taken}=--kl.rho=tanh"])
    with pytest.raises(ConfigError, match="would redefine an arm: own was given before"):
        with_arms(ARMS, ["own=--kl.beta=0.1", "own=--kl.beta=0.2"])
    assert with_arms({}, ["own=--kl.beta=0.1"]) == {"own": ("--kl.beta=0.1",)}


def test_dynamic_sampling_is_an_arm_or_applies_to_every_run(tmp_path):
    arm = planned(tmp_path, arms=with_arms(ARMS, ["dynamic=--rollout.max_resamples=3"]))
    assert {run.arm for run in arm if run.config.rollout.max_resamples == 3} == {"dynamic"}
    (expo, dynamic) = [
        {name: value for name, value in run.config.settings.items() if name != "run.dir"}
        for run in arm
        if (run.pool, run.seed) == ("skewed", 1) and run.arm in ("expo", "dynamic")
    ]
    assert {name for name in expo if expo[name] != dynamic[name]} == {"rollout.max_resamples"}
    every = planned(tmp_path, "--rollout.max_resamples=3")
    assert {run.config.rollout.max_resamples for run in every} == {3}


def test_a_folder_with_other_settings_is_refused(tmp_path):
    run = planned(tmp_path)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.config.to_yaml())
    assert planned(tmp_path)[0] == run
    with pytest.raises(ConfigError, match=r"other settings: optimizer\.lr \(0\.0002 -> 0\.1\)"):
        planned(tmp_path, "--optimizer.lr=0.1")


@pytest.mark.parametrize(
    "argument",
    [
        "--seeds=1",
        "--jobs=0",
        "--resume",
        "--optimizer.rate=1",
        "--arm=x",
        "--arm=grpo=--kl.beta=1",
        "--evaluation.num_samples=8",
    ],
)
def test_bad_command_lines_exit_2_with_one_line(tmp_path, capsys, argument):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path), argument])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m expo.ablation: error: ")
    assert error.count("\n") == 1


# --- statistics


@pytest.mark.parametrize("degrees", range(1, 12))
def test_the_t_distribution_equals_scipys(degrees):
    for t in (0.0, 0.3, 2.7, 40.0, math.inf):
        assert t_probability(t, degrees) == pytest.approx(1 - 2 * stats.t.sf(t, degrees), abs=1e-12)
    assert t_quantile(0.95, degrees) == pytest.approx(stats.t.ppf(0.975, degrees))


def test_a_paired_difference_equals_scipys_paired_t_test():
    values, baseline = [0.71, 0.69, 0.74, 0.70], [0.70, 0.69, 0.71, 0.69]
    found, theirs = paired_difference(values, baseline), stats.ttest_rel(values, baseline)
    interval = theirs.confidence_interval(0.95)
    assert found == pytest.approx((0.0125, 0.0125 / theirs.statistic, interval.low, interval.high, theirs.pvalue))
    assert paired_difference(values, values) == (0, 0, 0, 0, 1)
    assert paired_difference([2.0, 3.0], [1.0, 2.0]) == (1, 0, 1, 1, 0)


def test_means_equal_numbers_worked_by_hand():
    assert mean_over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))


def test_holms_correction_equals_an_example_worked_by_hand():
    # 0.01 <= 0.05 / 4 = 0.0125 is significant; 0.02 > 0.05 / 3 = 0.0167 is not, nor are the larger ones
    assert holm([0.04, 0.01, 0.02, 0.03]) == [False, True, False, False]
    assert holm([0.04, 0.01, 0.015, 0.02]) == [True, True, True, True]
    assert holm([]) == []


# --- results


def outcome(arm, seed, curve, pool="balanced"):
    points = tuple(Point(step, 10 * step, value, 0.9) for step, value in curve)
    return Outcome(pool, arm, seed, curve[-1][0], points[-1].reply_tokens, 1.0, ("abc", "def"), points)


def test_curves_equal_numbers_worked_by_hand():
    curve = outcome("grpo", 0, [(0, 0.2), (10, 0.6), (40, 0.4)]).curve
    assert curve_mean(curve) == pytest.approx((10 * 0.4 + 30 * 0.5) / 40)
    assert [pass_at_1_after(curve, tokens) for tokens in (0, 50, 100, 250, 400)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.5, 0.4]
    )


def simulated_outcomes(*, gain, num_seeds=5, better="better", same="same"):
    """One arm gains `gain` over the baseline, one gains nothing; seeds have their own level, runs their own noise."""
    generator = torch.Generator().manual_seed(1)
    outcomes = []
    for seed in range(num_seeds):
        level = 0.5 + 0.1 * float(torch.randn((), generator=generator))
        for arm, more in (("grpo", 0.0), (better, gain), (same, 0.0)):
            noise = 0.003 * torch.randn(2, generator=generator)
            outcomes.append(
                outcome(
                    arm, seed, [(0, level), (10, level + more + float(noise[0])), (20, level + more + float(noise[1]))]
                )
            )
    return outcomes


def test_a_planted_difference_is_significant_and_an_absent_one_is_not():
    found = {(contrast.arm, contrast.measure): contrast for contrast in contrasts(simulated_outcomes(gain=0.05))}
    assert len(found) == 2 * len(MEASURES)
    planted, absent = found["better", "pass@1, at the end"], found["same", "pass@1, at the end"]
    assert planted.is_significant
    assert planted.difference.low < 0.05 < planted.difference.high
    assert not absent.is_significant
    assert not any(contrast.is_significant for contrast in contrasts(simulated_outcomes(gain=0.0)))


def test_the_counted_estimate_is_compared_with_expo_in_a_separate_family():
    outcomes = simulated_outcomes(gain=0.05, better="expo-counted", same="expo")
    primary, secondary = contrasts(outcomes), secondary_contrasts(outcomes)
    assert {(contrast.arm, contrast.reference) for contrast in primary} == {("expo-counted", "grpo"), ("expo", "grpo")}
    assert {(contrast.arm, contrast.reference) for contrast in secondary} == {("expo-counted", "expo")}
    assert [contrast.measure for contrast in secondary] == list(MEASURES)
    for family in (primary, secondary):  # each family is corrected separately
        assert [c.is_significant for c in family] == holm([c.difference.p for c in family])
    by_seed = {(o.arm, o.seed): o.curve[-1].pass_at_1 for o in outcomes}
    gaps = [by_seed["expo-counted", seed] - by_seed["expo", seed] for seed in range(5)]
    (found,) = [contrast for contrast in secondary if contrast.measure == "pass@1, at the end"]
    assert found.difference.mean == pytest.approx(sum(gaps) / 5)
    assert secondary_contrasts(simulated_outcomes(gain=0.05, better="expo-counted")) == []


def test_a_full_ablation_has_24_primary_differences_and_6_secondary_ones():
    noise = torch.Generator().manual_seed(2)
    outcomes = [
        outcome(arm, seed, [(0, 0.5), (10, 0.5 + 0.01 * float(torch.randn((), generator=noise)))], pool)
        for seed in range(5)
        for pool in POOLS
        for arm in ARMS
    ]
    assert (len(contrasts(outcomes)), len(secondary_contrasts(outcomes))) == (24, 6)


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0.05, "of 3 differences between expo-counted and expo, 2 are statistically significant"),
        (0.0, "of 3 differences between expo-counted and expo, none is statistically significant"),
    ],
)
def test_the_effect_of_the_counted_estimate_is_reported_as_secondary(gain, expected):
    outcomes = simulated_outcomes(gain=gain, better="expo-counted", same="expo")
    record = json.loads(json.dumps(as_record(outcomes, settings_of("expo-counted", "expo"), FACTS)))
    text = tables(record)
    assert f"Secondary analysis, added after the plan: {expected}" in text
    assert ("show no difference between expo-counted and expo" in text) == (gain == 0)
    first, second = text.split("Secondary analysis, added after the plan")
    assert re.findall(r"\| difference to (\S+) \|", first) == ["grpo"]
    assert re.findall(r"\| difference to (\S+) \|", second) == ["expo"]
    assert second.count("| balanced | expo-counted |") == len(MEASURES)
    assert [(c["arm"], c["less"]) for c in record["secondary_contrasts"]] == [("expo-counted", "expo")] * 3
    assert {c["less"] for c in record["contrasts"]} == {"grpo"}


def settings_of(*arms):
    return {"reply_tokens": 200, "seeds": 5, "pools": ["balanced"], "arms": {name: [] for name in ("grpo", *arms)}}


def test_tables_are_made_from_results_json_alone():
    outcomes = simulated_outcomes(gain=0.05)
    record = json.loads(json.dumps(as_record(outcomes, settings_of("better", "same"), FACTS)))
    assert from_record(record) == outcomes
    text = tables(record)
    assert "Secondary" not in text
    (found,) = [c for c in contrasts(outcomes) if (c.arm, c.measure) == ("better", "pass@1, at the end")]
    row = next(line for line in text.splitlines() if line.startswith("| balanced | better | pass@1, at the end |"))
    assert f"| {found.difference.mean:+.3f} ± {found.difference.error:.3f} |" in row
    assert row.endswith("| significant |")
    assert "Of 6 differences to grpo, 2 are statistically significant" in text


def test_every_commit_of_a_run_is_reported_from_old_and_new_files(tmp_path):
    sets = {EVALUATED: {"pass_at": {str(k): {"mean": 0.5, "low": 0.4, "high": 0.6} for k in (1, 8)}}}
    outcomes = []
    for run, commits in zip(planned(tmp_path), ({"commits": ["b", "a"]}, {"commit": "c"}), strict=False):
        run.folder.mkdir(parents=True)
        summary = {"steps": 1, "reply_tokens": 10, "seconds": 1.0, **commits}
        (run.folder / "summary.json").write_text(json.dumps(summary))
        (run.folder / "evaluations.jsonl").write_text(json.dumps({"step": 0, "reply_tokens": 0, "sets": sets}) + "\n")
        outcomes.append(read_outcome(run))
    assert [found.commits for found in outcomes] == [("b", "a"), ("c",)]
    runs = [{**asdict(found), "curve": [point._asdict() for point in found.curve]} for found in outcomes]
    (runs[1]["commit"],) = runs[1].pop("commits")  # the format of older results
    assert from_record(json.loads(json.dumps({"runs": runs}))) == outcomes
    assert as_record(simulated_outcomes(gain=0.0), {}, FACTS)["commits"] == ["abc", "def"]


def test_only_the_text_between_the_marks_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    text = with_section(page, "new\n")
    assert text == f"before\n{MARKS[0]}\n\nnew\n\n{MARKS[1]}\nafter\n"
    page.write_text(text)
    assert with_section(page, "new\n") == text
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="add them where the tables belong"):
        with_section(page, "new\n")


def assert_page_shows_its_results(page):
    record = json.loads((page.parent / "ablation/results.json").read_text(encoding="utf-8"))
    assert section(record) in page.read_text(encoding="utf-8")
    assert all((page.parent / f"ablation/{name}.png").stat().st_size > 0 for name in ("curves", "differences"))


def test_the_docs_show_the_committed_results():
    if (DOCS / "ablation/results.json").exists():
        assert_page_shows_its_results(DOCS / "experiment.md")
    else:
        assert "## Results" not in (DOCS / "experiment.md").read_text(encoding="utf-8")


# --- the command


def interrupt(argv, out):
    """Sends SIGTERM to an ablation once a run has taken two steps; that run's folder, and the ablation's stderr."""
    process = subprocess.Popen([sys.executable, "-m", "expo.ablation", *argv], stderr=subprocess.PIPE, text=True)
    try:
        while not (started := [path for path in out.glob("runs/*/*/*/metrics.jsonl") if len(lines_of(path)) > 1]):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return started[0].parent, process.communicate()[1]
    finally:
        process.terminate()
        process.wait()


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def steps_of(folder):
    """Step and seconds of every step; a repeated step would have other seconds."""
    return [(row["step"], row["seconds"]) for row in map(json.loads, lines_of(folder / "metrics.jsonl"))]


@pytest.mark.slow
def test_the_command_runs_is_interrupted_resumes_and_reports(tmp_path, capsys, monkeypatch):
    for name in RANK:  # the runs of the ablation are not ranks of this test's process group
        monkeypatch.delenv(name, raising=False)
    few, out = tmp_path / "few.jsonl", tmp_path / "out"
    few.write_text("".join(json.dumps({"question": f"{n}+5=", "answer": n + 5}) + "\n" for n in (2, 3)))
    argv = [
        "--out", str(out), "--seeds=2", "--pools", "skewed", "--arms", "grpo", "--tokens=2000",
        "--arm", "dynamic=--rollout.max_resamples=3", "--rollout.questions_per_step=4", "--rollout.group_size=4",
        "--evaluation.num_samples=9", f"--evaluation.sets={{held_out: {few}}}",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--jobs=1", "--model.path=nowhere"])
    assert stop.value.code == 1
    assert "grpo, seed 0 failed with exit code 2" in capsys.readouterr().err
    shutil.rmtree(out / "runs")  # these runs started with another model
    half, stderr = interrupt(argv, out)
    assert stderr.endswith("python -m expo.ablation: stopped; run the same command again to continue\n")
    before = steps_of(half)
    assert not (half / "summary.json").exists()
    assert f"stopped by SIGTERM after step {len(before)}; continue with --resume" in (half / "log.txt").read_text()
    assert [path.name for path in (half / "checkpoints").glob("step-*")] == [f"step-{len(before):06d}"]
    assert main(argv) == 0
    assert f"resuming after step {len(before)} of" in (half / "log.txt").read_text()
    after = steps_of(half)
    assert after[: len(before)] == before, "finished steps are not repeated"
    assert [step for step, _ in after] == list(range(1, len(after) + 1))
    assert len(after) > len(before)
    runs = sorted(out.glob("runs/*/*/*/metrics.jsonl"))
    assert len(runs) == 4
    replaced = {path.parent.parent.name: 0 for path in runs}
    for path in runs:
        replaced[path.parent.parent.name] += sum(json.loads(line)["groups_dropped"] for line in lines_of(path))
    assert replaced["grpo"] == 0 < replaced["dynamic"]
    modified = [path.stat().st_mtime_ns for path in runs]
    assert main(argv) == 0  # all runs are finished: nothing runs again
    assert [path.stat().st_mtime_ns for path in runs] == modified
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("\n".join(MARKS))
    assert write_page([str(out), str(page)]) == 0
    assert (out / "results.md").read_text() in page.read_text()
    assert_page_shows_its_results(page)
    assert {path.name for path in (page.parent / "ablation").iterdir()} == {
        "results.json", "curves.png", "differences.png",
    }  # fmt: skip
