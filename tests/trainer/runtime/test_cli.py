"""Command lines and files become a RunConfig, or an error of one line."""

from typing import Literal, get_args, get_origin

import pytest
import yaml

from expo.config import DEFAULT_RECIPE, RunConfig, load_config, parse_command_line
from expo.errors import ConfigError
from expo.evaluation.config import parse_command_line as parse_evaluation
from expo.runtime.cli import field_names

MINIMAL = {"model": {"path": "somewhere"}, "data": {"train": "questions.jsonl"}}


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("python -m expo.train: error: ")
    assert text.count("\n") == 1
    return text


def test_no_argument_gives_the_embedded_default():
    assert parse_command_line([]).config == load_config(DEFAULT_RECIPE)


def test_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "optimizer": {"lr": 1.0}}))
    argv = [str(path), "--optimizer.lr=1e-6", "--rollout.group_size", "4", "--evaluation.sets={a: b.jsonl}"]
    config = parse_command_line(argv).config
    assert config.optimizer.lr == 1e-6
    assert config.rollout.group_size == 4
    assert config.evaluation.sets == {"a": "b.jsonl"}
    assert config.model.path == "somewhere"


def test_print_config_reads_back_equal(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--print-config", "--run.seed=7", "--run.dir=elsewhere"])
    assert stop.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    expected = parse_command_line(["--run.seed=7", "--run.dir=elsewhere"]).config
    assert load_config(path) == expected
    assert expected.run.seed == 7


def printed(capsys, argv, parse=parse_command_line):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("parse", [parse_command_line, parse_evaluation])
def test_help_is_one_screen_and_names_the_way_to_the_rest(capsys, parse):
    lines = printed(capsys, ["--help"], parse).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("--help-all lists all ")


def test_help_all_shows_every_field_with_its_text(capsys):
    shown = printed(capsys, ["--help-all"])
    assert [name for name in field_names(RunConfig) if f"--{name}" not in shown] == []
    assert "(paper: 0.02)" in " ".join(shown.split())


def test_help_all_shows_every_choice(capsys):
    words = printed(capsys, ["--help-all"]).split()
    for section, info in RunConfig.model_fields.items():
        for name, field in info.annotation.model_fields.items():
            if get_origin(field.annotation) is Literal:
                value = words[words.index(f"--{section}.{name}") + 1]
                assert value.split("|") == list(map(str, get_args(field.annotation)))


@pytest.mark.parametrize(
    ("argument", "value"), [("wandb", ["wandb"]), ("[wandb]", ["wandb"]), ("[wandb, trackio]", ["wandb", "trackio"])]
)
def test_a_single_value_is_a_list_of_one(argument, value):
    assert parse_command_line([f"--run.trackers={argument}"]).config.run.trackers == value


def file_with(tmp_path, **sections):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **sections}))
    return str(path)


def test_a_wrong_flag_is_not_blamed_on_the_file(capsys, tmp_path):
    message = error_of(capsys, file_with(tmp_path), "--kl.beta=-1")
    assert "error: --kl.beta = -1: " in message
    assert "config.yaml" not in message


def test_a_wrong_value_of_the_file_is_not_blamed_on_the_flags(capsys, tmp_path):
    message = error_of(capsys, file_with(tmp_path, kl={"beta": -1}), "--run.seed=3")
    assert "error: config.yaml: kl.beta = -1: " in message
    assert "--" not in message


def test_each_of_several_errors_names_its_place(capsys, tmp_path):
    message = error_of(capsys, file_with(tmp_path, kl={"beta": -1}), "--run.seed=-3")
    assert "config.yaml: kl.beta = -1: " in message
    assert "; --run.seed = -3: " in message


def test_a_contradiction_names_the_flags_that_cause_it(capsys, tmp_path):
    message = error_of(capsys, file_with(tmp_path), "--run.seed=3", "--policy.updates_per_step=3")
    assert "error: with --policy.updates_per_step=3: rollout.questions_per_step" in message


def test_a_contradiction_within_the_file_names_the_file(capsys, tmp_path):
    message = error_of(capsys, file_with(tmp_path, policy={"updates_per_step": 3}), "--run.seed=3")
    assert "error: config.yaml: rollout.questions_per_step" in message


def test_the_last_of_two_values_of_a_flag_counts(capsys, tmp_path):
    assert "--kl.beta = -2: " in error_of(capsys, file_with(tmp_path), "--kl.beta=1", "--kl.beta=-2")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--optimiser.lr=1", "did you mean --optimizer.lr?"),
        ("--rollout.groupsize=4", "did you mean --rollout.group_size?"),
        ("--run.steps=many", "run.steps = 'many'"),
        ("--run.steps=0", "run.steps = 0"),
        ("--rollout.temperature=0", "rollout.temperature = 0"),
        ("--rollout.group_size=1", "rollout.group_size = 1: input should be greater than or equal to 2"),
        ("--kl.rho=linear", "kl.rho = 'linear': input should be 'tanh' or 'constant'"),
        ("--policy.updates_per_step=3", "256 replies do not split"),
        ("--policy.micro_batch_tokens=40", "raise it to 64"),
        ("--objective.rollout_correction=batch", "objective.rollout_correction = 'batch': input should be 'token'"),
        ("--reward.overlong_buffer=32", "reward.overlong_buffer = 32 leaves no reply without a penalty"),
        ("--reward.functions={length: 1}", "names 'length'; expected package.module:function"),
        ("--reward.functions={a:f: 1, b:f: 1}", "b:f would be logged as reward/f, as another is"),
        ("--reward.functions={a:overlong: 1}", "would be logged as reward/overlong"),
        ("--reward.correct_weight=0", "leaves no reward at all"),
        ("--optimizer.lr=[", "is not a YAML value"),
        ("--optimizer.lr=.nan", "optimizer.lr = nan"),
        ("nowhere.yaml", "cannot read the config file nowhere.yaml"),
    ],
)
def test_bad_command_lines_exit_2_with_one_line(capsys, argument, expected):
    assert expected in error_of(capsys, argument)


def test_a_rollout_correction_without_effect_is_refused(capsys):
    message = error_of(capsys, "--objective.rollout_correction=token", "--policy.old_logps=rollout")
    assert "would weigh every token by 1" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {path: m}\ndata: {train: t}\nrollout: {top_p: 0.7}", "rollout.top_p = 0.7: it samples from a part"),
        ("model: {path: m}\ndata: {train: t}\nrollout: {top_k: 1}", "rollout.top_k = 1: it samples from a part"),
        ("model: {path: m}\ndata: {train: t}\nvllm: {servers: [http://a:1]}", "vllm.servers is for rollout.engine"),
        ("model: {path: m}\ndata: {train: t}\nvllm: {transfer: broadcast}", "vllm.transfer = broadcast is for rollout"),
        (
            "model: {path: m}\ndata: {train: t}\nrollout: {engine: vllm-server}\n"
            "vllm: {transfer: broadcast, weights_folder: /w}",
            "vllm.weights_folder is for vllm.transfer = files",
        ),
        ("model: {path: m}\ndata: {train: t}\nrolout: {}", "unknown key rolout; did you mean rollout?"),
        ("model: {path: m}\ndata: {train: t, trian: u}", "unknown key data.trian; did you mean data.train?"),
        ("model: {path: m}", "data is missing"),
        ("model: {}\ndata: {train: t}", "model.path is missing"),
        ("- 1", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_files_are_explained(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as error:
        load_config(path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
