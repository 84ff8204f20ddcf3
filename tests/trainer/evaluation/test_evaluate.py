"""Evaluations: with a scripted engine within a run, and of models by `python -m expo.evaluate`."""

import json
import subprocess
import sys
from itertools import groupby

import pytest

from expo import ledger
from expo.config import EvaluationSection
from expo.errors import ConfigError
from expo.evaluate import evaluate, evaluate_model, main, pass_at_k
from expo.evaluation.config import parse_command_line
from expo.rewards.verifier import Verifier
from expo.rollout.data_parallel import DataParallelEngine
from expo.types import Prompt, Question, Reply
from tests import ROOT

pytestmark = pytest.mark.medium

NUM_QUESTIONS, NUM_SAMPLES = 20, 8


class ScriptedEngine:
    """The first `right` replies to a question are correct, the next one is 7, and the others have no answer."""

    def generate(self, requests, sampling, on_progress=None):
        groups = []
        for request in requests:
            right = request.prompt_ids[0]
            texts = ["\\boxed{1}"] * right + ["\\boxed{7}"] + ["no idea"] * len(request.seeds)
            groups.append([Reply([1], [0.0], text == "no idea", text) for text in texts[: len(request.seeds)]])
        return groups


def test_evaluation_reports_each_set_and_level():
    prompts = [Prompt(Question(str(n), "?", "1", level), [n]) for n, level in enumerate(["easy", "easy", "hard", ""])]
    section = EvaluationSection(num_samples=10)
    result = evaluate(ScriptedEngine(), Verifier(), {"set": prompts}, section, max_new_tokens=5, seed=0)
    found = result["sets"]["set"]
    assert found["pass_at"]["1"]["mean"] == pytest.approx((0 + 1 + 2 + 3) / 40)
    assert found["pass_at"]["8"]["mean"] == pytest.approx(sum(pass_at_k(10, c, 8) for c in range(4)) / 4)
    assert set(found["pass_at"]) == {"1", "8"}
    assert found["unparsed_fraction"] == found["truncated_fraction"] == pytest.approx((9 + 8 + 7 + 6) / 40)
    assert {name: level["num_questions"] for name, level in found["by_level"].items()} == {
        "easy": 2,
        "hard": 1,
    }
    assert found["by_level"]["hard"]["pass_at"]["1"]["mean"] == pytest.approx(0.2)


def test_the_scores_of_each_set_are_handed_on_with_its_replies():
    prompts, found = [Prompt(Question("0", "?", "1"), [0])], []
    section = EvaluationSection(num_samples=2)
    scores = evaluate(
        ScriptedEngine(), Verifier(), {"a": prompts, "b": prompts}, section, 5, 0,
        on_scores=lambda name, scores, graded: found.append((name, scores, [row["reply"] for row in graded.rows()])),
    )  # fmt: skip
    assert found == [(name, scores["sets"][name], ["\\boxed{7}", "no idea"]) for name in ("a", "b")]


# --- the command


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A file of held-out questions."""
    path = tmp_path_factory.mktemp("questions") / "sums.jsonl"
    return write_questions(path, ledger.held_out_questions()[::12])


def write_questions(path, questions):
    rows = [{"question": q.question, "answer": q.answer, "level": q.level} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def argv(questions, out, *more):
    return ["ledger", "--sets", str(questions), "--num-samples", str(NUM_SAMPLES), "--out", str(out), *more]


def measured(questions, out, *more):
    folder = evaluate_model(parse_command_line(argv(questions, out, *more)))
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(questions, tmp_path_factory):
    """The folder of an evaluation that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    measured(questions, out)
    return out


def replies_of(folder):
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


def assert_same_bytes(one, other):
    for name in ("results.json", "replies.jsonl", "protocol.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_an_evaluation_whose_replies_state_no_answer_shows_them(tmp_path, capsys):
    few = write_questions(tmp_path / "few.jsonl", ledger.held_out_questions()[:4])
    measured(few, tmp_path / "out", f"--rollout.stop_tokens={[str(digit) for digit in range(10)]}")
    lines = capsys.readouterr().out.splitlines()
    (start,) = [index for index, line in enumerate(lines) if line.startswith("warning: ")]
    assert "no reply of the evaluation set few states an answer that can be read; the verifier reads" in lines[start]
    assert [line.startswith("  unparsed, since its box ") for line in lines[start + 1 :]] == [True, True, True, False]


def test_the_results_follow_from_the_saved_replies(whole):
    results, replies = json.loads((whole / "results.json").read_text()), replies_of(whole)
    found = results["sets"]["sums"]
    groups = [(key, list(group)) for key, group in groupby(replies, key=lambda row: row["question_id"])]
    assert [len(group) for _, group in groups] == [NUM_SAMPLES] * NUM_QUESTIONS
    correct = [sum(row["verdict"] == "correct" for row in group) for _, group in groups]
    assert [(key, c) for (key, _), c in zip(groups, correct, strict=True)] == [
        (question["id"], question["correct"]) for question in found["questions"]
    ]
    assert 0.2 < found["pass_at"]["1"]["mean"] < 0.7  # 0.44 on all 240 with 64 samples
    for k in range(1, NUM_SAMPLES + 1):
        mean = sum(pass_at_k(NUM_SAMPLES, c, k) for c in correct) / NUM_QUESTIONS
        assert found["pass_at"][str(k)]["mean"] == pytest.approx(mean)
    assert found["mean_at_n"] == found["pass_at"]["1"]
    assert found["mean_length"] == pytest.approx(sum(row["num_tokens"] for row in replies) / len(replies))
    assert found["maj_at_n"]["mean"] == pytest.approx(sum(q["majority"] for q in found["questions"]) / NUM_QUESTIONS)


def test_the_protocol_is_in_the_results(whole):
    results = json.loads((whole / "results.json").read_text())
    protocol = results["protocol"]
    assert (protocol["num_samples"], protocol["temperature"], protocol["top_p"]) == (NUM_SAMPLES, 1.0, 1.0)
    assert (protocol["max_new_tokens"], protocol["seed"], protocol["prompt"]) == (32, 0, "plain")
    assert results["model"]["path"] == "ledger"
    assert len(results["model"]["weights_sha256"]) == len(results["questions"]["sums"]["questions_sha256"]) == 64
    assert results["questions"]["sums"]["first_prompt"].endswith("=")
    assert results["software"]["versions"]["torch"]
    assert not {"seconds", "started"} & set(results)


def test_two_evaluations_with_different_batches_give_equal_bytes(whole, questions, tmp_path):
    measured(questions, tmp_path / "again", "--rollout.batch_size=24")
    assert_same_bytes(tmp_path / "again", whole)


def test_like_an_evaluation_repeats_it_and_is_compared_with_it(whole, tmp_path, capsys):
    evaluate_model(parse_command_line(["ledger", "--like", str(whole), "--out", str(tmp_path / "again")]))
    out = capsys.readouterr().out
    assert f"protocol: that of {whole / 'results.json'}\n" in out
    assert "other than there" not in out
    assert_same_bytes(tmp_path / "again", whole)
    assert main(["compare", str(whole), str(tmp_path / "again")]) == 0
    assert "too few to tell" in capsys.readouterr().out


KILLED = """
import json, os, signal, sys
from expo.evaluate import main
from expo.run.folder import RunFolder

append, calls = RunFolder.append, []

def cut(folder, name, *rows):
    calls.append(name)
    if len(calls) < 3:
        return append(folder, name, *rows)
    text = "".join(json.dumps(row) + chr(10) for row in rows)
    with (folder.path / "replies.jsonl").open("a") as file:
        file.write(text[: len(text) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

RunFolder.append = cut
main(sys.argv[1:])
"""


@pytest.mark.medium
def test_a_killed_evaluation_resumes_without_sampling_again_and_ends_with_the_same_bytes(
    whole, questions, tmp_path, monkeypatch
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # libraries tested before in this process may have left it behind
    out, small = tmp_path / "out", "--rollout.batch_size=8"
    done = subprocess.run([sys.executable, "-c", KILLED, *argv(questions, out, small)], check=False)
    assert done.returncode == -9
    kept = (out / "replies.jsonl").read_text()
    assert not kept.endswith("\n")
    assert not (out / "results.json").exists()

    sampled = []
    generate = DataParallelEngine.generate

    def counted(engine, requests, *rest):
        sampled.extend(requests)
        return generate(engine, requests, *rest)

    monkeypatch.setattr(DataParallelEngine, "generate", counted)
    measured(questions, out, small)
    num_whole = kept.count("\n") // NUM_SAMPLES
    assert num_whole > 8, "two chunks of four questions are complete, and the third in part"
    assert len(sampled) == NUM_QUESTIONS - num_whole
    assert_same_bytes(out, whole)
    measured(questions, out)
    assert len(sampled) == NUM_QUESTIONS - num_whole, "a finished evaluation samples nothing"
    assert_same_bytes(out, whole)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--temperature", "0.5"], "protocol.temperature (1.0 -> 0.5)"),
        (["--top-p", "0.9", "--seed=1"], "protocol.top_p (1.0 -> 0.9), protocol.seed (0 -> 1)"),
    ],
)
def test_a_folder_of_another_protocol_is_refused_and_the_difference_named(whole, questions, more, expected):
    before = (whole / "results.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        measured(questions, whole, *more)
    assert expected in str(error.value)
    assert (whole / "results.json").read_bytes() == before


def test_a_folder_of_other_questions_or_other_files_is_refused(whole, questions, tmp_path):
    other = write_questions(tmp_path / "sums.jsonl", ledger.held_out_questions()[1::12])
    with pytest.raises(ConfigError, match=r"questions\.sums\.source .* questions\.sums\.questions_sha256"):
        measured(other, whole)
    with pytest.raises(ConfigError, match="holds files but no evaluation"):
        measured(questions, other.parent)


def write_repeated(path, questions, times):
    """Like BytedTsinghua-SIA/AIME-2024: `times[i]` rows for the i-th question, each with its own id."""
    rows = [
        {"id": f"{r}-{i}", "question": q.question, "answer": q.answer}
        for i, q in enumerate(questions)
        for r in range(times[i])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("times", [[32] * 6, [32] * 5 + [31]])
def test_a_file_that_repeats_each_question_is_refused(tmp_path, times):
    path = write_repeated(tmp_path / "aime.jsonl", ledger.held_out_questions()[:6], times)
    with pytest.raises(
        ConfigError, match=rf"--sets aime: .* has {sum(times)} rows for 6 questions, .*--num-samples={min(times)}"
    ):
        measured(path, tmp_path / "out", "--num-samples=2")
    assert not (tmp_path / "out").exists()


def test_a_repeated_question_is_evaluated_once_and_reported(tmp_path, capsys):
    path = write_repeated(tmp_path / "some.jsonl", ledger.held_out_questions()[:6], [1, 1, 3, 1, 1, 20])
    results = measured(path, tmp_path / "out", "--num-samples=2")
    assert results["questions"]["some"]["num_questions"] == results["sets"]["some"]["num_questions"] == 6
    assert results["questions"]["some"]["left_out"]["duplicate rows"] == 21
    assert len(replies_of(tmp_path / "out")) == 12
    assert "27 rows hold 6 questions" in capsys.readouterr().out


LAYOUTS = sorted(path for path in (ROOT / "tests/trainer/data/questions").glob("*.jsonl") if "dapo" not in path.name)
"""Rows with the columns of each published benchmark."""


def in_layout(like, question, index):
    """A row with the columns and types of another row and the content of a ledger question."""
    row = dict(like)
    for key, value in like.items():
        if key.lower() in ("problem", "question"):
            row[key] = question.question
        elif key.lower() in ("answer", "final_answer"):
            row[key] = [question.answer] if isinstance(value, list) else type(value)(question.answer)
        elif key.lower() in ("id", "unique_id"):
            row[key] = type(value)(index)
    return row


def test_a_file_with_the_columns_of_any_benchmark_gives_the_same_pass_at_1(whole, tmp_path):
    sets = []
    for path in LAYOUTS:
        like = json.loads(path.read_text().splitlines()[0])
        rows = [in_layout(like, q, index) for index, q in enumerate(ledger.held_out_questions()[::12])]
        (tmp_path / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets.append(str(tmp_path / path.name))
    options = ["--num-samples", str(NUM_SAMPLES), "--out", str(tmp_path / "out")]
    folder = evaluate_model(parse_command_line(["ledger", "--sets", *sets, *options]))
    results = json.loads((folder / "results.json").read_text())
    assert len(results["sets"]) == 10
    expected = json.loads((whole / "results.json").read_text())["sets"]["sums"]["pass_at"]["1"]
    for name, found in results["sets"].items():
        assert found["num_questions"] == NUM_QUESTIONS, name
        assert found["unparsed_fraction"] < 0.05, name
        assert expected["low"] < found["pass_at"]["1"]["mean"] < expected["high"], name


def test_top_p_and_temperature_reach_the_engine(questions, tmp_path):
    sharp = measured(questions, tmp_path / "sharp", "--num-samples=4", "--top-p=0.01")
    greedy = measured(questions, tmp_path / "greedy", "--num-samples=1", "--temperature=0")
    texts = [row["reply"] for row in replies_of(tmp_path / "greedy")]
    assert [row["reply"] for row in replies_of(tmp_path / "sharp")] == [text for text in texts for _ in range(4)]
    assert sharp["sets"]["sums"]["pass_at"]["4"] == greedy["sets"]["sums"]["pass_at"]["1"]


def test_prompts_that_are_too_long_are_refused_and_not_left_out(questions, tmp_path):
    with pytest.raises(ConfigError, match=r"sums: the prompts of \d+ questions are longer .*; raise it to \d+"):
        measured(questions, tmp_path / "out", "--data.max_prompt_tokens=8")
