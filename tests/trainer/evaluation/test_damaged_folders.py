"""Folders of evaluations with damaged or foreign files: what is whole is kept, the rest is one line."""

import json

import pytest

from expo.errors import ConfigError
from expo.evaluation.compare import main as compare_main
from expo.evaluation.protocol import PROTOCOL
from expo.evaluation.replies import read_replies, resume_replies
from expo.evaluation.session import _resume
from expo.run.folder import RunFolder


def reply(question, sample, **changes):
    row = {
        "set": "sums", "sample": sample, "question_id": question, "level": "", "question": "1+1=", "answer": "2",
        "reply": "2", "stated": "2", "verdict": "correct", "reward": 1.0, "num_tokens": 1, "truncated": False,
    }  # fmt: skip
    return json.dumps({**row, **changes}) + "\n"


WHOLE = reply("a", 0) + reply("a", 1) + reply("b", 0) + reply("b", 1)
NEXT = {
    "a question cut": reply("c", 0) + reply("c", 1)[:-9],
    "no end of the line": reply("c", 0) + reply("c", 1)[:-1],
    "garbage": "\ufffd[1\n" + reply("c", 0) + reply("c", 1),
    "nested": "[" * 100_000 + "\n",
    "other JSON": "[]\n3\nnull\n",
    "a missing sample": reply("c", 1) + reply("d", 0) + reply("d", 1),
    "a repeated sample": reply("c", 0) + reply("c", 0),
    "two questions in one": reply("c", 0) + reply("d", 1),
    "another set": reply("c", 0, set="other") + reply("c", 1, set="other"),
    "no verdict": reply("c", 0, verdict=None) + reply("c", 1),
    "tokens that are no number": reply("c", 0, num_tokens="3") + reply("c", 1),
}


@pytest.mark.parametrize("case", NEXT)
def test_replies_up_to_the_first_damaged_line_are_kept(tmp_path, case):
    path = tmp_path / "replies.jsonl"
    path.write_text(WHOLE + NEXT[case] + reply("e", 0) + reply("e", 1))
    assert resume_replies(path, 2, {"sums": {}}) == {"sums": 2}
    assert path.read_text() == WHOLE
    assert [row["question_id"] for row in read_replies(path, ["sums"])["sums"]] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ufffd"])
def test_a_damaged_protocol_is_one_error(tmp_path, text):
    (tmp_path / PROTOCOL).write_text(text)
    with pytest.raises(ConfigError, match=rf"{PROTOCOL} is damaged; restore it"):
        _resume(RunFolder(tmp_path), {"protocol": {"num_samples": 2}, "questions": {}})


def test_replies_that_are_no_file_are_one_error(tmp_path):
    metadata = {"protocol": {"num_samples": 2}, "questions": {}}
    (tmp_path / PROTOCOL).write_text(json.dumps(metadata))
    (tmp_path / "replies.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"replies.jsonl cannot be read or cut"):
        _resume(RunFolder(tmp_path), metadata)


SETS = {"sums": {"pass_at": {}, "questions": []}}


def whole(correct=1, majority=1.0, estimate=None):
    """Results of one question with one value replaced."""
    estimate = estimate or {"mean": 1.0, "low": 0.2, "high": 1.0}
    question = {"id": "a", "level": "", "correct": correct, "majority": majority}
    fractions = {f"{name}_fraction": 0.0 for name in ("truncated", "unparsed", "timeout")}
    scores = {
        "num_questions": 1,
        "pass_at": {"1": estimate},
        "maj_at_n": estimate,
        "questions": [question],
        **fractions,
    }
    questions = {"sums": {"questions_sha256": "0"}}
    return {"model": {}, "protocol": {"num_samples": 1}, "questions": questions, "sets": {"sums": scores}}


RESULTS = {
    "empty": {},
    "sets of no form": {"model": {}, "protocol": {"num_samples": 1}, "questions": {}, "sets": []},
    "no protocol": {"model": {}, "protocol": None, "questions": {}, "sets": SETS},
    "no number": {"model": {}, "protocol": {"num_samples": "n"}, "questions": {}, "sets": SETS},
    "no ids": {"model": {}, "protocol": {"num_samples": 1}, "questions": {}, "sets": {"sums": {"questions": [1]}}},
    "a score that is no number": whole(majority=float("nan")),
    "no score": whole(majority=None),
    "more correct replies than samples": whole(correct=9),
    "no interval": whole(estimate={"mean": 1.0, "low": None, "high": 1.0}),
    "an interval that is no number": whole(estimate={"mean": float("nan"), "low": 0.0, "high": 1.0}),
    "endless samples": {"model": {}, "protocol": {"num_samples": float("inf")}, "questions": {}, "sets": SETS},
    "no checksums": {"model": {}, "protocol": {"num_samples": 1}, "questions": {"sums": 1}, "sets": SETS},
}


def test_whole_results_are_compared(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(whole()))
    assert compare_main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0


@pytest.mark.parametrize("case", RESULTS)
def test_damaged_results_are_compared_with_one_line(tmp_path, capsys, case):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(RESULTS[case]))
    with pytest.raises(SystemExit) as stop:
        compare_main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
