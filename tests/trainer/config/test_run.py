"""RunConfig: its defaults, and the combinations of settings that it refuses."""

import subprocess
import sys

import pytest
import yaml

from expo.config import RunConfig

MINIMAL = {"model": {"path": "somewhere"}, "data": {"train": "questions.jsonl"}}


def test_defaults_are_the_papers():
    config = RunConfig.model_validate(MINIMAL)
    assert (config.rollout.group_size, config.rollout.questions_per_step) == (8, 256)
    assert (config.kl.beta, config.kl.rho, config.kl.estimator) == (0.02, "tanh", "k3")
    assert (config.curriculum.mean, config.curriculum.std, config.curriculum.momentum) == (0.5, 0.35, 0.9)
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (1024, 3072)
    assert config.run.steps == -(-30 * 17398 // 256)


def test_every_field_is_documented():
    for section in RunConfig.model_fields.values():
        assert section.annotation.__doc__
        assert [name for name, field in section.annotation.model_fields.items() if not field.description] == []


def test_config_is_frozen():
    config = RunConfig.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1


def test_importing_the_configuration_does_not_load_transformers():
    script = "import sys, expo.config; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("surrogate", ["cispo", "sapo", "gmpo", "vespo"])
def test_every_surrogate_can_be_chosen_and_saved(surrogate):
    config = RunConfig.model_validate({**MINIMAL, "objective": {"surrogate": surrogate}})
    assert config.loss_objective().surrogate == surrogate
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"surrogate": "sapo", "clip_high": 0.3}, "clip_high=0.3 has no effect"),
        ({"surrogate": "gmpo", "ratio": "sequence"}, "ratio='sequence' has no effect"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip=3.0 has no effect"),
        ({"surrogate": "vespo", "rollout_correction": "sequence"}, "does not go with"),
        ({"rollout_cap": 5.0}, "rollout_cap=5.0 has no effect without rollout_correction"),
    ],
)
def test_objective_fields_that_do_not_go_together_are_refused(section, named):
    with pytest.raises(ValueError, match=named):
        RunConfig.model_validate({**MINIMAL, "objective": section})
