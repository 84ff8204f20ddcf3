"""The recipes: each can be planned without a hub or a GPU, and the paper's four have the paper's values."""

import re
import shlex
from pathlib import Path

import pytest

from expo.config import RECIPES, load_config
from expo.data.hub import NAMED
from expo.errors import ConfigError
from expo.evaluation.config import parse_command_line
from expo.train import main
from tests import ROOT

NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))
PAPERS = [name for name in NAMES if name.startswith(("expo-", "grpo-"))]
METHOD = {"curriculum.kind": ("gcs", "uniform"), "kl.rho": ("tanh", "constant")}
MODELS = {"qwen3-8b-base": "Qwen/Qwen3-8B-Base", "r1-distill-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"}
BENCHMARKS = ["aime-2024", "aime-2025", "math-500", "minerva", "olympiadbench", "amc"]
PAPER = {  # arXiv 2605.11403, sections 3 and 4.1
    "run.steps": 2039,  # 30 epochs of 17,398 questions, 256 a step
    "data.train": "dapo-17k",
    "data.max_prompt_tokens": 1024,
    "rollout.engine": "vllm",
    "rollout.group_size": 8,
    "rollout.questions_per_step": 256,
    "rollout.max_new_tokens": 3072,
    "vllm.tensor_parallel": 2,
    "curriculum.mean": 0.5,
    "curriculum.std": 0.35,
    "curriculum.momentum": 0.9,
    "curriculum.initial_pass_rate": 0.5,
    "curriculum.estimate": "ema",
    "kl.beta": 0.02,
    "kl.estimator": "k3",
    "objective.surrogate": "clip",
    "objective.advantage_scale": "group",
    "reward.correct_weight": 1.0,
    "evaluation.sets": {name: name for name in BENCHMARKS},
}
DAPO = {  # arXiv 2503.14476, section 4.1, and verl's run_dapo_qwen2.5_32b.sh
    "data.prompt": "dapo",
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.28,
    "objective.dual_clip": 10.0,
    "objective.aggregation": "token",
    "objective.ratio": "token",
    "optimizer.lr": 1e-6,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup_steps": 10,
    "optimizer.schedule": "constant",
    "optimizer.max_grad_norm": 1.0,
    "policy.updates_per_step": 4,
}
NOT_USED = {  # what neither of them uses, and the parts of DAPO that the recipes do not use, as they say
    "rollout.max_resamples": 0,
    "reward.overlong_buffer": 0,
    "reward.functions": {},
    "objective.mask_truncated": False,
    "objective.rollout_correction": None,
    "objective.entropy_bonus": 0.0,
    "policy.lora_rank": 0,
    "data.drop_overlap": "none",
}


def settings(name):
    sections = load_config(RECIPES / name).model_dump(mode="json")
    return {f"{section}.{field}": value for section, fields in sections.items() for field, value in fields.items()}


def test_each_of_the_papers_models_has_a_recipe_for_each_method():
    assert [f"{method}-{model}.yaml" for method in ("expo", "grpo") for model in MODELS] == PAPERS


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["expo", "grpo"])
def test_the_papers_recipes_hold_the_papers_values(method, model):
    found = settings(f"{method}-{model}.yaml")
    own = {name: pair[method == "grpo"] for name, pair in METHOD.items()}
    expected = {"model.path": MODELS[model], **PAPER, **DAPO, **NOT_USED, **own}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("name", PAPERS)
def test_values_marked_as_the_papers_or_dapos_are_in_the_tables_above(name):
    section, marked = "", []
    for line in (RECIPES / name).read_text().splitlines():
        if field := re.match(r"(  )?(\w+):", line):
            section = section if field[1] else field[2]
            source = re.search(r"# (paper|DAPO)\b", line)
            marked += [(f"{section}.{field[2]}", source[1])] if field[1] and source else []
    tables = {"paper": {"model.path", *METHOD, *PAPER}, "DAPO": set(DAPO)}
    assert [(field, source) for field, source in marked if field not in tables[source]] == []
    assert len(marked) > 20 or name.startswith("grpo-")


def test_the_papers_benchmarks_are_sets_of_the_hub():
    assert set(BENCHMARKS) <= set(NAMED)
    assert sum(NAMED[name].num_distinct for name in BENCHMARKS) == 1546


def test_the_commands_of_the_experiment_page_evaluate_every_run_on_the_six_benchmarks(tmp_path, monkeypatch):
    """Runs the page's shell loop over folders that hold the recipes' configurations."""
    page = (ROOT / "docs/experiment.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (loop,) = re.findall(r"for run in ([^;]+); do\n +torchrun [^\n]*? -m expo\.evaluate ([^\n]+)\n", page)
    assert [f"{run}.yaml" for run in sorted(loop[0].split())] == PAPERS
    monkeypatch.chdir(tmp_path)
    results = []
    for run in loop[0].split():
        folder = Path(f"runs/{run}-0")
        folder.mkdir(parents=True)
        trained = load_config(RECIPES / f"{run}.yaml")
        (folder / "config.yaml").write_text(trained.to_yaml())
        arguments = parse_command_line(shlex.split(loop[1].replace("$run", run)))
        assert (arguments.run, arguments.config.evaluation) == (folder, trained.evaluation)
        assert list(arguments.config.evaluation.sets) == BENCHMARKS
        assert arguments.config.rollout == trained.rollout
        assert arguments.config.evaluation.num_samples > 32
        results.append(str(arguments.config.run.dir))
    compared = re.findall(r"-m expo\.evaluate compare (\S+) (\S+)\n", page)
    assert sorted(folder for pair in compared for folder in pair) == sorted(results)
    assert all(b == a.replace("/grpo-", "/expo-") != a for a, b in compared)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_planned_without_hub_or_gpu(name, capsys, monkeypatch, tmp_path):
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
    fields = [line for line in (RECIPES / name).read_text().splitlines() if re.match(r" +[\w-]+: ", line)]
    assert [line for line in fields if not re.search(r"# (paper|DAPO|ours|yours)\b", line)] == []


@pytest.mark.parametrize("model", MODELS)
def test_the_grpo_recipes_differ_only_in_the_method(model):
    expo, grpo = (settings(f"{method}-{model}.yaml") for method in ("expo", "grpo"))
    assert {name: (expo[name], grpo[name]) for name in expo if expo[name] != grpo[name]} == METHOD


def write(path, text):
    path.write_text(text)
    return path


def test_a_recipe_overrides_its_base_and_the_command_line_overrides_both(tmp_path):
    write(tmp_path / "base.yaml", "model: {path: m}\ndata: {train: t}\nrun: {seed: 1, steps: 7}\n")
    path = write(tmp_path / "own.yaml", "base: base.yaml\nrun: {seed: 2}\nkl: {beta: 0.5}\n")
    config = load_config(path, [("kl.beta", 0.25)])
    assert (config.model.path, config.run.steps, config.run.seed, config.kl.beta) == ("m", 7, 2, 0.25)
    assert "base" not in config.to_yaml()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: nowhere.yaml", "cannot read the config file"),
        ("base: own.yaml", "base = 'own.yaml' is a base of a base; expected the file name of a recipe without a base"),
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
