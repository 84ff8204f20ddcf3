"""The page of a run: its numbers, its notices, and that model text is escaped."""

import json
import re
from pathlib import Path

import pytest
import yaml
from markupsafe import escape

from expo.reporting.comparison import results_table
from expo.reporting.reader import read_run
from tests.trainer.reporting.run_folders import (
    CONFIG,
    ENVIRONMENT,
    HOSTILE,
    completion,
    fake_run,
    one_set,
    page_of,
    pass_at,
    scores,
    without_figures,
    write_lines,
)


def test_the_page_has_no_script_and_no_external_resource(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_the_headline_gives_the_change_with_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run")
    summary = {"before": one_set(0.4, 0.37, 0.43), "after": one_set(0.7, 0.66, 0.74)}
    (run / "summary.json").write_text(json.dumps(summary))
    expected = "Held-out pass@1 rose from 0.400 to 0.700, a change of +0.300 (95\u00a0% interval +0.250 to +0.350)"
    assert expected in page_of(run)


@pytest.mark.parametrize(
    ("after", "verb"),
    [
        ((0.5, 0.47, 0.53), "rose"),
        ((0.41, 0.38, 0.44), "went from 0.400 to 0.410 (too few to tell), a change of"),
        ((0.2, 0.17, 0.23), "fell"),
    ],
)
def test_the_headline_claims_only_what_the_interval_supports(
    after: tuple[float, float, float], verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps({"before": one_set(0.4, 0.37, 0.43), "after": one_set(*after)}))
    assert f"Held-out pass@1 {verb}" in page_of(run)


def test_the_page_and_the_plain_text_table_show_the_same_numbers(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    text = re.sub(r"<[^>]+>", " ", (finished / "report.html").read_text()).replace("−", "-")
    numbers = re.findall(r"[+-]?\d\.\d{3}", text)
    expected = re.findall(r"[+-]?\d\.\d{3}", results_table(summary["before"], summary["after"]))
    start = len(re.findall(r"[+-]?\d\.\d{3}", text[: text.index("Before and after")]))
    assert len(expected) == 2 * 3 * 9
    assert numbers[start : start + len(expected)] == expected


def test_model_text_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / HOSTILE.split()[0].replace("/", ""), num_steps=1)
    hostile = dict.fromkeys(("question", "answer", "reply", "verdict", "level", "num_tokens"), HOSTILE)
    write_lines(run / "completions.jsonl", [{**completion(1, 1, is_correct=True), **hostile}])
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
    assert page.count(escape(HOSTILE)) >= 10


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("model", "model"),
        ("/work/sft/model", "model sft/model"),
        ("./Model/", "model"),
        ("../model", "model"),
        ("a/model-7b", "model model-7b"),
        ("org/name", "model name"),
        ("/", "model /"),
        ("", ""),
    ],
)
def test_a_model_folder_named_model_is_not_named_twice(path, shown, tmp_path, monkeypatch):
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model": {"path": path}, "data": {"train": "x/data"}}))
    assert f"Run run · EXPO · {shown + ' · ' if shown else ''}data x/data</p>" in page_of(run)


def test_a_row_on_a_narrow_screen_names_its_values(finished: Path) -> None:
    row = (finished / "report.html").read_text().split('<tr class="first">')[1].split("</tr>")[0]
    assert re.findall(r'data-label="(\w+)"', row) == ["Set", "Questions", "Before", "After", "Change"]
    assert "<td>pass@1</td>" in row
    # a style that moved out of the page, or a header without a label, would lose the columns
    assert "content: attr(data-label)" in (finished / "report.html").read_text()


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
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    (run / "environment.json").write_text(json.dumps(environment))
    assert f"<th>Commit</th><td>{commits}</td>" in page_of(run)


def test_a_very_long_reply_is_truncated_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    write_lines(run / "completions.jsonl", [{**completion(1, 1, is_correct=True), "reply": "7" * 7000}])
    page = page_of(run)
    assert "7" * 6000 in page
    assert "7" * 6001 not in page
    assert "1000 more characters" in page


def test_an_unfinished_run_is_reported_with_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)
    page = page_of(fake_run(tmp_path / "run", num_steps=7, is_finished=False))
    assert "the run is in progress, or stopped early, at step 7 of 60" in page
    assert "there is no second evaluation to compare it with yet" in page


def test_truncated_lines_are_counted_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=7)
    for name in ("metrics", "curriculum", "evaluations", "completions"):
        path = run / f"{name}.jsonl"
        path.write_bytes(path.read_bytes() + '{"step": 8, "reply": "é'.encode()[:-1])
    assert len(read_run(run).history.metrics) == 7
    page = page_of(run)
    for name in ("metrics", "curriculum", "evaluations", "completions"):
        assert f"{name}.jsonl: 1 unreadable line skipped" in page


def test_an_unreadable_summary_is_ignored_with_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=40)
    (run / "summary.json").write_text('{"seed": 3, "bef')
    page = page_of(run)
    assert "Held-out pass@1 rose" in page
    assert "summary.json: 1 unreadable line skipped" in page


@pytest.mark.parametrize(
    ("kind", "rho", "method"),
    [
        ("gcs", "tanh", "EXPO"),
        ("uniform", "constant", "GRPO"),
        ("gcs", "constant", "GRPO with the Gaussian curriculum"),
        ("uniform", "tanh", "GRPO with accuracy-conditioned KL"),
    ],
)
def test_the_method_is_named_after_the_settings(
    kind: str, rho: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "curriculum": {"kind": kind}, "kl": {"rho": rho}}))
    assert f"Run run · {method} · model ledger · data ledger:train" in page_of(run)
