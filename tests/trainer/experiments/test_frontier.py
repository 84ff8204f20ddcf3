"""The frontier plan: its pool and order, the statistics against brute force, and a tiny plan that is continued."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from expo.config import load_config
from expo.errors import ConfigError
from expo.experiments.ablation.command import main
from expo.experiments.frontier import mechanism
from expo.experiments.frontier.analysis import (
    Spread,
    bootstrap,
    detectable,
    pass_at_k,
    spread_of,
    standard_error,
    tokens_to_reach,
)
from expo.experiments.frontier.chain import has_right_chain
from expo.experiments.frontier.page import MARKS, section
from expo.experiments.frontier.plan import ARMS, FRONTIER, HELD_OUT, SMOKE, RunKey
from expo.experiments.frontier.pool import (
    FRONTIER_COUNTS,
    frontier_harder,
    frontier_held_out,
    frontier_questions,
    right_chain,
)
from expo.experiments.frontier.run import FrontierRun
from expo.experiments.frontier.tables import paired_seeds, primary, report, sentences, without_a_part_of_the_extension
from expo.ledger.questions import MAX_TOTAL, is_held_out, running_totals
from expo.ledger.skewed import num_crossings
from tests.ranks.running import RANK

pytestmark = pytest.mark.medium
ROOT = Path(__file__).parents[3]


def test_a_pool_has_its_three_parts_and_no_held_out_question():
    pool = frontier_questions(0)
    assert pool == frontier_questions(0) != frontier_questions(1)
    levels = [question.level for question in pool]
    kinds = {f"{steps} operations, {crossings} crossings": n for (steps, crossings), n in FRONTIER_COUNTS.items()}
    assert Counter(levels) == {**kinds, "hopeless": 64, "solved": 48}
    assert len({question.question for question in pool}) == len(pool) == 256
    assert not any(is_held_out(question.question) for question in pool)
    assert all(is_held_out(question.question) for question in [*frontier_held_out(), *frontier_harder()])
    assert Counter(question.level for question in frontier_held_out()) == dict.fromkeys(kinds, 40)
    assert len(frontier_harder()) == 60
    for text, _, level in [*pool, *frontier_held_out()]:
        totals = running_totals(text)
        assert (totals[-1] > MAX_TOTAL) == (level == "hopeless")
        if level in kinds:
            assert level == f"{len(totals)} operations, {num_crossings(text)} crossings"
        elif level == "solved":
            assert (len(totals), num_crossings(text)) == (1, 0)


def test_a_reply_with_a_wrong_running_total_and_the_right_last_one_is_wrong():
    assert num_crossings("3+8-2+7=") == 3
    right = right_chain("3+8-2+7=")
    assert right == "11,9,\\boxed{16}"
    assert has_right_chain(right + "\n", right)
    for wrong in ("\\boxed{16}", "12,9,\\boxed{16}", "11,9,\\boxed{15}", f"{right} {right}", "", "11,9,16"):
        assert not has_right_chain(wrong, right)


def test_the_primary_comparison_runs_first_in_pairs_over_three_warm_starts():
    keys = FRONTIER.keys()
    assert len(keys) == len(set(keys)) == 12 * 2 * 2 + 6 * 2 * 7
    assert keys[:4] == [RunKey(arm, beta, 0) for beta in (0.02, 0.2) for arm in ("grpo", "expo")]
    assert {key.arm for key in keys[:48]} == {"grpo", "expo"}
    assert [FRONTIER.warm_start(seed) for seed in range(4)] == [0, 2, 3, 0]
    assert {key.arm for key in keys} == set(ARMS)
    assert keys.index(RunKey("akl", 0.2, 3)) < keys.index(RunKey("grpo-matched", 0.2, 3))


def test_pass_at_k_equals_the_share_of_subsets_with_a_correct_reply():
    n = 7
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert float(pass_at_k(torch.tensor(c), n, k)) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="expected 1 to n = 7"):
        pass_at_k(torch.tensor(1), n, 8)


def test_the_bootstrap_equals_a_resampling_of_rows_and_columns_one_by_one():
    differences = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    found = bootstrap(differences, resamples=4000, seed=1)
    generator, means = torch.Generator().manual_seed(2), []
    for _ in range(4000):
        rows, columns = (torch.randint(size, (size,), generator=generator) for size in (4, 5))
        means.append(float(differences[rows][:, columns].mean()))
    low, high = torch.quantile(torch.tensor(means), torch.tensor([0.025, 0.975])).tolist()
    assert found.mean == pytest.approx(float(differences.mean()))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06)
    tail = 2 * sum(mean <= 0 for mean in means) / 4000
    assert found.p == pytest.approx(tail, abs=0.05)


def simulated(mean, spread, num_seeds=12, num_questions=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    rows, columns = spread.seeds * draw(num_seeds, 1), spread.questions * draw(1, num_questions)
    return mean + rows + columns + spread.rest * draw(num_seeds, num_questions)


def test_the_power_formula_holds_in_simulation_and_a_null_is_seldom_significant():
    spread = Spread(0.02, 0.08, 0.2)
    error = standard_error(spread, 12, 200)
    gain = detectable(error, num_tests=2)
    share = [
        sum(bootstrap(simulated(mean, spread, seed=seed), resamples=400).p <= 0.025 for seed in range(60)) / 60
        for mean in (gain, 0.0)
    ]
    assert share[0] >= 0.65
    assert share[1] <= 0.1
    assert spread_of(simulated(0.0, spread, 200, 400)) == pytest.approx(tuple(spread), rel=0.15)


def test_tokens_to_reach_equal_numbers_worked_by_hand():
    curve = [[0, 0, 0.1], [20, 100, 0.2], [40, 300, 0.15], [60, 400, 0.4]]
    assert [tokens_to_reach(curve, threshold) for threshold in (0.1, 0.15, 0.3, 0.5)] == pytest.approx(
        [0, 50, 360, None]
    )


def results_of(gain, seeds=12):
    found = {}
    for beta, seed, arm in itertools.product(FRONTIER.betas, range(seeds), ("grpo", "expo")):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 6, (200,), generator=generator) + (gain if arm == "expo" and beta == 0.2 else 0)
        found[RunKey(arm, beta, seed)] = {"num_replies": 256, "correct": {HELD_OUT: counts.tolist()}}
    return found


def test_a_planted_gain_is_significant_at_its_beta_alone_and_a_part_of_the_pairs_has_no_verdict():
    found = {beta: (interval, verdict) for beta, interval, verdict in primary(FRONTIER, results_of(2))}
    assert {beta: verdict for beta, (_, verdict) in found.items()} == {0.02: False, 0.2: True}
    assert found[0.2][0].low > 0.05
    none, some = sentences(FRONTIER, results_of(2))
    assert none.startswith("No difference in held-out pass@32 was shown at beta = 0.02")
    assert some.startswith("Expo less grpo in held-out pass@32 at beta = 0.2 is significant: +0.")
    assert primary(FRONTIER, results_of(2, seeds=11)) == []


def test_a_part_of_the_extension_changes_nothing():
    twelve, part, all_24 = (without_a_part_of_the_extension(FRONTIER, results_of(2, n)) for n in (12, 23, 24))
    assert part == twelve
    assert [len(paired_seeds(found, "expo", 0.2)) for found in (part, all_24)] == [12, 24]
    wide = dict(all_24)  # one seed gains all, another nothing
    for key in wide:
        if (key.arm, key.beta) == ("expo", 0.2):
            wide[key] = {"num_replies": 256, "correct": {HELD_OUT: [256 * (key.seed % 2)] * 200}}
    (_, some) = sentences(FRONTIER, {key: wide[key] for key in twelve})
    assert "so the further seeds are due (--extended)" in some
    assert "also with the further seeds" in sentences(FRONTIER, wide)[1]


@pytest.mark.slow
def test_the_docs_show_the_committed_results():
    folder = ROOT / "benchmarks/results/frontier"
    runs = [FrontierRun(FRONTIER, key, ROOT / "runs", folder) for key in FRONTIER.keys(extended=True)]
    tables = report(FRONTIER, {run.key: run.result() for run in runs if run.is_finished})
    assert (folder / "results.md").read_text(encoding="utf-8") == tables
    assert section(tables) in (ROOT / "docs/experiment.md").read_text(encoding="utf-8")
    assert (ROOT / "docs/frontier/curves.png").stat().st_size > 0
    measured = json.loads((folder / "mechanism.json").read_text(encoding="utf-8"))
    assert mechanism.table(measured) in (ROOT / "docs/curriculum.md").read_text(encoding="utf-8")


def test_results_of_other_settings_are_refused(tmp_path):
    run = FrontierRun(SMOKE, RunKey("grpo", 0.02, 0), tmp_path / "out", tmp_path / "results")
    assert (run.is_finished, run.is_ready) == (False, True)
    matched = FrontierRun(SMOKE, RunKey("grpo-matched", 0.02, 0), run.out, run.results)
    assert not matched.is_ready
    run.result_path.parent.mkdir(parents=True)
    run.result_path.write_text(json.dumps({"settings_sha256": run.digest}))
    assert run.is_finished
    other = FrontierRun(SMOKE, RunKey("grpo", 0.02, 1), run.out, run.results)
    assert other.digest != run.digest
    other.result_path.write_text(json.dumps({"settings_sha256": run.digest}))
    with pytest.raises(ConfigError, match="is the result of other settings"):
        _ = other.is_finished
    other.result_path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        _ = other.is_finished


def test_exact_pass_rates_give_the_weights_of_the_formula():
    config = load_config(None, [("curriculum.std", 0.15), ("rollout.group_size", 8)])
    rates = [0.0, 0.5, 0.25]
    found = mechanism.with_exact_rates(torch.tensor(rates), config)
    weights = [math.exp(-((rate - 0.5) ** 2) / (2 * 0.15**2)) for rate in rates]
    alike = [rate**8 + (1 - rate) ** 8 for rate in rates]
    effective = sum(weights) ** 2 / sum(weight**2 for weight in weights)
    assert found["exact_effective_share"] == pytest.approx(effective / 3)
    no_signal = sum(weight * a for weight, a in zip(weights, alike, strict=True)) / sum(weights)
    assert found["exact_no_signal"] == pytest.approx(no_signal)
    assert found["uniform_no_signal"] == pytest.approx(sum(alike) / 3)


@pytest.mark.slow
def test_a_tiny_plan_runs_resumes_and_reports(tmp_path, capsys, monkeypatch):
    for name in RANK:
        monkeypatch.delenv(name, raising=False)
    argv = ["--plan", "frontier-smoke", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert main([*argv, "--arms", "grpo-matched"]) == 0
    runs = tmp_path / "results" / "runs"
    names = {"akl-beta-0.02-seed-0.json", "grpo-matched-beta-0.02-seed-0.json"}
    assert {path.name for path in runs.iterdir()} == names
    akl, matched = (json.loads((runs / name).read_text()) for name in sorted(names))
    assert matched["kl_beta"] == akl["mean_beta"] != akl["kl_beta"]
    assert all(0 <= count <= 40 for count in akl["correct"]["held_out"])
    assert all(c <= last for c, last in zip(akl["correct"]["held_out"], akl["last_total"]["held_out"], strict=True))
    times = [path.stat().st_mtime_ns for path in sorted(runs.iterdir())]
    assert main([*argv, "--arms", "grpo-matched"]) == 0  # nothing runs again
    assert [path.stat().st_mtime_ns for path in sorted(runs.iterdir())] == times
    assert mechanism.main([*argv, "--arms", "akl", "--num-replies", "8"]) == 0
    (measured,) = json.loads((tmp_path / "results" / "mechanism.json").read_text()).values()
    assert measured["settings_sha256"] == akl["settings_sha256"]
    assert 0 <= measured["exact_no_signal"] <= measured["uniform_no_signal"] <= 1
    assert 0 < measured["exact_effective_share"] <= 1
    assert "| akl | 1 |" in capsys.readouterr().out
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("\n".join(["before", *MARKS, "after"]))
    assert main([*argv, "--report", "--page", str(page)]) == 0
    text = (tmp_path / "results" / "results.md").read_text()
    assert "2 of 6 runs of the plan frontier-smoke are finished" in text
    assert page.read_text() == f"before\n{MARKS[0]}\n\n{section(text)}\n{MARKS[1]}\nafter"
    assert (page.parent / "frontier" / "curves.png").exists()
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--arms", "grop"])
    assert stop.value.code == 2
    assert math.isfinite(akl["no_signal"])
