"""Reports of folders whose files are damaged, hostile or somebody else's: a page of the rest, or one line."""

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from expo.report import write_report
from expo.reporting import clean
from expo.reporting.figures import FIGURES
from tests.trainer.reporting.run_folders import CONFIG, fake_run, page_of, report_code, without_figures

LOGS = ("metrics", "curriculum", "evaluations", "completions")
OBJECTS = ("environment.json", "summary.json")
DATA = (*(f"{log}.jsonl" for log in LOGS), *OBJECTS)
HOSTILE: list[Any] = [
    None, True, -1, 10**400, 1e308, math.inf, math.nan, "", "text", "$x", r"$\frac{", "\ud800", "\0\n\x1b[31m", [], {},
    [None], {"mean": "0.5"}, [[[]]], "²", "9" * 30, "é" * 300,
]  # fmt: skip


NOT_YAML = ("\ud800", "\0\n\x1b[31m", 10**400)  # of which a configuration is refused


def spoil(value: Any, rng: random.Random, share: float, hostile: list[Any] = HOSTILE) -> Any:
    """The value with a share of its parts, and of the names in it, replaced."""
    if rng.random() < share:
        return rng.choice(hostile)
    if isinstance(value, dict):
        names = {name: str(rng.choice(hostile)) if rng.random() < share / 3 else name for name in value}
        return {names[name]: spoil(part, rng, share, hostile) for name, part in value.items()}
    if isinstance(value, list):
        return [spoil(part, rng, share, hostile) for part in value]
    return value


@pytest.mark.parametrize("seed", range(4))
def test_hostile_values_give_a_page_of_the_rest(tmp_path: Path, seed: int) -> None:
    run, rng = fake_run(tmp_path / "run", num_steps=24), random.Random(seed)
    share = 0.02 * 3**seed
    for name in LOGS:
        rows = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps(spoil(row, rng, share)) for row in rows]
        (run / f"{name}.jsonl").write_text("\n".join([*lines, "[" * 50_000, '{"step": ' + "1" * 5000 + "}", "half {"]))
    for name in OBJECTS:
        (run / name).write_text(json.dumps(spoil(json.loads((run / name).read_text()), rng, share)))
    taken = [value for value in HOSTILE if value not in NOT_YAML]
    config = {name: spoil(section, rng, share, taken) for name, section in CONFIG.items()}
    (run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    page = page_of(run)
    assert page.count("<figure") == len(FIGURES)
    assert "unreadable lines skipped" in page


def test_other_scores_and_names_than_this_program_writes_are_drawn(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", num_steps=2)
    point = {"mean": 0.5, "low": 0.4, "high": 0.6}
    odd = {"pass_at": {"1": point, "x": point, "0": point, "²": point}, "by_level": {"²": {"pass_at": {"1": point}}}}
    row = {"step": 0, "sets": {"$a_{": odd, "\ud800": odd, "of no form": [1], "empty": {}}}
    (run / "evaluations.jsonl").write_text(json.dumps(row))
    (run / "summary.json").unlink()
    page = page_of(run)
    assert page.count("0.500") >= 2
    assert (run / "pictures" / "levels.png").exists()


TEXTS = {
    "binary": b"\x00\xff\xfe" * 99,
    "date": b"run: {dir: 2026-99-99}",
    "nested": b"[" * 5000,
    "large number": b"run: {steps: " + b"9" * 5000 + b"}",
    "object of Python": b"!!python/object/apply:os.system ['true']",
    "recursive": b"run: &a [*a]\nkl: {beta: *a}",
    "bombs": b"a: &a [x, x]\nb: &b [*a, *a]\nrun: {steps: *b, seed: *b}\nkl: *b\n",
    "not finite": b"kl: {beta: .inf}\ncurriculum: {mean: .nan, std: 1.0e-300}",
    "NUL": b'policy: {dtype: "\\0"}',
    "half a character": b'policy: {dtype: "\\ud800"}',
    "sections of no names": b"1: {2: 3}\nnull: []",
}


@pytest.mark.parametrize("name", TEXTS)
def test_any_configuration_is_a_page_or_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path / "run", num_steps=2)
    (run / "config.yaml").write_bytes(TEXTS[name])
    code = report_code(run)
    printed = capsys.readouterr()
    assert (code, len(printed.err.splitlines()), len(printed.out.splitlines())) in ((1, 1, 0), (2, 1, 0), (0, 0, 1))


@pytest.mark.parametrize(
    "name", [*(f"{log}.jsonl" for log in LOGS), *OBJECTS, "config.yaml", "pictures", "report.html"]
)
@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link"])
def test_something_else_in_place_of_a_file_is_a_page_or_one_line(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    path = run / name
    path.unlink(missing_ok=True)
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "broken link": lambda: path.symlink_to("nothing")}[kind]()
    code = report_code(run)
    assert code == 0 or len(capsys.readouterr().err.splitlines()) == 1


def test_each_file_may_be_empty_cut_or_of_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)
    for name in DATA:
        for content in (b"", b"\n\n", b"\xff", b"{}\n", b"3\n", b'{"step": 1}\n'):
            run = fake_run(tmp_path / "run", num_steps=2)
            (run / name).write_bytes(content)
            assert write_report(run).exists()
            (run / name).write_bytes((run / name).read_bytes()[: len(content) // 2])
            assert write_report(run).exists()
            shutil.rmtree(run)


def test_numbers_and_names_are_what_a_figure_can_show() -> None:
    assert [clean.number(value) for value in (1, 0.5, True)] == [1.0, 0.5, 1.0]
    assert {clean.number(value) for value in (None, "1", math.nan, math.inf, 10**400, [], 1e300)} == {None}
    assert clean.label("$x\0$") == "\\$x\N{REPLACEMENT CHARACTER}\\$"
    assert clean.histogram([1, 2]) == [1.0, 2.0]
    assert clean.histogram([1, -2]) == clean.histogram([1, "2"]) == clean.histogram("12") == []
