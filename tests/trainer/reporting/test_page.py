"""The report of a run, on run folders written here as the trainer writes them."""

import base64
import html
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from expo import report
from expo.errors import NotARunError
from expo.report import main, write_report
from expo.reporting.figures import PICTURES, drawing
from expo.reporting.reader import Estimate, Records, change, read_run, results_table
from expo.runtime import atomic_io

HOSTILE = "<script>alert('1 & 2')</script> </pre> \\boxed{12}"
CONFIG = {
    "run": {"seed": 3, "steps": 60},
    "model": {"path": "ledger"},
    "data": {"train": "ledger:train"},
    "rollout": {"group_size": 8, "temperature": 1.0},
    "curriculum": {"kind": "gcs", "mean": 0.5, "std": 0.35, "momentum": 0.9},
    "kl": {"beta": 0.02, "rho": "tanh", "estimator": "k3"},
    "policy": {"dtype": "float32"},
    "evaluation": {"num_samples": 64},
}
ENVIRONMENT = {
    "started": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789ab",
    "command": ["train.py", "--run.seed=3"],
    "versions": {"torch": "2.9.0", "transformers": "5.10.0", "absent": None},
    "machine": {"python": "3.11.7", "cpus": 2, "gpus": []},
}
PICTURE_NAMES = [draw.__name__.removeprefix("draw_") for draw, *_ in PICTURES]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def pass_at(skill: float, width: float = 0.05) -> dict[str, dict[str, float]]:
    """Estimates at k = 1, 8, 32 of questions that are each solved with chance `skill`."""
    means = {k: 1 - (1 - skill) ** (0.3 * k + 0.7) for k in (1, 8, 32)}
    return {
        str(k): {"mean": mean, "low": max(0, mean - width), "high": min(1, mean + width)} for k, mean in means.items()
    }


def scores(skill: float) -> dict[str, Any]:
    """Two sets, six levels that are trained on and two that are not."""

    def one_set(levels: range, num_questions: int) -> dict[str, Any]:
        by_level = {
            f"steps-{level}": {"num_questions": 40, "pass_at": pass_at(skill ** (1 + 0.35 * level), 0.08)}
            for level in levels
        }
        overall = pass_at(skill ** (1 + 0.35 * sum(levels) / len(levels)))
        return {"num_questions": num_questions, "pass_at": overall, "by_level": by_level}

    return {"held_out": one_set(range(1, 7), 240), "beyond": one_set(range(7, 9), 80)}


def metrics_of(step: int, num_steps: int, rng: random.Random) -> dict[str, Any]:
    done = step / max(num_steps, 1)
    accuracy = min(1.0, max(0.0, 0.42 + 0.25 * (1 - math.exp(-3 * done)) + rng.gauss(0, 0.035)))
    record = {
        "step": step,
        "accuracy": accuracy,
        "beta_eff": 0.02 * (math.tanh(accuracy) + 1) / 2,
        "kl": 0.0 if step == 1 else 0.11 * (1 - math.exp(-2 * done)) + abs(rng.gauss(0, 0.006)),
        "entropy": 0.62 * math.exp(-1.1 * done) + rng.gauss(0, 0.01),
        "loss": rng.gauss(0, 0.01),
        "grad_norm": 0.5,
        "learning_rate": 2e-4,
        "completion_length": 17.2 + 1.4 * done + rng.gauss(0, 0.3),
        "tokens_per_second": 5200 + rng.gauss(0, 100),
        "clip_low_fraction": 0.004 * done,
        "clip_high_fraction": 0.009 * done + abs(rng.gauss(0, 0.001)),
        "ratio_mean": 1.0,
        "ratio_max": 1.2,
        "unparsed_fraction": 0.06 * math.exp(-6 * done),
        "timeout_fraction": 0.0,
        "truncated_fraction": 0.02 * math.exp(-4 * done),
        "zero_variance_fraction": 0.12 + 0.1 * done + rng.gauss(0, 0.02),
        "effective_sample_size": 900.0,
        "seconds/rollout": 0.42 + rng.gauss(0, 0.02),
        "seconds/reward": 0.03,
        "seconds/reference": 0.13,
        "seconds/old": 0.0,
        "seconds/update": 0.55 + rng.gauss(0, 0.02),
        "seconds/curriculum": 0.002,
    }
    if step % 20 == 0:
        record["seconds/checkpoint"] = 0.2
    record["seconds"] = 0.05 + sum(value for key, value in record.items() if key.startswith("seconds/"))
    return record


def histogram_at(done: float, rng: random.Random) -> list[int]:
    """Pass rates that all start at 0.5 and spread upwards."""
    counts = [0] * 20
    for question in range(1000):
        goal = (question / 1000) ** 0.5
        rate = 0.5 + (goal - 0.5) * min(1, 1.2 * done) + rng.gauss(0, 0.04 * done)
        counts[min(19, max(0, int(20 * rate)))] += 1
    return counts


def completion(step: int, question: int, *, is_right: bool) -> dict[str, Any]:
    return {
        "step": step,
        "question_id": question,
        "question": f"{question}+5-2+8=",
        "answer": str(question + 11),
        "reply": f"{question + 5},{question + 3},\\boxed{{{question + 11 if is_right else question + 1}}}",
        "verdict": "correct" if is_right else "wrong",
        "reward": float(is_right),
        "num_tokens": 15,
        "truncated": False,
        "level": "steps-3",
    }


def fake_run(folder: Path, num_steps: int = 60, *, is_finished: bool = True) -> Path:
    """A run folder as the trainer leaves it; unfinished: stopped before the last evaluation."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    steps = range(1, num_steps + 1)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    write_lines(folder / "metrics.jsonl", [metrics_of(step, num_steps, rng) for step in steps])
    histograms = [(step, histogram_at(step / num_steps, rng)) for step in steps if step % 2 == 0]
    rows = [{"step": s, "histogram": h, "visited": 900, "num_questions": 1000} for s, h in [(0, [0] * 20), *histograms]]
    rows[0]["histogram"] = [0] * 10 + [1000] + [0] * 9
    write_lines(folder / "curriculum.jsonl", rows)
    skills = [
        (step, 0.62 + 0.22 * (1 - math.exp(-3 * step / max(num_steps, 1)))) for step in range(0, num_steps + 1, 20)
    ]
    evaluations = [
        {"step": step, "seconds": 20.0, "num_samples": 64, "temperature": 1.0, "sets": scores(skill)}
        for step, skill in (skills if is_finished else skills[:1])
    ]
    write_lines(folder / "evaluations.jsonl", evaluations)
    replies = [completion(s, q, is_right=(s + q) % 3 != 0) for s in steps if s % 10 == 1 for q in range(9)]
    write_lines(folder / "completions.jsonl", replies)
    if is_finished:
        sets = {"before": evaluations[0]["sets"], "after": evaluations[-1]["sets"]}
        summary = {"seed": 3, "commit": "0123456789ab", "seconds": 203.0, "steps": num_steps, **sets}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module", autouse=True)
def coarse_pictures() -> Iterator[None]:
    """Fewer dots an inch: most of a report's time goes into them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 30)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = fake_run(tmp_path_factory.mktemp("runs") / "ledger-3")
    write_report(run)
    return run


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the page alone: drawing is most of a report's time."""
    monkeypatch.setattr(report, "draw_pictures", lambda records: [])


def test_every_picture_is_a_file_and_stands_in_the_page(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = [(finished / "pictures" / f"{name}.png").read_bytes() for name in PICTURE_NAMES]
    assert [base64.b64decode(data) for data in embedded] == files
    assert all(content.startswith(b"\x89PNG") for content in files)


def test_page_asks_for_nothing_from_elsewhere(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_nothing_but_the_report_is_left_in_the_folder(finished: Path, tmp_path: Path) -> None:
    before = {path.name for path in fake_run(tmp_path / "run").iterdir()}
    assert {path.name for path in finished.iterdir()} == before | {"report.html", "pictures"}
    assert {path.name for path in (finished / "pictures").iterdir()} == {f"{name}.png" for name in PICTURE_NAMES}


def test_a_second_report_is_the_same(finished: Path) -> None:
    first = (finished / "report.html").read_bytes()
    assert write_report(finished).read_bytes() == first


def test_headline_gives_the_gain_with_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / "run")
    summary = {"before": one_set(0.4, 0.37, 0.43), "after": one_set(0.7, 0.66, 0.74)}
    (run / "summary.json").write_text(json.dumps(summary))
    wanted = "Held-out pass@1 rose from 0.400 to 0.700, a change of +0.300 (95\u00a0% interval +0.250 to +0.350)"
    assert wanted in page_of(run)


def one_set(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"held_out": {"num_questions": 240, "pass_at": {"1": {"mean": mean, "low": low, "high": high}}}}


@pytest.mark.parametrize(
    ("after", "verb"),
    [((0.5, 0.47, 0.53), "rose"), ((0.41, 0.38, 0.44), "did not clearly move"), ((0.2, 0.17, 0.23), "fell")],
)
def test_headline_claims_only_what_the_interval_allows(
    after: tuple[float, float, float], verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps({"before": one_set(0.4, 0.37, 0.43), "after": one_set(*after)}))
    assert f"Held-out pass@1 {verb}" in page_of(run)


def test_interval_of_a_change_adds_half_widths_in_squares() -> None:
    gain = change(Estimate(0.4, 0.37, 0.44), Estimate(0.7, 0.67, 0.74))
    # below: 0.03 of after and 0.04 of before; above: 0.04 and 0.03; a 3-4-5 triangle either way
    assert gain == pytest.approx((0.30, 0.25, 0.35))


def test_results_table_by_hand() -> None:
    before = one_set(0.4, 0.37, 0.44)
    after = one_set(0.7, 0.67, 0.74)
    after["held_out"]["pass_at"]["8"] = {"mean": 0.9, "low": 0.88, "high": 0.93}
    assert results_table(before, after).splitlines() == [
        "set       n    metric  before [95 %]         after [95 %]          change [95 %]",
        "--------  ---  ------  --------------------  --------------------  -----------------------",
        "held_out  240  pass@1  0.400 [0.370, 0.440]  0.700 [0.670, 0.740]  +0.300 [+0.250, +0.350]",
        "held_out  240  pass@8  -                     0.900 [0.880, 0.930]  -",
    ]


def test_results_table_without_a_second_evaluation_shows_the_first() -> None:
    assert results_table(one_set(0.4, 0.37, 0.43), {}).splitlines()[-1].split() == [
        *("held_out", "240", "pass@1", "0.400", "[0.370,", "0.430]", "-", "-")
    ]


def test_page_and_plain_table_give_the_same_numbers(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    text = re.sub(r"<[^>]+>", " ", (finished / "report.html").read_text()).replace("−", "-")
    numbers = re.findall(r"[+-]?\d\.\d{3}", text)
    wanted = re.findall(r"[+-]?\d\.\d{3}", results_table(summary["before"], summary["after"]))
    start = len(re.findall(r"[+-]?\d\.\d{3}", text[: text.index("Before and after")]))
    assert len(wanted) == 2 * 3 * 9
    assert numbers[start : start + len(wanted)] == wanted


def test_model_text_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / HOSTILE.split()[0].replace("/", ""), num_steps=1)
    hostile = dict.fromkeys(("question", "answer", "reply", "verdict", "level", "num_tokens"), HOSTILE)
    write_lines(run / "completions.jsonl", [{**completion(1, 1, is_right=True), **hostile}])
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model": {"path": HOSTILE}}))
    (run / "environment.json").write_text(json.dumps({**ENVIRONMENT, "versions": {HOSTILE: HOSTILE}}))
    evaluation = {
        "step": 0,
        "num_samples": HOSTILE,
        "temperature": HOSTILE,
        "sets": {HOSTILE: scores(0.5)["beyond"]},
    }
    evaluation["sets"][HOSTILE]["by_level"] = {HOSTILE: {"num_questions": HOSTILE, "pass_at": pass_at(0.5)}}
    write_lines(run / "evaluations.jsonl", [evaluation])
    (run / "summary.json").unlink()
    page = page_of(run)
    assert "<script" not in page
    assert page.count(html.escape(HOSTILE)) >= 10


@pytest.mark.parametrize(
    ("environment", "commits"),
    [
        ({**ENVIRONMENT, "commit": "abc"}, "abc"),
        ({"starts": [{**ENVIRONMENT, "commit": "abc", "first_step": 1}]}, "abc"),
        ({"starts": [{"commit": c, "first_step": n} for c, n in (("abc", 1), ("abc", 7), ("def", 41))]},
         "abc from step 1, def from step 41"),
        ({"starts": [{"commit": "abc"}, {"commit": "def", "first_step": 41}]}, "abc, def from step 41"),
        ({}, "0123456789ab"),
    ],
)  # fmt: skip
def test_every_commit_of_a_run_is_shown(tmp_path, monkeypatch, environment, commits):
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    (run / "environment.json").write_text(json.dumps(environment))
    assert f"<th>Commit</th><td>{commits}</td>" in page_of(run)


def test_very_long_reply_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    write_lines(run / "completions.jsonl", [{**completion(1, 1, is_right=True), "reply": "7" * 7000}])
    page = page_of(run)
    assert "7" * 6000 in page
    assert "7" * 6001 not in page
    assert "1000 more characters" in page


def test_replies_come_from_first_middle_and_last_recorded_step(finished: Path) -> None:
    replies = read_run(finished).replies
    assert list(replies) == [1, 31, 51]
    for shown in replies.values():
        assert len({reply["question_id"] for reply in shown}) == 4
        assert {reply["verdict"] for reply in shown} == {"correct", "wrong"}


@pytest.mark.parametrize(("num_right", "num_wrong"), [(9, 0), (0, 9), (9, 1), (1, 9), (1, 1)])
def test_replies_are_filled_up_from_whatever_there_is(num_right: int, num_wrong: int, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", num_steps=1)
    rewards = [True] * num_right + [False] * num_wrong
    write_lines(run / "completions.jsonl", [completion(1, q, is_right=r) for q, r in enumerate(rewards)])
    (shown,) = read_run(run).replies.values()
    assert len(shown) == min(4, num_right + num_wrong)
    assert {reply["reward"] > 0 for reply in shown} == set(rewards)


def test_unfinished_run_is_reported_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    page = page_of(fake_run(tmp_path / "run", num_steps=7, is_finished=False))
    assert "the run is still going, or stopped early, at step 7 of 60" in page
    assert "there is no second evaluation to compare it with yet" in page


def test_run_of_no_steps_has_a_page_without_pictures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    page = page_of(run)
    assert "Nothing evaluated yet" in page
    assert "at step 0 of 60" in page
    assert page.count("Nothing recorded for this picture yet") == len(PICTURE_NAMES)
    assert not list((run / "pictures").iterdir())


def test_one_step_of_grpo_before_any_second_evaluation_has_every_picture(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", num_steps=1, is_finished=False)
    grpo = {"curriculum": {"kind": "uniform"}, "kl": {"beta": 0.02, "rho": "constant"}}
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **grpo}))
    assert page_of(run).count("<img") == len(PICTURE_NAMES)


def test_missing_metrics_leave_gaps_not_errors(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", num_steps=3)
    write_lines(run / "metrics.jsonl", [{"step": 1}, {"step": 2, "accuracy": None}, {"step": 3, "accuracy": 0.5}])
    write_lines(run / "curriculum.jsonl", [{"step": 1, "histogram": [0] * 20}])
    page = page_of(run)
    assert 0 < page.count("<img") < len(PICTURE_NAMES)


def test_line_cut_short_is_counted_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=7)
    for name in ("metrics", "curriculum", "evaluations", "completions"):
        path = run / f"{name}.jsonl"
        path.write_bytes(path.read_bytes() + '{"step": 8, "reply": "é'.encode()[:-1])
    assert len(read_run(run).records.metrics) == 7
    page = page_of(run)
    for name in ("metrics", "curriculum", "evaluations", "completions"):
        assert f"{name}.jsonl: 1 unreadable line left out" in page


def test_step_recorded_twice_counts_once_as_last_written(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", num_steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "accuracy": 0.25}) + "\n")
    metrics = read_run(run).records.metrics
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5]
    assert metrics[3]["accuracy"] == 0.25


def test_broken_summary_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=40)
    (run / "summary.json").write_text('{"seed": 3, "bef')
    page = page_of(run)
    assert "Held-out pass@1 rose" in page
    assert "summary.json: 1 unreadable line left out" in page


@pytest.mark.parametrize(
    ("kind", "rho", "method"),
    [
        ("gcs", "tanh", "EXPO"),
        ("uniform", "constant", "GRPO"),
        ("gcs", "constant", "GRPO with the Gaussian curriculum"),
        ("uniform", "tanh", "GRPO with accuracy-conditioned KL"),
    ],
)
def test_method_is_named_by_the_settings(
    kind: str, rho: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "curriculum": {"kind": kind}, "kl": {"rho": rho}}))
    assert f"Run run · {method} · model ledger · data ledger:train" in page_of(run)


def test_setting_of_an_absent_section_is_none() -> None:
    assert Records(config={"kl": None}).setting("kl", "beta") is None
    assert Records().setting("kl", "beta") is None


@pytest.mark.parametrize("config", [None, "just text", "a: [1", "- 1"])
def test_folder_that_is_not_a_run_exits_with_two_and_one_line(
    config: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotARunError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")


def test_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    write_report(run)
    (run / "report.html").write_text("old")
    names = {path.name for path in run.iterdir()}

    def fail(*paths: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(atomic_io.os, "replace", fail)
    assert main([str(run)]) == 2
    assert (run / "report.html").read_text() == "old"
    assert {path.name for path in run.iterdir()} == names


def test_command_prints_where_the_report_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_drawing(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_import_needs_neither_models_nor_drawing() -> None:
    code = "import sys, expo.report; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
