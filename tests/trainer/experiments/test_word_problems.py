"""Word problems have right answers, the written configuration is one, and finished runs become small results."""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from expo.config import load_config
from expo.errors import ConfigError
from expo.experiments import word_problems
from expo.experiments.word_problems import NUM_HELD_OUT, NUM_TRAIN, main

KINDS = ("word_problems", *word_problems.FAMILIES)


@pytest.fixture
def families(monkeypatch):
    """reasoning-gym with one family's form for all: sums of one-digit numbers, each of them twice."""
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(9) for b in range(9)] * 2
    factory = SimpleNamespace(
        DATASETS=dict.fromkeys(word_problems.FAMILIES),
        create_dataset=lambda name, **options: rows,
        create_curriculum=lambda name: SimpleNamespace(
            set_global_level=lambda level: None, generate_configuration=lambda options: SimpleNamespace(**options)
        ),
    )
    module = ModuleType("reasoning_gym")
    module.factory = factory
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def questions_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_word_problems_have_the_answer_that_their_text_gives():
    problems = word_problems.word_problems(200)
    assert len(dict(problems)) == 200
    assert problems == word_problems.word_problems(200) != word_problems.word_problems(200, seed=1)
    for text, answer in problems:
        has, *changes = re.findall(r"(has|gets|gives away) (\d+)", text)
        total = int(has[1]) + sum(int(number) * (1 if verb == "gets" else -1) for verb, number in changes)
        assert answer == total > 0, text


def test_the_written_folder_trains_on_all_kinds_and_holds_other_questions_out(families, tmp_path):
    folder = tmp_path / "words"
    assert main(["write", str(folder)]) == 0
    config = load_config(folder / "config.yaml")
    train = {row["question"] for row in questions_of(folder / "train.jsonl")}
    assert config.data.train == str(folder / "train.jsonl")
    assert tuple(config.evaluation.sets) == KINDS
    held_out = [
        {row["question"] for row in questions_of(path)} for path in map(folder.joinpath, map("{}.jsonl".format, KINDS))
    ]
    assert [len(each) for each in held_out] == [NUM_HELD_OUT] * len(KINDS)
    assert not any(train & each for each in held_out)
    assert train > set(dict(word_problems.word_problems(NUM_HELD_OUT + NUM_TRAIN)[NUM_HELD_OUT:]))
    assert (config.run.steps, config.kl.rho, config.curriculum.kind) == (60, "tanh", "gcs")


def finished_run(folder, arm, seed, after):
    run = folder / f"{arm}-{seed}"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(
        json.dumps({"steps": 2, "reply_tokens": 9, "seconds": 150.0, "commits": ["abc"], "seed": seed})
    )
    rows = [{"accuracy": 0.25, "zero_variance_fraction": 0.5}] * 2
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [{k: {"mean": mean, "low": mean / 2, "high": 1.0} for k in ("1", "8")} for mean in (0.25, after)]
    evaluations = [
        {"step": step, "sets": {"sums": {"pass_at": each, "num_questions": 3}}}
        for step, each in zip((0, 2), scores, strict=True)
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    return run


def test_finished_runs_become_small_results_and_a_table(tmp_path, capsys):
    runs = [finished_run(tmp_path, arm, seed, 0.5) for arm in ("grpo", "expo") for seed in (0, 1)]
    results, figure = tmp_path / "results", tmp_path / "curves.png"
    flags = ["--results", str(results), "--figure", str(figure)]
    assert main(["report", *map(str, runs), *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" 0.250 [0.125, 1.000] | 0.500 [0.250, 1.000] |") == 8
    assert [line.split(" | ")[0] for line in shown.splitlines()[2:]] == ["| expo", "| expo", "| grpo", "| grpo"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main(["report", *flags]) == 0  # from the small results alone
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("arguments", [["report"], ["report", "runs/expo-0"], ["report", "runs/expo"]])
def test_what_cannot_be_reported_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/expo").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--results", "results"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "finished run" in error


def test_a_family_with_too_few_questions_is_refused(families):
    with pytest.raises(ConfigError, match="has 81 different questions; expected 100"):
        word_problems.family_questions("products", 100)
