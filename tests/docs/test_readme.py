"""What README, CONTRIBUTING and pages say: the example runs as printed, options, files and commands exist."""

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
    "name", ["README.md", *(f"docs/{page}.md" for page in ("data", "experiment", "multi-node", "training", "vllm"))]
)
def test_named_options_exist(name):
    named = set(re.findall(r"--([a-z]+\.[a-z_]+)=", (ROOT / name).read_text(encoding="utf-8")))
    assert named
    assert named <= set(field_names(RunConfig))


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(page.name for page in ROOT.glob("docs/*.md"))]
)
def test_named_files_exist(page):
    text = (ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page).read_text(encoding="utf-8")
    # the files that a recipe adds are named with a colon
    named = set(re.findall(r"`((?:expo|expo_kernels|tests|benchmarks)/[\w/.]*)`(?!:\n)", text))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_continuous_integration_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]
    assert re.search(r"^    make test\b", README, flags=re.MULTILINE)


def test_the_commands_that_the_pages_name_are_in_the_makefile():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        named = set(re.findall(r"(?:^    |`)make ([a-z0-9-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert named <= targets, page
