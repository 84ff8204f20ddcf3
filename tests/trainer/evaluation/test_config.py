"""The command line of evaluations: its flags, and the settings that the evaluation of a run takes from the run."""

import re

import pytest

from expo.config import load_config
from expo.errors import ConfigError
from expo.evaluation.config import PROGRAM, name_sets, parse_command_line, resolve
from tests import ROOT


def test_the_flags_of_the_documented_protocols_are_parsed():
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    protocols = re.findall(r"`(--num-samples [^`]+)`", text)
    assert len(protocols) == 3
    sections = [parse_command_line(["m", "--sets", "s", *flags.split()]).config for flags in protocols]
    assert [(c.evaluation.num_samples, c.evaluation.top_p, c.rollout.max_new_tokens) for c in sections] == [
        (64, 0.95, 32768),
        (32, 0.7, 20480),
        (1, 1.0, 3000),
    ]


def test_a_run_with_vllm_servers_is_evaluated_without_them(tmp_path):
    servers = [("rollout.engine", "vllm-server"), ("vllm.servers", ["http://gone:1"])]
    (tmp_path / "config.yaml").write_text(load_config(None, servers).to_yaml())
    with pytest.raises(ConfigError, match="vllm-server is for training; give --engine=vllm or --engine=transformers"):
        resolve(str(tmp_path), None, [])
    config = resolve(str(tmp_path), None, [("rollout.engine", "vllm")]).config
    assert (config.rollout.engine, config.vllm.servers) == ("vllm", [])


@pytest.mark.parametrize(
    ("trained", "evaluated"),
    [
        ({"rollout.engine": "vllm", "vllm.sleep": True}, ("rollout.engine", "transformers")),
        ({"reward.overlong_buffer": 16}, ("rollout.max_new_tokens", 8)),
        ({"reward.overlong_buffer": 16, "reward.correct_weight": 0}, ("rollout.max_new_tokens", 32)),
        ({"policy.micro_batch_tokens": 96}, ("rollout.max_new_tokens", 1024)),
        (
            {"rollout.engine": "vllm-server", "vllm.gpus": [1], "vllm.weights_folder": "/dev/shm"},
            ("rollout.engine", "vllm"),
        ),
    ],
)
def test_settings_of_training_do_not_restrict_its_evaluation(tmp_path, trained, evaluated):
    (tmp_path / "config.yaml").write_text(load_config(None, list(trained.items())).to_yaml())
    name, value = evaluated
    assert resolve(str(tmp_path), None, [evaluated]).config.settings[name] == value


def test_sets_are_named_after_their_source():
    given = ["aime-2024", "org/name", "x=a/b.jsonl", "some/file.parquet", "ledger:held_out"]
    assert name_sets(given) == {
        "aime-2024": "aime-2024",
        "name": "org/name",
        "x": "a/b.jsonl",
        "file": "some/file.parquet",
        "held_out": "ledger:held_out",
    }
    with pytest.raises(ConfigError, match=r"two sets of the name b; .*NAME=d/b\.jsonl"):
        name_sets(["a/b.jsonl", "d/b.jsonl"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ledger", "--num-sample=3"], "did you mean --num-samples?"),
        (["ledger", "--run.steps=3"], "unknown argument --run.steps=3"),
        (["ledger", "--temperature=-1"], "evaluation.temperature = -1"),
        (["ledger", "--top-p=0"], "evaluation.top_p = 0"),
        (["ledger", "--temperature=0"], "would all be the same;"),
        (["ledger", "--engine=vlm"], "rollout.engine = 'vlm'"),
        (["ledger", "--vllm.servers=[http://h:1]"], "unknown argument --vllm.servers"),
        (["ledger", "--step=5"], "ledger is no run folder; give one, or leave --step out"),
        (["some/model"], "give --sets"),
    ],
)
def test_bad_command_lines_exit_2_with_one_line(capsys, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{PROGRAM}: error: ")
    assert expected in error
    assert error.count("\n") == 1
