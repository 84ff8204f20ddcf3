"""ExpoGRPOTrainer compared with TRL's GRPOTrainer: real runs on a tiny model with equal seeds, data and rollouts."""

import dataclasses
import inspect
import re

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from expo_kernels import CurriculumTable, akl_beta
from expo_kernels.integrations import _host, _trl_entropy, _trl_linear
from expo_kernels.integrations._trl_loss import LOSS_TYPES
from expo_kernels.integrations.trl import ExpoGRPOTrainer
from tests.integrations.trl_runs import (
    GROUP_SIZE,
    PLAIN,
    QUESTIONS,
    assert_same,
    compare,
    make_trainer,
    roll_out,
    run,
)

# every pair of two of the three, for each loss type
PAIRS = [(1, 0.0, False), (1, 0.02, True), (4, 0.0, True), (4, 0.02, False)]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("accumulation", "beta", "lora"), PAIRS)
def test_plain_settings_give_trls_numbers(tiny_model, loss_type, accumulation, beta, lora):
    # with two passes over each rollout the ratio differs from 1 and reaches its bounds; accumulation is on-policy
    compare(
        tiny_model,
        loss_type=loss_type,
        gradient_accumulation_steps=accumulation,
        beta=beta,
        lora=lora,
        num_iterations=2 if accumulation == 1 else 1,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.02, "use_bias_correction_kl": False},
        {"importance_sampling_level": "sequence", "loss_type": "luspo", "beta": 0.0},
        {"loss_type": "dapo", "delta": 1.4, "epsilon_high": 0.2, "learning_rate": 1e-2},
        {"loss_type": "cispo", "epsilon_high": 0.2, "beta": 0.02},  # TRL's default bound
        {"loss_type": "dapo", "gradient_accumulation_steps": 2, "steps_per_generation": 4, "beta": 0.02},
        {"loss_type": "dapo", "mask_truncated_completions": True},
        {"loss_type": "grpo", "mask_truncated_completions": True, "beta": 0.02},
        {"temperature": 0.7, "beta": 0.02, "use_bias_correction_kl": False, "scale_rewards": "batch"},
        {"loss_type": "dr_grpo", "beta": 0.02, "gradient_checkpointing": True, "cast_lm_head_to_fp32": True},
        {"loss_type": "bnpo", "beta": 0.02, "sync_ref_model": True, "ref_model_sync_steps": 2},
        {
            "loss_type": "vespo",
            "vespo_k_pos": 1.5,
            "vespo_lambda_pos": 1.2,
            "vespo_k_neg": 0.9,
            "vespo_lambda_neg": 2.5,
        },
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_further_options_have_trls_effect(tiny_model, settings):
    ours = compare(tiny_model, **{"num_iterations": 2} | settings)
    if "delta" in settings:
        assert max(entry["ratio_max"] for entry in ours.history) > settings["delta"]


def test_replies_generated_by_the_model_give_trls_numbers(tiny_model):
    compare(tiny_model, extra={"rollout_func": None}, beta=0.02, gradient_accumulation_steps=2)


def test_environment_tokens_are_left_out(tiny_model):
    def with_environment(prompts, trainer):
        made = roll_out(prompts, trainer)
        return made | {"env_mask": [[index % 3 != 1 for index, _ in enumerate(ids)] for ids in made["completion_ids"]]}

    compare(tiny_model, extra={"rollout_func": with_environment}, beta=0.02, num_iterations=2)


@pytest.mark.parametrize(
    ("mode", "loss_type"),
    [
        ("token_truncate", "dapo"),
        ("token_mask", "dapo"),
        ("sequence_truncate", "dapo"),
        ("sequence_mask", "dapo"),
        ("token_truncate", "vespo"),
        ("token_mask", "vespo"),
    ],
)
def test_the_samplers_logps_correct_the_loss_as_trl_does(tiny_model, mode, loss_type, monkeypatch):
    class Engine:
        def sync_weights(self):
            """The rollouts are sampled without a model."""

    def with_sampler(trainer_class, **extra):
        trainer = make_trainer(
            trainer_class,
            tiny_model,
            extra=extra,
            beta=0.02,
            loss_type=loss_type,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_max=1.5,
        )
        # as with vLLM: `roll_out` returns log-probs, so that no engine is needed
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Engine(), -1
        return run(trainer)

    ours, theirs = with_sampler(ExpoGRPOTrainer, **PLAIN), with_sampler(GRPOTrainer)
    assert_same(ours, theirs)
    assert "sampling/importance_sampling_ratio/max" in ours.history[0]


def test_masked_garbage_changes_nothing(tiny_model):
    class WithGarbage(ExpoGRPOTrainer):
        def _compute_loss(self, model, inputs):
            padding = inputs["completion_mask"] == 0
            assert padding.any()
            logps = {name: value.masked_fill(padding, torch.nan) for name, value in inputs.items() if "logps" in name}
            return super()._compute_loss(model, inputs | logps)

    settings = {"beta": 0.02, "num_iterations": 2}
    clean = run(make_trainer(ExpoGRPOTrainer, tiny_model, extra=PLAIN, **settings))
    assert_same(run(make_trainer(WithGarbage, tiny_model, extra=PLAIN, **settings)), clean, tolerance=0.0)


def test_mixed_precision_stays_near_trls(tiny_model):
    compare(tiny_model, beta=0.02, bf16=True, tolerance=3e-2)


def test_evaluation_gives_trls_loss(tiny_model):
    def evaluated(trainer_class, **extra):
        trainer = make_trainer(trainer_class, tiny_model, extra=extra, beta=0.02, per_device_eval_batch_size=GROUP_SIZE)
        return trainer.evaluate(eval_dataset=trainer.train_dataset)

    ours, theirs = evaluated(ExpoGRPOTrainer, **PLAIN), evaluated(GRPOTrainer)
    for name in ("eval_loss", "eval_kl", "eval_entropy"):
        assert abs(ours[name] - theirs[name]) <= 1e-5


def test_beta_follows_the_accuracy_of_the_whole_batch(tiny_model):
    trainer = make_trainer(ExpoGRPOTrainer, tiny_model, beta=0.02, gradient_accumulation_steps=2)
    for entry in run(trainer).history:
        expected = akl_beta(torch.tensor([entry["rewards/score/mean"]]), 0.02)
        assert entry["accuracy"] == pytest.approx(entry["rewards/score/mean"])
        assert entry["beta_eff"] == pytest.approx(float(expected))


def test_beta_is_what_the_loss_is_trained_with(tiny_model):
    halved = make_trainer(ExpoGRPOTrainer, tiny_model, extra=PLAIN | {"rho": lambda x: 0 * x + 0.5}, beta=0.04)
    theirs = make_trainer(GRPOTrainer, tiny_model, beta=0.02)
    assert_same(run(halved), run(theirs))


def test_drawn_questions_are_those_whose_pass_rates_move(tiny_model):
    asked = []

    def remember(prompts, trainer):
        asked.append(list(prompts))
        return roll_out(prompts, trainer)

    def grade(prompts, **_):  # the first four questions are always solved
        return [float(QUESTIONS.index(prompt) < 4) for prompt in prompts]

    extra = {"rollout_func": remember, "reward_funcs": grade}
    trainer = make_trainer(ExpoGRPOTrainer, tiny_model, extra=extra, gradient_accumulation_steps=2, max_steps=8)
    trainer.train()
    table = CurriculumTable(len(QUESTIONS))
    for prompts in asked:
        groups = [prompts[start : start + GROUP_SIZE] for start in range(0, len(prompts), GROUP_SIZE)]
        assert all(len(set(group)) == 1 for group in groups)
        ids = torch.tensor([QUESTIONS.index(group[0]) for group in groups])
        assert len(set(ids.tolist())) == 2
        table.update(ids, (ids < 4).float())
    assert torch.equal(trainer.curriculum.pass_rates, table.pass_rates)
    assert torch.equal(trainer.curriculum.visits, table.visits)
    assert trainer.state.log_history[-2]["curriculum/effective_sample_size"] < len(QUESTIONS)


def test_a_draw_sees_every_score_before_it(tiny_model):
    """Data loaders prefetch batches, so that a sampler would use a stale table."""
    seen = []

    class Watching(ExpoGRPOTrainer):
        def _draw_questions(self, curriculum):
            seen.append(int(curriculum.visits.sum()))
            return super()._draw_questions(curriculum)

    run(make_trainer(Watching, tiny_model))
    assert seen == [0, 1, 2, 3, 4]


def test_a_resumed_run_draws_on_from_the_saved_table(tiny_model, tmp_path):
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(ExpoGRPOTrainer, tiny_model, **settings)
    whole_run = run(whole)
    resumed = make_trainer(ExpoGRPOTrainer, tiny_model, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.curriculum.pass_rates, whole.curriculum.pass_rates)
    assert torch.equal(resumed.curriculum.visits, whole.curriculum.visits)
    for name, value in resumed.model.named_parameters():
        assert torch.equal(value, whole_run.parameters[name])


def test_a_checkpoint_without_a_table_is_refused(tiny_model, tmp_path):
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(GRPOTrainer, tiny_model, **settings).train()
    with pytest.raises(FileNotFoundError, match=r"expo_curriculum.pt is missing"):
        make_trainer(ExpoGRPOTrainer, tiny_model, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "gpg"}, "supported here: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo"),
        ({"beta": -0.1}, "beta is -0.1; expected a weight >= 0"),
        ({"loss_type": "cispo", "epsilon_high": 0.0}, "epsilon_high is 0.0; expected a bound > 0"),
        ({"delta": 0.9}, "delta is 0.9, but ratios start at 1"),
        ({"loss_type": "sapo", "delta": 1.5}, "delta=1.5 has no effect"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_an_objective_cannot_express_is_refused(tiny_model, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(ExpoGRPOTrainer, tiny_model, **settings)


def test_a_bound_of_cispo_below_the_first_ratio_is_warned_of(tiny_model):
    with pytest.warns(UserWarning, match=r"epsilon_high is 0.2, .* bounds the ratio itself"):
        make_trainer(ExpoGRPOTrainer, tiny_model, loss_type="cispo")


def test_every_option_that_trls_loss_reads_is_mapped():
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}

    def options(*sources):
        read = re.compile(r"\b(?:self|args|trainer)\.(?:args\.)?(\w+)")
        return {name for source in sources for name in read.findall(inspect.getsource(source))} & fields

    ours = options(_trl_linear, _trl_entropy)
    # settings that `importance_sampling_ratio` already contains
    ours |= {"use_vllm", "vllm_importance_sampling_correction"}
    assert options(GRPOTrainer._compute_loss) - ours == set()


def test_unscored_replies_change_neither_beta_nor_the_table(tiny_model):
    def nothing(completion_ids, **_):
        return [None for _ in completion_ids]

    trainer = make_trainer(ExpoGRPOTrainer, tiny_model, extra={"reward_funcs": nothing}, beta=0.02)
    trainer.train()
    assert trainer.curriculum.visits.sum() == 0
    assert float(trainer._beta_eff) == pytest.approx(0.02)


def test_a_missing_or_untested_host_is_named():
    with pytest.raises(ImportError, match=r"no-such-host>=0.1,<0.2 is not installed"):
        _host.check_version("no-such-host", at_least=(0, 1), below=(0, 2))
    with pytest.raises(ImportError, match=r"torch is 2\..*, but this integration was tested with torch>=0.1,<0.2"):
        _host.check_version("torch", at_least=(0, 1), below=(0, 2))
