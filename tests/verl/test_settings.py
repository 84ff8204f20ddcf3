"""The settings of verl that docs/flags.md names exist in verl's configuration."""

import re
from importlib.resources import files

import yaml

from tests import ROOT


def names_of(config, prefix=""):
    """The dotted names of all settings and sections."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from names_of(value, f"{prefix}{name}.")


def test_verls_settings_in_the_table_of_flags_exist():
    text = files("verl").joinpath("trainer/config/_generated_ppo_trainer.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    exist = {*names_of(config), *names_of(config["actor_rollout_ref"])}
    rows = re.findall(r"^\|(.*)\|$", (ROOT / "docs" / "flags.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[2:]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)", row.split("|")[1])}
    assert len(named) > 30
    assert named - exist == set()
