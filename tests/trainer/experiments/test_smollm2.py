"""A real language model from a Python package is converted, trained for a few steps and exported without a hub."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expo.config import RECIPES, load_config
from expo.errors import ConfigError
from expo.experiments.smollm2 import PACKAGE, convert, find_weights, main
from expo.train import train

MISSING = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    assert main([str(folder)]) == 0
    return folder


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="run `make smollm2`"):
        find_weights()
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "model")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        convert(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; run `make smollm2` (93 MB)")
def test_a_real_language_model_trains_on_questions_that_it_sometimes_answers(smollm2, tmp_path):
    overrides = {
        "model.path": str(smollm2),
        "run.dir": str(tmp_path / "run"),
        "run.steps": 3,
        "run.checkpoint_every": 0,
        "rollout.questions_per_step": 4,
        "evaluation.sets": {},
        "optimizer.warmup_steps": 1,
    }
    run = train(load_config(RECIPES / "laptop.yaml", list(overrides.items())))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert sum(row["accuracy"] for row in rows) > 0  # about one in ten of the 96 replies is correct
    assert all(row["grad_norm"] > 0 for row in rows if row["zero_variance_fraction"] < 1)
    assert rows[0]["kl"] == 0.0
    assert all(row["rollout_logp_difference_max"] < 1e-3 for row in rows)
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (smollm2, run / "export")
    )
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(run / "export").chat_template
