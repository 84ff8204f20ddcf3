"""Sources of questions: published layouts, local files, the hub's library on local folders, reasoning-gym."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from expo.config import DataSection
from expo.data import load_questions, only_gradable, question_id, render_prompt
from expo.data.__main__ import main
from expo.data.hub import NAMED, HubSource, hub_table, parse_hub_source
from expo.data.reasoning import FAMILIES
from expo.errors import ConfigError
from expo.rewards.verifier import Verifier

FIXTURES = sorted((Path(__file__).parent / "questions").glob("*.jsonl"))  # real columns, rows written for the tests
GOLDS = {
    "aime-2024": ["225", "007"],
    "aime-2024-maxwell-jia": ["43"],
    "aime-2025": ["56", "323"],
    "aime-2025-opencompass": ["36"],
    "amc": ["3.0"],
    "amc-83": ["12.0", "142.0"],
    "dapo-17k": ["75", "45", "210"],
    "dapo-17k-raw": ["75", "45", "210"],
    "math-500": [r"\left( 3, \frac{\pi}{2} \right)", r"3\sqrt{5}", "(-2,2)", r"\text{Tuesday}"],
    "math-eval": ["9.6", "4, -4"],
    "minerva": ["2.16e5", r"\frac{1}{16}", "g t"],
    "olympiadbench": ["12", "2,3", r"$\sqrt{7}$, $-\sqrt{7}$"],
}


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def name_of(path):
    return path.stem


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the hub: `datasets` loads a local folder with the name of a set."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("path", FIXTURES, ids=name_of)
def test_every_layout_gives_answers_that_verify_when_boxed(path, tmp_path):
    loaded = load_questions(str(path))
    assert [question.answer for question in loaded.questions] == GOLDS[path.stem]
    with Verifier() as verifier:
        golds = [question.answer for question in loaded.questions]
        verdicts = verifier.grade([rf"Hence \boxed{{{gold}}}." for gold in golds], golds)
    assert [verdict.kind for verdict in verdicts] == ["correct"] * len(golds)
    again = load_questions(write_parquet(tmp_path / "same.parquet", rows_of(path)))
    assert again.questions == loaded.questions


def test_dapos_instructions_appear_once_in_the_prompt():
    raw, processed = (load_questions(str(path)) for path in FIXTURES if path.stem.startswith("dapo"))
    assert raw.questions == processed.questions
    texts = []
    render_prompt(
        raw.questions[0],
        DataSection(train="x", prompt="dapo", chat_template=False),
        lambda text: texts.append(text) or {"input_ids": []},
    )
    assert texts == [
        rows_of(FIXTURES[[path.stem for path in FIXTURES].index("dapo-17k-raw")])[0]["prompt"][0]["content"]
    ]


def test_the_published_repeats_of_dapo_are_reduced(tmp_path):
    (path,) = [path for path in FIXTURES if path.stem == "dapo-17k-raw"]
    loaded = load_questions(write_parquet(tmp_path / "raw.parquet", rows_of(path) * 100))
    assert (len(loaded.questions), loaded.num_duplicates) == (3, 297)
    assert "300 rows hold 3 questions, each 100 times" in loaded.notes[0]


def test_the_960_rows_of_aime_are_30_questions(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {n} + 1?"}], "reward_model": {"ground_truth": str(n + 1)}}
        for n in range(30)
    ]
    loaded = load_questions(write_parquet(tmp_path / "aime.parquet", rows * 32))
    assert len(loaded.questions) == 30
    assert "960 rows hold 30 questions, each 32 times" in loaded.notes[0]


def test_a_folder_is_the_sum_of_its_files(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(f'{{"question": "{number}?", "answer": {number}}}\n')
    write_parquet(tmp_path / "more.parquet", [{"problem": "0?", "answer": "0"}, {"problem": "3?", "answer": "3"}])
    loaded = load_questions(str(tmp_path))
    assert [question.text for question in loaded.questions] == ["0?", "1?", "2?", "3?"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.jsonl or \.parquet files"):
        load_questions(str(tmp_path / "empty"))


def test_parquet_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.parquet has the columns text, label; expected one of"):
        load_questions(write_parquet(tmp_path / "a.parquet", [{"text": "1", "label": 1}]))
    (tmp_path / "b.parquet").write_text("not Parquet")
    with pytest.raises(ConfigError, match=r"cannot read the question file .*b\.parquet"):
        load_questions(str(tmp_path / "b.parquet"))


def test_messages_other_than_one_question_are_refused(tmp_path):
    prompt = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    rows = [{"prompt": prompt, "reward_model": {"ground_truth": "2"}}]
    with pytest.raises(ConfigError, match=r"a\.parquet:1 has no usable `prompt`"):
        load_questions(write_parquet(tmp_path / "a.parquet", rows))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("math-ai/aime25", HubSource("math-ai/aime25")),
        ("math-ai/aime25:test", HubSource("math-ai/aime25", None, "test")),
        ("a/b/en:train[:100]@0ff1ce", HubSource("a/b", "en", "train[:100]", "0ff1ce")),
        ("questions", None),
        ("./a/b", None),
        ("/a/b/c/d", None),
    ],
)
def test_hub_sources_are_read_as_written(source, expected):
    assert parse_hub_source(source) == expected
    assert expected is None or str(expected) == source


@pytest.mark.parametrize("name", ["aime-2024", "olympiadbench@main"])
def test_a_named_set_comes_through_the_hubs_library(hub, name):
    named = NAMED[name.partition("@")[0]]
    (path,) = [path for path in FIXTURES if path.stem == name.partition("@")[0]]
    column = "problem" if "problem" in rows_of(path)[0] else "question"
    rows = [{**rows_of(path)[0], column: f"{number}?"} for number in range(named.num_rows)]
    write_parquet(hub / named.source.id / f"{named.source.split}.parquet", rows)
    loaded = load_questions(name)
    assert len(loaded.questions) == named.num_rows == named.num_distinct
    assert loaded.notes == ()
    assert loaded.questions[0].id == question_id("0?")  # never the column `id`, which differs between copies


def test_a_named_set_with_an_unexpected_number_of_rows_is_refused(hub):
    write_parquet(hub / "math-ai/aime25/test.parquet", [{"problem": f"{n}?", "answer": n} for n in range(31)])
    with pytest.raises(
        ConfigError, match=r"math-ai/aime25:test with 30 rows, but 31 were found.*name it math-ai/aime25"
    ):
        load_questions("aime-2025")


def test_a_named_set_with_repeated_questions_says_so(hub):
    rows = [{"problem": f"{n % 29}?", "answer": n % 29} for n in range(30)]
    write_parquet(hub / "math-ai/aime25/test.parquet", rows)
    assert load_questions("aime-2025").notes == ("29 questions of different text were found, 30 expected",)


def test_a_split_must_be_named_where_there_are_several(hub):
    for split in ("train", "test"):
        write_parquet(hub / f"someone/sums/{split}.parquet", [{"question": f"{split}?", "answer": 1}])
    with pytest.raises(ConfigError, match=r"cannot load someone/sums:dev from the Hugging Face hub"):
        load_questions("someone/sums:dev")
    with pytest.raises(ConfigError, match=r"has the splits train, test; say which, as in someone/sums:train"):
        hub_table(HubSource("someone/sums"))
    assert load_questions("someone/sums:test").questions[0].text == "test?"


def test_both_copies_of_dapo_have_the_same_number_of_questions():
    assert NAMED["dapo-17k"].num_distinct == NAMED["dapo-17k-raw"].num_distinct == 17_398


def test_reasoning_gym_gives_the_same_questions_for_the_same_seed():
    pytest.importorskip("reasoning_gym", reason="needs expo-rl[reasoning]")
    first, again, other = (load_questions(f"reasoning-gym:chain_sum?level=1&size=50&seed={seed}") for seed in (3, 3, 4))
    assert first.digest == again.digest != other.digest
    assert {question.level for question in first.questions} == {"level-1"}
    assert len(first.questions) + first.num_duplicates == 50


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verifier_agrees_with_the_familys_own_scorer(family):
    factory = pytest.importorskip("reasoning_gym.factory", reason="needs expo-rl[reasoning]")
    own = factory.create_dataset(family, size=20, seed=1)
    golds = [str(item["answer"]) for item in own]
    with Verifier() as verifier:
        for replies in (golds, [str(int(gold) + 1) for gold in golds]):
            verdicts = verifier.grade([rf"\boxed{{{reply}}}" for reply in replies], golds)
            scores = [own.score_answer(reply, item) for reply, item in zip(replies, own, strict=True)]
            assert [verdict.reward for verdict in verdicts] == [float(score == 1.0) for score in scores]
    assert load_questions(f"reasoning-gym:{family}?size=20&seed=1").questions[0].answer == golds[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("reasoning-gym:gcd?levle=1", "expected level, size and seed"),
        ("reasoning-gym:gcd?size=few", "expected level, size and seed"),
        ("reasoning-gym:gcd?size=0", "expected level, size and seed"),
    ],
)
def test_wrong_reasoning_gym_sources_are_refused(source, expected):
    with pytest.raises(ConfigError, match=expected):
        load_questions(source)


def test_an_unknown_family_is_named_with_the_nearest_one():
    pytest.importorskip("reasoning_gym", reason="needs expo-rl[reasoning]")
    with pytest.raises(ConfigError, match="no family 'countdwn'"):
        load_questions("reasoning-gym:countdwn")


def test_a_family_that_needs_its_scorer_says_so():
    pytest.importorskip("reasoning_gym", reason="needs expo-rl[reasoning]")
    loaded = load_questions("reasoning-gym:countdown?size=3")
    with pytest.raises(ConfigError, match=r"set --reward\.verifier=reasoning-gym"):
        only_gradable(loaded, skip_bad_answers=True)
    assert only_gradable(loaded, skip_bad_answers=False, verifier="reasoning-gym") is loaded


def test_a_family_without_levels_says_so():
    pytest.importorskip("reasoning_gym", reason="needs expo-rl[reasoning]")
    with pytest.raises(ConfigError, match="gsm_symbolic has no levels"):
        load_questions("reasoning-gym:gsm_symbolic?level=1")


def test_show_prints_the_prompt_with_its_special_tokens(capsys, ledger_model, tmp_path):
    _, tokenizer = ledger_model
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    end = tokenizer.eos_token
    tokenizer.chat_template = f"{end}{{{{ messages[0].content }}}}{end}"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert main(["show", "ledger:train", "--model", str(tmp_path), "--prompt", "plain", "-n", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    question = load_questions("ledger:train").questions[0]
    assert f"id {question.id}, level {question.level}, {len(question.text) + 2} tokens" in lines[0]
    assert lines[2] == f"{end}{question.text}{end}"
    assert lines[4] == f"gold answer: {question.answer}    graded as: {question.answer}"


def test_check_lists_what_is_wrong_with_a_set(capsys, tmp_path):
    rows = [
        {"question": "one half of one?", "answer": r"\frac{1}{2}", "id": "fine"},
        {"question": "and this?", "answer": r"\frac{1}{", "id": "broken"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    assert main(["check", str(path), "--against", str(path)]) == 1
    text = capsys.readouterr().out
    assert "6 rows" in text
    assert "2 questions; left out: 4 duplicate rows" in text
    assert "longest prompts, characters (give --model for tokens): fine 16, broken 9" in text
    assert "2 questions of" in text
    assert "1 gold answers cannot be graded:\n  broken" in text


def test_wrong_sources_end_the_command_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check", "aime2025"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m expo.data: error: ")
    assert "did you mean aime-2025" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("source", ["a\0b", "a\0b.jsonl", "x" * 5000, "x" * 5000 + ".jsonl"])
def test_a_name_that_no_file_can_have_is_one_line(source):
    with pytest.raises(ConfigError, match=r"the source .* cannot be read .*; give another file or name") as error:
        load_questions(source)
    assert len(str(error.value)) < 200
