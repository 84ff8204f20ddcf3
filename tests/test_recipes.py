"""The recipes: each can be planned with nothing at hand, and the paper's four are the paper's."""

import re

import pytest

from expo.config import RECIPES, ConfigError, load_config
from expo.train import main

NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))
PAPERS = [name for name in NAMES if name.startswith(("expo-", "grpo-"))]
METHOD = {"curriculum.kind": ("gcs", "uniform"), "kl.rho": ("tanh", "constant")}


def settings(name):
    sections = load_config(RECIPES / name).model_dump(mode="json")
    return {f"{section}.{field}": value for section, fields in sections.items() for field, value in fields.items()}


def test_the_papers_two_models_come_with_either_method():
    models = ("qwen3-8b-base", "r1-distill-qwen-1.5b")
    assert [f"{method}-{model}.yaml" for method in ("expo", "grpo") for model in models] == PAPERS


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_planned_with_nothing_at_hand(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    ranks = 8 if name in PAPERS else 1
    assert main([str(RECIPES / name), "--dry-run", f"--ranks={ranks}", "--gpu-memory-gib=80"]) == 0
    assert re.search(r"^  peak +[\d.]+ ", capsys.readouterr().out, flags=re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_batch_is_256_questions_with_8_replies_for_30_epochs(name, capsys):
    config = load_config(RECIPES / name)
    replies = config.rollout.questions_per_step * config.rollout.group_size
    assert (config.rollout.questions_per_step, config.rollout.group_size, replies) == (256, 8, 2048)
    assert replies // config.policy.updates_per_step == 512
    assert config.run.steps == -(-30 * 17398 // 256)
    assert main([str(RECIPES / name), "--dry-run", "--ranks=8"]) == 0
    assert re.search(r"^  replies a step +2,048  256 questions x 8$", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.parametrize("name", PAPERS)
def test_every_setting_of_the_papers_recipes_names_its_source(name):
    fields = [line for line in (RECIPES / name).read_text().splitlines() if re.match(r"  \w+: ", line)]
    silent = [line for line in fields if not re.search(r"# (paper|DAPO|ours|yours)\b", line)]
    # which engine samples is no setting of the method
    assert [line for line in silent if not line.startswith("  engine: ")] == []


@pytest.mark.parametrize("model", ["qwen3-8b-base", "r1-distill-qwen-1.5b"])
def test_grpo_is_the_same_run_but_for_the_method(model):
    expo, grpo = (settings(f"{method}-{model}.yaml") for method in ("expo", "grpo"))
    assert {name: (expo[name], grpo[name]) for name in expo if expo[name] != grpo[name]} == METHOD


def write(path, text):
    path.write_text(text)
    return path


def test_a_recipe_holds_over_its_base_and_the_command_line_over_both(tmp_path):
    write(tmp_path / "base.yaml", "model: {path: m}\ndata: {train: t}\nrun: {seed: 1, steps: 7}\n")
    path = write(tmp_path / "own.yaml", "base: base.yaml\nrun: {seed: 2}\nkl: {beta: 0.5}\n")
    config = load_config(path, [("kl.beta", 0.25)])
    assert (config.model.path, config.run.steps, config.run.seed, config.kl.beta) == ("m", 7, 2, 0.25)
    assert "base" not in config.to_yaml()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: nowhere.yaml", "cannot read the config file"),
        ("base: own.yaml", "base = 'own.yaml' is a base of a base; expected one recipe that stands on its own"),
        ("base: 3", "base = 3 is not a file name"),
        ("base: base.yaml\nrun: {sed: 2}", "unknown key run.sed; did you mean run.seed?"),
        ("base: base.yaml\nrun: 3", "run = 3"),
    ],
)
def test_a_bad_base_is_explained_in_one_line(tmp_path, text, expected):
    write(tmp_path / "base.yaml", "model: {path: m}\ndata: {train: t}\n")
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path / "own.yaml", text))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
