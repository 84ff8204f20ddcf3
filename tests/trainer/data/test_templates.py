"""Templates around a question: names, texts with {question}, Jinja texts and files, and values that look like one."""

import pytest
from pydantic import ValidationError

from expo.config import DataSection, load_config
from expo.config.templates import PROMPTS, SUFFIXES
from expo.data.__main__ import main
from expo.data.prompts import asks_for_answer, user_text
from expo.errors import ConfigError
from expo.rewards.verifier import Verifier
from expo.runtime.cli import FlagText, flag_value
from expo.types import Question, QuestionParts
from tests.trainer.data.test_layouts import write

PARTS = QuestionParts("How many?", "Ann has 3.", (("A", "3"), ("B", "4")))
QUESTION = Question("1", PARTS.text(), "A", parts=PARTS)
PLAIN = Question("2", "1+1=", "2")


def rendered(template, question=PLAIN):
    return user_text(question, DataSection(train="x", template=template))


def refused(template):
    with pytest.raises(ValidationError) as error:
        DataSection(train="x", template=template)
    (item,) = error.value.errors()
    assert "\n" not in item["msg"]
    assert len(item["msg"]) < 400
    return item["msg"]


def test_parts_that_a_template_does_not_use_belong_to_the_question():
    whole = "Ann has 3.\n\nHow many?\n(A) 3\n(B) 4"
    assert QUESTION.text == whole
    for template in ("{question}", "{{ question }}", "plain"):
        assert rendered(template, QUESTION) == whole
    assert rendered("{{ context }}|{{ question }}", QUESTION) == "Ann has 3.|How many?\n(A) 3\n(B) 4"
    assert rendered("{{ question }}|{{ options }}", QUESTION) == "Ann has 3.\n\nHow many?|(A) 3\n(B) 4"
    assert rendered("{{ context }}|{{ question }}|{{ options }}", QUESTION) == "Ann has 3.|How many?|(A) 3\n(B) 4"


def test_options_can_be_listed_and_are_false_where_there_are_none():
    listed = "{% for label, text in options %}{{ label }}={{ text }} {% endfor %}{{ question }}"
    assert rendered(listed, QUESTION) == "A=3 B=4 Ann has 3.\n\nHow many?"
    optional = "{% if options %}Choose.{% endif %}{% if context %}Read.{% endif %}{{ question }}"
    assert rendered(optional, PLAIN) == "1+1="
    assert rendered(optional, QUESTION) == "Choose.Read.How many?"


@pytest.mark.parametrize("template", ["boxed", "answer", "think-answer", "dapo"])
def test_a_named_template_asks_for_what_the_verifier_reads(template):
    text = rendered(template)
    assert "1+1=" in text
    assert asks_for_answer(text)
    assert text == user_text(PLAIN, DataSection(train="x", prompt=template))
    assert not asks_for_answer(rendered("plain"))


@pytest.mark.parametrize(
    ("template", "reply"),
    [
        ("boxed", r"So it is \boxed{2}."),
        ("answer", "1 and 1.\nAnswer: 2"),
        ("think-answer", "<think> 1 and 1 </think> <answer> 2 </answer>"),
        ("dapo", "1 and 1.\nAnswer: $2$"),
    ],
)
def test_a_reply_as_a_named_template_asks_for_is_correct(template, reply):
    assert template in PROMPTS
    with Verifier() as verifier:
        assert verifier.grade([reply], ["2"])[0].kind == "correct"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_kept_as_its_text(tmp_path, suffix):
    path = tmp_path / f"prompt{suffix}"
    path.write_text("Löse:\n{% if options %}\n{{ options }}\n{% endif %}\n{{ question }}\n", encoding="utf-8")
    section = DataSection(train="x", template=str(path))
    path.unlink()  # a resumed run, and an evaluation elsewhere, need it no more
    assert user_text(QUESTION, section) == "Löse:\n(A) 3\n(B) 4\nAnn has 3.\n\nHow many?"
    again = DataSection.model_validate(section.model_dump(mode="json"))
    assert again == section
    path.write_text("{question} in \\boxed{}\n")
    assert rendered(str(path)) == "1+1= in \\boxed{}"


@pytest.mark.parametrize(
    "template", ["{question}", "{{ question }}", "boxed", "{{ context }}{{ question }}{{ options }}"]
)
@pytest.mark.parametrize(
    "text", ["{{ 7*7 }}", "{% raw %}", "{question}", "{{ question }}", "{# x #}", "{0}", "%s", r"\1 \g<0>", "日本 😀 é"]
)
def test_template_text_in_a_value_stays_text(template, text):
    parts = QuestionParts(text, text, (("A", text), ("B", "1")))
    result = rendered(template, Question("1", parts.text(), "A", parts=parts))
    assert result.count(text) == 3
    assert "49" not in result


def test_braces_of_latex_are_text():
    assert rendered(r"{question} Put it in \boxed{}, as \frac{1}{2}.") == r"1+1= Put it in \boxed{}, as \frac{1}{2}."
    assert rendered(r"{{ question }} Put it in \boxed{}.") == r"1+1= Put it in \boxed{}."
    assert rendered("{question} in {{}}") == "1+1= in {{}}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ question }", "TemplateSyntaxError"),
        ("{{ question }}\n{% if options %}", "line 2: TemplateSyntaxError"),
        ("{{ question }}{% for %}", "TemplateSyntaxError"),
        ("{{ question | nothing }}", "No filter named 'nothing'"),
        ("{{ question }} {{ answer }}", "uses answer, but its variables are question, options, context"),
        ("{{ Question }}", "uses Question, but"),
        ("{% for i in range(9) %}{{ question }}{% endfor %}", "uses range, but"),
        ("{{ question }}{{ cycler.__init__.__globals__ }}", "uses cycler, but"),
        ("{question} {{ options }}", "mixes {question} with Jinja; write {{ question }}"),
        ("{question}{% if options %}x{% endif %}", "mixes {question} with Jinja"),
        ("{{ context }}", "must contain {{ question }}"),
        ("{% set question = 1 %}{{ question }}", "must contain {{ question }}"),
        ("boxd", "one of the names plain, boxed, answer, think-answer, dapo"),
        ("", "must contain {{ question }}"),
        ("nowhere.jinja", "No such file or directory"),
        ("no\0where.jinja", "the file cannot be read"),
        ("x" * 100_001 + "{question}", "more than 100,000 characters"),
        ("{{ " + "(" * 5000 + "question" + ")" * 5000 + " }}", "nested too deeply"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_its_field(template, problem):
    assert problem in refused(template)


def test_a_file_that_is_no_template_is_refused(tmp_path):
    path = tmp_path / "a.jinja"
    path.write_bytes(b"\xff{{ question }}")
    assert "not UTF-8" in refused(str(path))
    path.write_text("x" * 200_000)
    assert "more than 100,000 characters" in refused(str(path))
    path.write_text("b.jinja")  # a file does not name another one
    assert "must contain {{ question }}" in refused(str(path))
    assert "Is a directory" in refused(str(tmp_path.joinpath("d.j2").mkdir() or tmp_path / "d.j2"))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ question.nothing }}", "UndefinedError"),
        ("{{ question }}{{ options[7] }}", "UndefinedError"),
        ("{{ question + 1 }}", "TypeError"),
        ("{{ question }}{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ question.__class__.__mro__ }}", "SecurityError"),
        ("{{ question }}{{ options.append(1) }}", "Error"),
        ("{{ question.__init__.__globals__ }}", "Error"),
        ("{{ question.format.__self__ }}", "Error"),
        ("{{ question }}{% include '/etc/passwd' %}", "no loader for this environment"),
        ("{% import 'os' as os %}{{ question }}", "no loader for this environment"),
    ],
)
def test_a_template_that_fails_on_a_question_is_one_line(template, problem):
    with pytest.raises(ConfigError, match=r"^data\.template fails on question 1: ") as error:
        rendered(template, QUESTION)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_line_takes_a_template_as_it_is():
    for text in (r"{question} Put it in \boxed{}.", "{{ question }} # 1: {x}", "Answer: {question}", "- {question}"):
        assert load_config(None, [("data.template", flag_value("data.template", FlagText(text)))]).data.template == text
    assert flag_value("data.system", FlagText('""')) == ""
    assert flag_value("data.system", FlagText("null")) is None
    assert flag_value("data.system", FlagText('"Say" it')) == '"Say" it'
    assert flag_value("data.system", FlagText("Step: by step")) == "Step: by step"


def test_a_recipe_holds_a_template_of_several_lines(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata:\n  train: q\n  template: |\n    {{ question }}\n    Answer: X\n")
    assert user_text(PLAIN, load_config(path).data) == "1+1=\nAnswer: X"


@pytest.fixture
def speller(monkeypatch):
    """A tokenizer that shows every character; its chat template has special tokens."""

    class Speller:
        chat_template = "x"
        all_special_ids = ()

        def __call__(self, text):
            return {"input_ids": list(map(ord, text))}

        def apply_chat_template(self, messages, **options):
            text = "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)
            return self(f"{text}<|assistant|>{options.get('suffix', '')}")

        def decode(self, ids, **options):
            return "".join(map(chr, ids))

    monkeypatch.setattr("expo.data.__main__._tokenizer", lambda path: Speller())
    return Speller()


def shown(capsys, *arguments):
    assert main(["show", *arguments, "--model=m"]) == 0
    return capsys.readouterr().out


def test_show_prints_what_the_model_sees_and_what_the_verifier_reads(tmp_path, capsys, speller):
    path = write(tmp_path / "q.jsonl", {"question": "1+1=", "answer": "2"})
    out = shown(
        capsys, path, "--template={question} in a box", "--system=Be: brief", "--chat-template-kwargs={suffix: s}"
    )
    line = "-" * 80
    assert f"{line}\n<|system|>Be: brief<|end|><|user|>1+1= in a box<|end|><|assistant|>s\n{line}\n" in out
    assert "gold answer: 2    graded as: 2" in out
    assert r"the verifier (math) reads the last of \boxed{...}, a line that begins with Answer:, and <answer>" in out
    assert "warning: no prompt of" in out
    assert "warning" not in shown(capsys, path, "--prompt=boxed")
    assert "warning" not in shown(capsys, path, "--prompt=plain", r"--system=Use \boxed{}.")
    own = shown(capsys, path, "--prompt=plain", "--verifier=mine:check")
    assert "the verifier (mine:check) reads the reply after its thinking, which mine:check gets whole" in own
    assert "warning" not in own


def test_show_escapes_what_a_terminal_would_obey(tmp_path, capsys, speller):
    hostile = "a\x1b]0;title\x07\u202eb\r\x9b31m"
    path = write(tmp_path / "q.jsonl", {"question": f"{hostile}\n{{{{ 7*7 }}}}", "answer": "2", "id": hostile})
    out = shown(capsys, path)
    assert r"a\x1b]0;title\x07\u202eb\r\x9b31m" + "\n{{ 7*7 }}" in out
    assert all(character.isprintable() or character == "\n" for character in out)


@pytest.mark.parametrize(
    "argument", ["--template={{ question }} {{ x }}", "--template=no.jinja", "--columns={id: [a]}"]
)
def test_a_wrong_setting_of_show_is_one_line(tmp_path, capsys, argument):
    with pytest.raises(SystemExit) as stop:
        main(["show", write(tmp_path / "q.jsonl", {"question": "1+1=", "answer": "2"}), "--model=m", argument])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert argument.split("=")[0] in error
