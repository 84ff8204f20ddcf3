"""EvalConfig: the fields that an evaluation reads, and what it takes from the configuration of a run."""

import pytest

from expo.config import EVALUATION_FIELDS, EvalConfig, evaluation_values, load_config
from expo.config.evaluation import RUN_FIELDS
from expo.runtime.cli import field_names, filled

TRAINING = {  # settings that an evaluation does not read, with values that only training accepts
    "run.steps": 700,
    "data.drop_overlap": "near",
    "rollout.group_size": 4,
    "vllm.servers": ["http://somewhere:1"],
    "vllm.transfer": "broadcast",
    "reward.overlong_buffer": 16,
    "policy.updates_per_step": 2,
    "evaluation.every": 5,
}


def test_every_field_that_it_reads_exists_and_none_is_listed_twice():
    listed = [*EVALUATION_FIELDS, *RUN_FIELDS]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(field_names(EvalConfig))


def test_it_has_only_sections_with_a_field_that_it_reads():
    sections = {name.split(".")[0] for name in (*EVALUATION_FIELDS, *RUN_FIELDS)}
    assert set(EvalConfig.model_fields) == sections


def test_the_configuration_of_a_run_gives_the_fields_that_are_read_and_no_others():
    run = load_config(None, [*TRAINING.items(), ("rollout.engine", "vllm-server"), ("run.seed", 3)])
    config = filled(EvalConfig, evaluation_values(run), [("rollout.engine", "vllm")])
    defaults = EvalConfig.model_validate({"model": {"path": "ledger"}})
    for name in (*EVALUATION_FIELDS, *RUN_FIELDS):
        assert name == "rollout.engine" or config.settings[name] == run.settings[name]
    assert {name: config.settings[name] for name in TRAINING} == {name: defaults.settings[name] for name in TRAINING}
    assert config.max_tokens == run.max_tokens


def test_it_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        EvalConfig.model_validate({"model": {"path": "ledger"}}).run.seed = 1
