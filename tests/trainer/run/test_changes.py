"""What a resumed run may change: the tables of docs/resuming.md, refusals with their reasons, and digests."""

import re

import pytest

from expo.config import load_config
from expo.errors import ConfigError
from expo.run.changes import (
    FIXED,
    FREE,
    SAMPLING,
    STEERING,
    changes,
    describe,
    initial_settings,
    is_free,
    is_steering,
    require_allowed,
)
from expo.run.folder import fixed_digest, settings_digest
from tests import ROOT

DEFAULT = load_config(None)


def config(**overrides):
    return load_config(None, [(name.replace("__", "."), value) for name, value in overrides.items()])


def tables():
    """The rows of the tables of settings in docs/resuming.md: the text by setting, or by section."""
    found = []
    for heading, body in re.findall(r"^\| Setting \| (.*) \|\n\| --- .*\n((?:\|.*\n)*)", page(), flags=re.MULTILINE):
        rows = re.findall(r"^\| (?:other )?`([\w.]+?)(?:\.\*)?` \| (.*) \|$", body, flags=re.MULTILINE)
        assert len(rows) == body.count("\n"), heading
        found.append(dict(rows))
    return found


def page():
    return (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_of_the_code():
    assert tables() == [STEERING, FREE, FIXED]


def test_every_setting_is_in_one_table_and_every_row_names_settings():
    settings = set(DEFAULT.settings)
    sections = {name.partition(".")[0] for name in settings}
    assert set(FREE) | set(STEERING) | set(FIXED) <= settings | sections
    assert not set(FREE) & set(STEERING)
    assert set(SAMPLING) <= set(STEERING)
    for name in settings:
        assert is_free(name) or is_steering(name) or FIXED.get(name) or FIXED[name.partition(".")[0]], name


def changed(**overrides):
    return changes(DEFAULT.settings, config(**overrides).settings)


def test_changes_on_which_no_number_depends_are_not_counted():
    assert changed(run__dir="elsewhere", deadline__save=5, vllm__patience_s=3, run__collapse_steps=2) == {}


def test_changes_of_further_steps_are_allowed():
    found = changed(run__steps=200, optimizer__lr=1e-5, evaluation__sets={"few": "few.jsonl"})
    require_allowed(found, "R")
    assert found["run.steps"] == [150, 200]
    assert describe({"optimizer.lr": found["optimizer.lr"]}) == "optimizer.lr (0.0002 -> 1e-05)"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"kl__beta": 0.5}, r"kl.beta \(0.02 -> 0.5\): the penalty is a part of the objective"),
        ({"run__seed": 1}, r"run.seed \(0 -> 1\): the checkpoint's random states"),
        ({"optimizer__weight_decay": 0.5}, "AdamW's state in the checkpoint"),
        ({"policy__updates_per_step": 2}, "counts the updates of the schedule"),
        ({"data__train": "other.jsonl"}, "the curriculum's pass rates belong to these questions"),
        ({"model__path": "other"}, "the checkpoint has the weights of this model"),
    ],
)
def test_other_changes_are_refused_with_the_reason(override, expected):
    with pytest.raises(ConfigError, match=f"--resume cannot change .*{expected}"):
        require_allowed(changed(**override, optimizer__lr=1.0), "R")


def test_all_refused_settings_are_named_and_no_other():
    with pytest.raises(ConfigError) as error:
        require_allowed(changed(kl__beta=0.5, run__seed=1, run__steps=70), "R")
    assert "kl.beta" in str(error.value)
    assert "run.seed" in str(error.value)
    assert "run.steps" not in str(error.value)


def test_the_settings_at_the_start_are_found_through_all_changes():
    starts = [{}, {"changed": {"optimizer.lr": [1.0, 0.1]}}, {}, {"changed": {"optimizer.lr": [0.1, 0.01]}}]
    assert initial_settings({"optimizer.lr": 0.01, "run.seed": 3}, starts) == {"optimizer.lr": 1.0, "run.seed": 3}


def test_the_digest_changes_with_what_may_not_change_only():
    allowed = config(run__steps=70, optimizer__lr=1.0, rollout__max_new_tokens=24, run__dir="elsewhere")
    assert fixed_digest(allowed) == fixed_digest(DEFAULT)
    assert fixed_digest(allowed, also=SAMPLING) != fixed_digest(DEFAULT, also=SAMPLING)
    assert fixed_digest(config(kl__beta=0.5)) != fixed_digest(DEFAULT)


def test_a_checkpoint_of_an_earlier_version_is_known_by_the_settings_at_the_start():
    starts = [{"changed": changed(optimizer__lr=1.0, run__steps=70)}]
    now = config(optimizer__lr=1.0, run__steps=70, run__collapse_kl=3.0, run__dir="elsewhere", deadline__save=5)
    assert settings_digest(now, starts) == settings_digest(DEFAULT)
    assert settings_digest(config(optimizer__lr=1.0, run__steps=70)) != settings_digest(DEFAULT)
