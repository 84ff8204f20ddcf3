"""The embedded task: its questions, its tokenizer, and the shipped model."""

import ast
import collections
import hashlib
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expo.ledger import MODEL_PATH, beyond_questions, held_out_questions, train_questions, warm_start
from expo.ledger import questions as task

pytestmark = pytest.mark.medium

REPLY = "11,9,\\boxed{16}"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True).eval()


@pytest.fixture(scope="module")
def provenance():
    return json.loads((MODEL_PATH / "provenance.json").read_text())


def evaluated(question):
    """The total of a question text, computed from Python's syntax tree."""

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        sign = 1 if isinstance(node.op, ast.Add) else -1
        return value(node.left) + sign * value(node.right)

    return value(ast.parse(question.removesuffix("="), mode="eval").body)


def texts(questions):
    return [question.question for question in questions]


def test_a_seed_gives_the_same_questions_in_the_same_order():
    assert train_questions(3) == train_questions(3)
    assert held_out_questions() == held_out_questions()
    assert beyond_questions() == beyond_questions()
    # pinned, so that another Python version cannot quietly draw other questions
    drawn = "".join(texts(train_questions(0) + held_out_questions() + beyond_questions()))
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == "20a652c247ad64fe"


def test_seeds_draw_different_training_questions():
    shared = set(texts(train_questions(0))) & set(texts(train_questions(1)))
    assert len(shared) < 300  # all of level 1 and much of level 2 must repeat


@pytest.mark.parametrize("seed", range(5))
def test_training_questions_are_distinct_and_never_held_out(seed):
    drawn = texts(train_questions(seed))
    assert len(set(drawn)) == len(drawn) >= 1000
    assert not set(drawn) & set(texts(held_out_questions() + beyond_questions()))


def test_the_warm_start_is_never_trained_on_a_held_out_question():
    rng = random.Random(7)
    trained_on = {task.draw_training_question(rng, steps).question for steps in task.TRAIN_STEPS for _ in range(500)}
    assert not any(task.is_held_out(question) for question in trained_on)
    assert all(task.is_held_out(question) for question in texts(held_out_questions()))


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        train_questions(-1)


def test_answers_and_levels_are_right():
    for question, answer, level in train_questions(0) + held_out_questions() + beyond_questions():
        totals = task.running_totals(question)
        assert evaluated(question) == int(answer) == totals[-1]
        assert level == f"steps-{len(totals)}"
        assert all(0 <= total <= 29 for total in totals)


def test_levels_7_and_8_are_in_the_beyond_set_only():
    levels = [collections.Counter(q.level for q in drawn) for drawn in (train_questions(0), held_out_questions())]
    assert all(set(level) == {f"steps-{k}" for k in range(1, 7)} for level in levels)
    assert len(held_out_questions()) == 240
    assert collections.Counter(q.level for q in beyond_questions()) == {"steps-7": 30, "steps-8": 30}


def test_tokenizer_round_trip(tokenizer):
    ids = tokenizer.encode(REPLY)
    assert tokenizer.convert_ids_to_tokens(ids) == [*"11,9,", "\\boxed{", "1", "6", "}"]
    assert tokenizer.decode(ids) == REPLY
    padded = [tokenizer.pad_token_id, *ids, tokenizer.eos_token_id]
    assert tokenizer.decode(padded, skip_special_tokens=True) == REPLY


def test_shipped_tokenizer_is_the_one_the_code_builds(tokenizer):
    built = warm_start.build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    for question in texts(held_out_questions()):
        assert tokenizer.decode(tokenizer.encode(question)) == question
        assert tokenizer.encode(question) == built.encode(question)


def test_a_solver_that_never_slips_is_right():
    assert warm_start.sloppy_reply("3+8-2+7=", random.Random(0), slip_crossing=0.0, slip_other=0.0) == REPLY


def test_a_slip_is_off_by_1_or_10_within_the_range():
    replies = {warm_start.sloppy_reply("3+8=", random.Random(seed), 1.0, 1.0) for seed in range(50)}
    assert replies == {f"\\boxed{{{total}}}" for total in (1, 10, 12, 21)}


def test_provenance_names_the_scripts_as_they_are(provenance):
    assert provenance["script_sha256"] == warm_start.script_hashes()
    assert provenance["weights_sha256"] == warm_start.sha256(MODEL_PATH / "model.safetensors")


def test_shipped_files_are_small():
    sizes = {path.name: path.stat().st_size for path in MODEL_PATH.iterdir()}
    assert sum(sizes.values()) < 6_000_000
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= set(sizes)


def test_the_warm_started_model_can_still_improve(model, tokenizer):
    torch.manual_seed(0)
    questions = held_out_questions()
    right = warm_start.count_correct(model, tokenizer, questions, samples=4)
    assert 0.25 <= sum(right) / (4 * len(questions)) <= 0.5
    greedy = warm_start.count_correct(model, tokenizer, questions, samples=1, greedy=True)
    # greedy replies are right far more often than sampled ones; training closes this gap
    assert sum(greedy) / len(questions) >= 0.7


def test_training_pass_rates_spread_over_the_whole_range(model, tokenizer):
    torch.manual_seed(0)
    right = warm_start.count_correct(model, tokenizer, train_questions(0)[:256], samples=8)
    share = collections.Counter(right)
    assert all(share[count] >= 5 for count in range(9))


def test_an_existing_folder_is_not_overwritten(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        warm_start.main(["--out", str(tmp_path)])
    assert exit_info.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_a_warm_start_writes_a_complete_folder_and_is_reproducible(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "held_out_questions", lambda: held_out_questions()[:2])
    monkeypatch.setattr(task, "beyond_questions", lambda: beyond_questions()[:2])
    monkeypatch.setattr(task, "train_questions", lambda seed: train_questions(seed)[:2])
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        assert warm_start.main(["--out", str(folder), "--steps", "3"]) == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert {path.name for path in MODEL_PATH.iterdir()} == {path.name for path in folders[0].iterdir()}
