"""--like: the protocol of a run or an evaluation, what the command line changes of it, and damaged folders."""

import json

import pytest

from expo.config import load_config
from expo.errors import ConfigError
from expo.evaluation.config import EvalArguments, parse_command_line, resolve
from expo.evaluation.like import FIELDS
from expo.evaluation.protocol import evaluation_protocol

SETTINGS = {
    "evaluation.num_samples": 3,
    "evaluation.temperature": 0.7,
    "evaluation.top_p": 0.9,
    "rollout.max_new_tokens": 17,
    "run.seed": 5,
    "data.prompt": "boxed",
    "data.template": "Solve {question}",
    "data.chat_template": True,
    "data.system": "Be brief.",
    "data.chat_template_kwargs": {"enable_thinking": False},
    "data.max_prompt_tokens": 40,
    "data.columns": {"question": "q", "answer": "a"},
    "data.skip_bad_answers": True,
    "rollout.stop_tokens": ["9"],
    "model.attention": "eager",
    "policy.dtype": "bfloat16",
    "reward.verifier": "exact",
    "reward.unevaluated": "accept",
    "reward.timeout_s": 3.0,
    "evaluation.sets": {"few": "few.jsonl", "many": "many.jsonl"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with settings that differ from the defaults."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    folder.mkdir()
    (folder / "config.yaml").write_text(load_config(None, list(SETTINGS.items())).to_yaml())
    return folder


def metadata_of(config):
    """What the evaluation of a configuration writes before its first reply."""
    how = {"columns": config.data.columns or None, "skip_bad_answers": config.data.skip_bad_answers or None}
    questions = {name: {"source": source, **how} for name, source in config.evaluation.sets.items()}
    return {"model": {"path": "m"}, "protocol": evaluation_protocol(config), "questions": questions}


def write_evaluation(folder, metadata, name="results.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(metadata))
    return folder


@pytest.fixture(params=["run", "export", "checkpoint", "results.json", "protocol.json", "file"])
def like(request, run, tmp_path):
    """A run, a folder of it, or an evaluation like it."""
    if request.param in ("run", "export", "checkpoint"):
        return run / {"run": "", "export": "export", "checkpoint": "checkpoints/step-4"}[request.param]
    config = resolve(str(run), None, []).config
    name = request.param if request.param.endswith(".json") else "results.json"
    folder = write_evaluation(tmp_path / "evaluation", metadata_of(config), name)
    return folder / name if request.param == "file" else folder


@pytest.mark.parametrize("model", ["some/model", "ledger"])
def test_another_model_is_evaluated_by_the_whole_protocol_without_retyping(run, like, model):
    own = resolve(str(run), None, []).config
    found = resolve(model, None, [], str(like))
    assert found.config.model.path == load_config(None).model.path if model == "ledger" else model
    assert {name: found.config.settings[name] for name in FIELDS} == {name: own.settings[name] for name in FIELDS}
    assert set(SETTINGS) <= set(FIELDS)
    assert evaluation_protocol(found.config) == evaluation_protocol(own)
    (note,) = found.notes
    assert note.startswith("protocol: that of ")


def test_a_run_keeps_its_weights_and_takes_the_protocol_of_another(run, tmp_path):
    (tmp_path / "config.yaml").write_text(
        load_config(None, [("policy.lora_rank", 4), ("data.system", "Think."), ("data.chat_template", True)]).to_yaml()
    )
    found = resolve(str(tmp_path), None, [], str(run))
    assert (found.run, found.config.policy.lora_rank) == (tmp_path, 4)
    assert (found.config.data.system, found.config.policy.dtype) == ("Be brief.", "bfloat16")
    plain = write_evaluation(tmp_path / "plain", metadata_of(resolve("ledger", None, []).config))
    assert resolve(str(tmp_path), None, [], str(plain)).config.data.system is None, "not set there either"


def test_settings_that_are_given_win_and_are_named(like):
    argv = ["m", "--like", str(like), "--num-samples=8", "--temperature=0.7", "--sets", "few=few.jsonl", "--out=o"]
    found = parse_command_line(argv)
    assert (found.config.evaluation.num_samples, found.config.evaluation.sets) == (8, {"few": "few.jsonl"})
    source, changed = found.notes
    assert source.startswith("protocol: that of ")
    assert changed == ("other than there: evaluation.num_samples (3 -> 8), evaluation.sets.many (many.jsonl -> None)")


def test_without_like_there_is_nothing_to_say(run):
    assert resolve(str(run), None, []).notes == EvalArguments.notes == ()


def changed(section, **values):
    def change(metadata):
        metadata[section] = {**metadata[section], **values}

    return change


def without(section, name):
    return lambda metadata: metadata[section].pop(name)


DAMAGES = {
    "no protocol": (lambda metadata: metadata.pop("protocol"), "no protocol or no questions"),
    "no questions": (lambda metadata: metadata.update(questions={}), "no protocol or no questions"),
    "a list": (lambda metadata: metadata.update(protocol=[1]), "no protocol or no questions"),
    "no source": (lambda metadata: metadata["questions"]["few"].pop("source"), "has no source"),
    "sets of no form": (changed("questions", few=3), "has no source"),
    "a source that is no text": (changed("questions", few={"source": ["x"]}), "has no source"),
    "half a character": (changed("questions", few={"source": "\ud800"}), "characters that no text has"),
    "no samples": (without("protocol", "num_samples"), "num_samples is missing"),
    "no temperature": (changed("protocol", temperature=None), "temperature is missing"),
    "samples in words": (changed("protocol", num_samples="many"), "evaluation.num_samples = 'many'"),
    "a temperature that is no number": (changed("protocol", temperature=float("nan")), "evaluation.temperature"),
    "negative samples": (changed("protocol", num_samples=-1), "evaluation.num_samples = -1"),
    "endless samples": (changed("protocol", num_samples=float("inf")), "evaluation.num_samples"),
    "a verifier that is no text": (changed("protocol", verifier=[":"]), "names code: reward.verifier"),
    "a number as verifier": (changed("protocol", verifier=7), "reward.verifier"),
    "code": (changed("protocol", verifier="os:system"), "if you trust it, give --reward.verifier=os:system"),
    "servers": (changed("protocol", engine="vllm-server"), "vllm-server is for training"),
    "an unknown prompt": (changed("protocol", prompt="rude"), "data.prompt"),
    "a template that is no text": (changed("protocol", template={"a": 1}), "data.template"),
    "columns of no form": (changed("questions", few={"source": "s", "columns": 3}), "data.columns"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_foreign_evaluation_is_one_line(run, tmp_path, capsys, case):
    damage, expected = DAMAGES[case]
    metadata = metadata_of(resolve(str(run), None, []).config)
    damage(metadata)
    folder = write_evaluation(tmp_path / "evaluation", metadata)
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["m", "--like", str(folder)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3", "\0", '{"protocol": ' + "9" * 6000])
def test_a_file_that_is_no_json_object_is_one_line(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=r"results\.json is not what .* wrote: it has no protocol"):
        resolve("m", None, [], str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b", ""])
def test_a_folder_that_is_neither_run_nor_evaluation_is_one_line(tmp_path, name):
    with pytest.raises(ConfigError, match="is neither a run nor an evaluation; give the folder of a run"):
        resolve("m", None, [], str(tmp_path / name))


def test_a_damaged_run_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("evaluation: {num_samples: x}")
    with pytest.raises(ConfigError, match=r"evaluation\.num_samples"):
        resolve("m", None, [], str(tmp_path))


def test_code_that_a_run_names_is_not_taken_over(tmp_path):
    (tmp_path / "config.yaml").write_text(
        load_config(None, [("reward.verifier", "os:system"), ("model.trust_remote_code", True)]).to_yaml()
    )
    with pytest.raises(ConfigError, match=r"names code: reward\.verifier = os:system"):
        resolve("m", None, [], str(tmp_path))
    found = resolve("m", None, [("reward.verifier", "exact")], str(tmp_path))
    assert (found.config.reward.verifier, found.config.model.trust_remote_code) == ("exact", False)
    assert "reward.verifier (os:system -> exact)" in found.notes[1]
