"""The suggestion for a run that does not fit: it is whole and valid, it fits, and it changes no more than it must."""

import shlex

import pytest

from expo.config import RECIPES, load_config, parse_command_line
from expo.learner.flops import ModelShape
from expo.planning.checks import find_config
from expo.planning.fit import find_fit, problem_of
from expo.planning.gpus import parse_gpus
from expo.planning.machine import Machine, for_config
from expo.planning.memory import Footprint
from expo.train import main

PAPER = "expo-qwen3-8b-base.yaml"
IN_PYTORCH = ("rollout.engine", "transformers")


def machine_of(text):
    gpus = parse_gpus(text)
    return Machine(gpus.count, min(gpus.count, 8), gpus.memory_gib, text, kind=gpus.kind)


def footprint_of(config, machine):
    shape = ModelShape.from_config(find_config(config.model)[0])
    return Footprint(config, shape, for_config(machine, config).num_ranks)


def fitted(gpus, *overrides, recipe=PAPER):
    machine = machine_of(gpus)
    return find_fit(footprint_of(load_config(RECIPES / recipe, overrides), machine), machine)


@pytest.mark.parametrize(
    "gpus", ["8xH100", "8x40GiB", "8x24GiB", "4x80GiB", "2x80GiB", "1x80GiB", "1x48GiB", "1x24GiB"]
)
@pytest.mark.parametrize("overrides", [(), (IN_PYTORCH,), (("policy.lora_rank", 8),)], ids=["vLLM", "PyTorch", "LoRA"])
def test_the_flags_make_a_valid_configuration_that_fits(gpus, overrides):
    found = fitted(gpus, *overrides)
    given = [f"--{name}={value}" for name, value in overrides]
    config = parse_command_line([str(RECIPES / PAPER), *given, *shlex.split(found.flags)]).config
    machine = machine_of(gpus)
    assert config == found.config
    assert problem_of(footprint_of(config, machine), for_config(machine, config)) is None


@pytest.mark.parametrize(
    ("gpus", "overrides", "changed"),
    [
        # what fits is left as it is
        ("8x80GiB", (), set()),
        ("8x80GiB", (IN_PYTORCH, ("rollout.batch_size", 256)), {"rollout.batch_size"}),
        ("8x80GiB", (("policy.gradient_checkpointing", False),), {"policy.gradient_checkpointing"}),
        ("8x80GiB", (("policy.micro_batch_tokens", 262144),), {"policy.micro_batch_tokens"}),
        ("8x80GiB", (("policy.zero_stage", 0),), {"policy.zero_stage"}),
    ],
)
def test_no_more_is_changed_than_must_be(gpus, overrides, changed):
    found = fitted(gpus, *overrides)
    assert set(found.changes) <= changed | {"vllm.gpu_memory_utilization"}
    assert bool(found.changes) == bool(changed)


def test_what_is_trained_changes_only_where_nothing_else_fits():
    assert "policy.lora_rank" not in fitted("8x24GiB").changes
    assert fitted("1x24GiB").config.policy.lora_rank == 16
    assert fitted("1x24GiB").config.rollout.max_new_tokens == 3072


def test_the_batch_is_as_large_as_fits():
    machine = machine_of("8x80GiB")
    found = fitted("8x80GiB", IN_PYTORCH, ("rollout.batch_size", 256))
    larger = found.config.rollout.model_copy(update={"batch_size": 2 * found.config.rollout.batch_size})
    assert problem_of(footprint_of(found.config.model_copy(update={"rollout": larger}), machine), machine) is not None


def test_nothing_fits_a_gpu_that_is_too_small():
    assert fitted("1x1GiB") is None


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("gpus", ["1x24GiB", "4x40GiB", "8xH100"])
def test_the_written_configuration_loads_and_passes_its_own_dry_run(gpus, tmp_path, capsys):
    path, given = tmp_path / "fit.yaml", ("--dry-run", f"--gpus={gpus}")
    assert main([str(RECIPES / PAPER), *given, f"--fit={path}"]) == 0
    assert main([str(path), *given]) == 0
    config = load_config(path)
    assert problem_of(footprint_of(config, machine_of(gpus)), for_config(machine_of(gpus), config)) is None
    if gpus == "8xH100":
        assert config == load_config(RECIPES / PAPER)
    assert f"--fit={path} exists" in error_of(capsys, str(path), *given, f"--fit={path}")
    assert sorted(tmp_path.iterdir()) == [path]


def test_nothing_is_written_for_a_run_that_cannot_start_or_fit(tmp_path, capsys):
    given = (str(RECIPES / PAPER), "--dry-run", f"--fit={tmp_path / 'fit.yaml'}")
    assert "no settings were found that fit" in error_of(capsys, *given, "--gpus=1x1GiB")
    assert "nowhere.jsonl" in error_of(capsys, *given, "--gpus=8xH100", "--data.train=nowhere.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_error_holds_one_whole_suggestion(capsys):
    error = error_of(capsys, str(RECIPES / PAPER), "--dry-run", "--gpus=4x40GiB")
    flags = error.split("GiB at most: ")[1].split(" (--fit")[0]
    assert main([str(RECIPES / PAPER), "--dry-run", "--gpus=4x40GiB", *shlex.split(flags)]) == 0


def test_a_run_on_a_cpu_gets_no_settings_for_gpus():
    config = load_config(RECIPES / "single-h100.yaml", [IN_PYTORCH])
    machine = Machine(1, 1, 40.0, "here", is_cpu=True)
    shape = ModelShape.from_config(find_config(config.model)[0])
    found = find_fit(Footprint(config, shape, 1, on_cpu=True), machine)
    assert found.changes
    assert not [name for name in found.changes if "offload" in name or "zero" in name or "vllm" in name]
