"""Malformed values of every field, malformed files and command lines: one line, exit code 2, and no time to speak of.

The fields are those of the configuration, by kind: a new field is tested without being named here.
"""

import time

import pytest

from expo.config import EvalConfig, RunConfig, load_config, parse_command_line
from expo.data.__main__ import main as data_command
from expo.errors import ConfigError
from expo.evaluation.config import parse_command_line as parse_evaluation
from expo.runtime.cli import flag_value
from expo.runtime.parser import OneLineParser
from tests.trainer.config.malformed import (
    ALWAYS_WRONG,
    INVALID_FILES,
    LONG,
    WRONG,
    fields_by_kind,
    kind_of,
    numbers_without_bounds,
)

FIELDS = fields_by_kind(RunConfig)
MALFORMED = [(kind, name, text) for kind, inputs in WRONG.items() for name, text in {**inputs, **ALWAYS_WRONG}.items()]
MOST_SECONDS = 10.0
MOST_CHARACTERS = 4100

TAKEN = {("string", "a number")}  # model.revision: YAML reads some commits as numbers


def refusal(capsys, run):
    """The one line on stderr with which a command ends."""
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        run()
    shown = capsys.readouterr().err
    assert time.monotonic() - start < MOST_SECONDS
    assert stop.value.code == 2
    assert shown.count("\n") == 1, shown
    assert "error: " in shown
    assert len(shown) < MOST_CHARACTERS
    shown.encode()
    return shown


def test_there_are_fields_of_every_kind_and_more_than_134_malformed_inputs():
    assert all(FIELDS.values())
    assert sum(map(len, FIELDS.values())) > 100
    assert len(MALFORMED) + len(INVALID_FILES) > 134


@pytest.mark.parametrize(("kind", "name", "text"), MALFORMED, ids=[f"{kind}: {name}" for kind, name, _ in MALFORMED])
def test_no_field_takes_a_malformed_value(kind, name, text):
    for field in FIELDS[kind]:
        start = time.monotonic()
        try:
            config = parse_field(field, text)
        except ConfigError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < MOST_CHARACTERS
            message.encode()
        else:
            assert (kind, name) in TAKEN, f"{field} takes {text[:40]}: {config.settings[field]!r}"
        assert time.monotonic() - start < MOST_SECONDS


def parse_field(field, text):
    """As the command line does it, without building the parser of all flags every time."""
    return load_config(None, [(field, flag_value(field, text))])


def test_the_command_line_ends_with_one_line_for_malformed_values(capsys):
    for name, text in {**ALWAYS_WRONG, **LONG}.items():
        assert "run.steps" in refusal(capsys, lambda text=text: parse_command_line([f"--run.steps={text}"])), name
    assert "run.steps" in refusal(capsys, lambda: parse_evaluation(["ledger", "--run.steps=1"]))


@pytest.mark.parametrize("name", INVALID_FILES)
def test_malformed_files_are_refused_in_one_line(capsys, tmp_path, name):
    path = tmp_path / "malformed.yaml"
    path.write_bytes(INVALID_FILES[name])
    shown = refusal(capsys, lambda: parse_command_line([str(path)]))
    assert "malformed.yaml" in shown or str(tmp_path) in shown


@pytest.mark.parametrize("config", [RunConfig, EvalConfig])
def test_every_number_has_two_bounds(config):
    assert numbers_without_bounds(config.model_json_schema()) == []


def test_a_number_without_bounds_is_found():
    assert numbers_without_bounds({"a": [{"type": "integer", "minimum": 0}]}) != []
    assert numbers_without_bounds({"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}]}) == []
    assert kind_of({"anyOf": [{"type": "integer"}, {"type": "null"}]}) == "number"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run.threads", "100_000_000"), ("run.threads", "0"), ("deadline.start", "1e12"), ("deadline.save", "-1"),
        ("optimizer.lr", "1e38"), ("rollout.temperature", "1e-300"), ("rollout.temperature", "1e-3"),
        ("evaluation.temperature", "1e-3"), ("reward.functions", "{a:b: 1e39}"), ("reward.functions", "{a:b: -1e39}"),
        ("reward.correct_weight", "1e39"), ("reward.workers", "100000"), ("reward.timeout_s", "1e300"),
        ("curriculum.std", "1e-200"), ("run.save_by_minutes", "1e300"), ("rollout.max_resamples", "1_000_000_000"),
        ("run.seed", str(2**63)), ("vllm.num_servers", "100000"), ("run.device", "meta"), ("run.device", "cuda:9999"),
        ("run.device", "cuda:-1"), ("run.device", "'cpu\\n'"), ("evaluation.num_samples", "1000000"),
    ],
)  # fmt: skip
def test_numbers_and_devices_that_would_crash_or_hang_a_run_are_refused(capsys, field, value):
    assert field in refusal(capsys, lambda: parse_command_line([f"--{field}={value}"]))


@pytest.mark.parametrize(
    "address",
    [
        "http://a", "http://a:0", "http://a:65536", "http://a:99999999999", "https://a:1", "http://user:word@a:1",
        "http://[::1:1", "http://a:1/path", "http://a b:1", "http://:1", "a:1", "http://a:-1", "http://a:٣", "http://a:1?key=word",
    ],
)  # fmt: skip
def test_addresses_of_servers_have_a_host_and_a_port(address):
    with pytest.raises(ConfigError, match=r"vllm\.servers has .*; expected http://host:port"):
        load_config(None, [("rollout.engine", "vllm-server"), ("vllm.servers", [address])])


def test_addresses_of_servers_may_be_names_or_numbers_of_either_kind():
    given = ["http://node-2.cluster:8000", "http://10.0.0.1:1", "http://[fe80::1]:65535"]
    assert load_config(None, [("rollout.engine", "vllm-server"), ("vllm.servers", given)]).vllm.servers == given


@pytest.mark.parametrize(
    ("parse", "arguments"),
    [
        (parse_command_line, ["--run.steps"]), (parse_command_line, ["a.yaml", "b.yaml"]),
        (parse_command_line, ["--dry-run", "--ranks=1e400"]),
        (parse_command_line, ["--dry-run", f"--ranks={'9' * 5000}"]),
        (parse_command_line, ["--dry-run", "--gpu-memory-gib=.nan"]), (parse_command_line, ["n" * 5000]),
        (parse_command_line, ["a\nb.yaml"]), (parse_command_line, ["--x=" + "y" * 5000]),
        (parse_command_line, ["/dev/zero"]),
        (parse_command_line, ["/"]), (parse_evaluation, []), (parse_evaluation, ["ledger", "--step", "9" * 5000]),
        (parse_evaluation, ["ledger", "--step", "-1"]), (parse_evaluation, ["ledger", "--sets"]),
        (parse_evaluation, ["n" * 5000]), (parse_evaluation, ["ledger", "--num-samples", "9" * 5000]),
        (data_command, ["show"]), (data_command, ["show", "s", "--model", "m", "-n", "many"]),
        (data_command, ["check", "s", "--columns", "[" * 100_000]),
        (data_command, ["check", "s", "--system", "2026-99-99"]),
        (data_command, []),
    ],
)  # fmt: skip
def test_malformed_command_lines_end_with_one_line(capsys, parse, arguments):
    refusal(capsys, lambda: parse(arguments))


def test_the_parser_of_one_line_names_its_program(capsys):
    parser = OneLineParser(prog="the program")
    parser.add_argument("--number", type=int)
    assert refusal(capsys, lambda: parser.parse_args(["--number=x"])).startswith(
        "the program: error: argument --number"
    )
