"""The recipes of CONTRIBUTING, applied to a copy of the package as they are printed, then used together in one run."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from expo.rollout import RolloutEngine
from tests import ROOT
from tests.recipes import apply, patched, recipe

pytestmark = pytest.mark.medium

RECIPES = ("Add a reward", "Add a data source", "Add a tracker", "Add an engine")
COMMAND = re.compile(r"^    python -m expo\.train CONFIG\.yaml (.*)$", flags=re.MULTILINE)
SMALL = (
    "--run.steps=2", "--rollout.questions_per_step=2", "--rollout.group_size=2", "--rollout.max_new_tokens=6",
    "--evaluation.sets={}", "--run.checkpoint_every=0", "--optimizer.warmup_steps=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the packages with all recipes applied."""
    tree = tmp_path_factory.mktemp("recipes")
    for package in ("expo", "expo_kernels"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for title in RECIPES:
        apply(tree, title)
    return tree


@pytest.fixture(scope="module")
def run(tree):
    """The folder of a short run with the options that the recipes end with."""
    options = [option for title in RECIPES for line in COMMAND.findall(recipe(title)) for option in shlex.split(line)]
    assert len(options) == len(RECIPES)
    command = [sys.executable, "-m", "expo.train", "--run.dir=run", *SMALL, *options]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return tree / "run"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_reward_is_logged_and_shapes_the_advantages(run):
    metrics = rows(run / "metrics.jsonl")
    assert [row["reward/brief"] for row in metrics] == [1.0, 1.0]
    assert all(row["reward"] == pytest.approx(row["accuracy"] + 0.2) for row in metrics)


def test_the_run_trains_on_the_questions_of_the_data_source(run):
    questions = {row["question"] for row in rows(run / "completions.jsonl")}
    assert questions
    assert questions <= {f"{n}+{n}=" for n in range(1, 10)}


def test_the_tracker_has_every_number_of_every_step(run):
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        tracked = {(int(step), name): float(value) for step, name, value in csv.reader(file)}
    metrics = rows(run / "metrics.jsonl")
    assert {step for step, _ in tracked} == {1, 2}
    for row in metrics:
        assert tracked[row["step"], "loss"] == row["loss"]
        assert tracked[row["step"], "accuracy"] == row["accuracy"]


def test_the_engine_samples_what_the_policy_scores(run):
    """Its log-probs are the trainer's, and the same seeds give the same replies again."""
    assert "engine: uncached" in (run / "config.yaml").read_text(encoding="utf-8")
    assert max(row["rollout_logp_difference_max"] for row in rows(run / "metrics.jsonl")) < 1e-4


def test_the_engine_has_every_method_of_the_protocol(tree):
    source = (tree / "expo" / "rollout" / "uncached.py").read_text(encoding="utf-8")
    names = {}
    exec(compile(source, "uncached.py", "exec"), names)
    methods = {name for name in vars(RolloutEngine) if not name.startswith("_")}
    assert methods
    assert [name for name in methods if not hasattr(names["UncachedEngine"], name)] == []


def test_a_diff_that_no_longer_fits_is_found():
    with pytest.raises(AssertionError, match="exactly once"):
        patched("a = 1\n", "-a = 2\n+a = 3\n", "some.py")
