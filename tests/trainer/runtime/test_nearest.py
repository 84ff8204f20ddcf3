"""Suggestions for unknown names: other libraries' names, the same field elsewhere, near spellings, or none."""

import pytest

from expo.__main__ import COMMANDS
from expo.config import EVALUATION_FIELDS, RunConfig
from expo.runtime.cli import OPTIONS, field_names
from expo.runtime.nearest import OTHER_NAMES, nearest

FLAGS = [*OPTIONS, *(f"--{name}" for name in field_names(RunConfig))]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lr", "--optimizer.lr"),
        ("--learning_rate", "--optimizer.lr"),
        ("--learning-rate", "--optimizer.lr"),
        ("--optimizer.learning_rate", "--optimizer.lr"),
        ("--actor_rollout_ref.actor.optim.lr", "--optimizer.lr"),
        ("--batch-size", "--rollout.questions_per_step or --rollout.batch_size"),
        ("--epochs", "--run.steps"),
        ("--trainer.total_epochs", "--run.steps"),
        ("--beta", "--kl.beta"),
        ("--model", "--model.path"),
        ("--num_generations", "--rollout.group_size"),
        ("--data.max_response_length", "--rollout.max_new_tokens"),
        ("--temperature", "--rollout.temperature or --evaluation.temperature"),
        ("--optimiser.lr", "--optimizer.lr"),
        ("--Optimizer.LR", "--optimizer.lr"),
        ("--resum", "--resume"),
        ("optimizer.lr", "--optimizer.lr"),
    ],
)
def test_the_setting_that_was_meant_is_named(given, meant):
    assert nearest(given, FLAGS) == f"; did you mean {meant}?"


@pytest.mark.parametrize("given", ["--zzz", "--x", "--frobnicate=1", ""])
def test_nothing_is_suggested_where_nothing_is_near(given):
    assert nearest(given, FLAGS) == "; --help-all lists the known ones"


def test_other_names_lead_to_settings_and_commands_that_exist():
    known = {*(flag.removeprefix("--") for flag in FLAGS), *COMMANDS}
    assert {target.removeprefix("--") for targets in OTHER_NAMES.values() for target in targets} <= known
    # a name of ours would never be looked up
    assert not known & set(OTHER_NAMES)


def test_an_evaluation_suggests_its_own_settings_only():
    assert nearest("--num_generations", [f"--{name}" for name in EVALUATION_FIELDS]) == (
        "; --help-all lists the known ones"
    )
