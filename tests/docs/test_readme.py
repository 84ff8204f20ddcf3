"""The README's promises: its example runs as printed, its commands exist."""

import re

import pytest
import torch
import yaml

from expo.config import RunConfig
from expo.runtime.cli import field_names
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_gives_gradients():
    (example,) = blocks("python")
    torch.manual_seed(0)
    names = {}
    exec(example, names)
    assert names["hidden"].grad.abs().sum() > 0
    assert names["weight"].grad.isfinite().all()
    assert names["output"].metrics["kl"] == 0
    statements = [line for line in example.splitlines() if line.strip()]
    assert len(statements) <= 16


def test_the_yaml_example_is_a_whole_config():
    (example,) = blocks("yaml")
    assert RunConfig.model_validate(yaml.safe_load(example)).rollout.group_size == 8


def test_the_estimated_cost_is_what_its_code_prints(capsys):
    page = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
    (code, printed) = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, flags=re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    "name", ["README.md", *(f"docs/{page}.md" for page in ("data", "experiment", "multi-node", "vllm"))]
)
def test_named_options_exist(name):
    named = set(re.findall(r"--([a-z]+\.[a-z_]+)=", (ROOT / name).read_text(encoding="utf-8")))
    assert named
    assert named <= set(field_names(RunConfig))


def test_named_files_exist():
    named = set(re.findall(r"`((?:expo|expo_kernels|tests)/[\w/.]*)`", README))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_continuous_integration_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]
    assert "    make test\n" in README
