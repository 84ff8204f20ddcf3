"""Options of TRL and kinds of models whose losses need more than an `Objective`: real runs compared with TRL's."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, Qwen3MoeConfig
from trl import GRPOTrainer

from expo_kernels.integrations._trl_head import check_head, logit_scale
from expo_kernels.integrations._trl_loss import LOSS_TYPES
from expo_kernels.integrations.trl import ExpoGRPOTrainer
from tests.integrations.trl_runs import PLAIN, assert_same, compare, make_trainer, roll_out, run, save_model


@pytest.fixture
def masks(monkeypatch):
    """What TRL's two functions that mask tokens return, by name, in the order of the calls."""
    returned = {"get_off_policy_mask": [], "get_high_entropy_mask": []}

    def record(name, wrap):
        original = getattr(GRPOTrainer, name)

        def recorded(*args, **options):
            returned[name].append(original(*args, **options))
            return returned[name][-1]

        monkeypatch.setattr(GRPOTrainer, name, wrap(recorded))

    record("get_off_policy_mask", staticmethod)
    record("get_high_entropy_mask", lambda function: function)
    return returned


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_tokens_of_low_entropy_get_no_surrogate(tiny_model, loss_type):
    compare(tiny_model, loss_type=loss_type, top_entropy_quantile=0.4, beta=0.02, num_iterations=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_entropy_quantile": 0.0, "gradient_accumulation_steps": 2},
        {"top_entropy_quantile": 0.2, "importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"off_policy_mask_threshold": 0.5, "beta": 0.02, "num_iterations": 2},
        {"off_policy_mask_threshold": 0.5, "loss_type": "vespo", "gradient_accumulation_steps": 2},
        {"off_policy_mask_threshold": 0.5, "top_entropy_quantile": 0.4, "loss_type": "grpo", "num_iterations": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_masks_of_tokens_are_trls(tiny_model, masks, settings):
    compare(tiny_model, **settings)
    for made in filter(None, masks.values()):
        theirs, ours = made[: len(made) // 2], made[len(made) // 2 :]
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
        shares = [float(mask.float().mean()) for mask in ours]
        assert min(shares) < 1.0
        assert max(shares) > 0.0


def test_without_rollout_logps_only_the_policys_drift_is_masked(tiny_model, masks):
    def roll_out_without(prompts, trainer):
        return roll_out(prompts, trainer) | {"logprobs": None}

    settings = {"off_policy_mask_threshold": 1e-4, "num_iterations": 4, "learning_rate": 1e-2}
    compare(tiny_model, extra={"rollout_func": roll_out_without}, **settings)
    assert {float(mask.min()) for mask in masks["get_off_policy_mask"]} == {0.0, 1.0}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_entropy_bonus_is_a_mean_over_tokens(tiny_model, loss_type):
    compare(tiny_model, loss_type=loss_type, entropy_coef=0.1, beta=0.02, gradient_accumulation_steps=2)


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo"])
def test_a_negative_entropy_bonus_lowers_the_entropy_as_trls_does(tiny_model, loss_type):
    compare(tiny_model, loss_type=loss_type, entropy_coef=-0.1, gradient_accumulation_steps=2)


SEQUENCE_KL = {"importance_sampling_level": "sequence", "use_bias_correction_kl": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo", "num_iterations": 4, "entropy_coef": 0.1},
        {"loss_type": "dapo", "gradient_accumulation_steps": 2, "top_entropy_quantile": 0.4, "entropy_coef": -0.1},
        {"loss_type": "dr_grpo", "num_iterations": 4, "off_policy_mask_threshold": 1e-4},
        {"loss_type": "luspo", "num_iterations": 4, "temperature": 0.7},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_the_kl_times_the_ratio_of_the_sequence_is_trls(tiny_model, settings):
    # the penalty is large and the steps are long enough for ratios and their gradients to count
    ours = compare(tiny_model, beta=0.5, learning_rate=1e-2, **SEQUENCE_KL, **settings)
    assert max(entry["kl"] for entry in ours.history) > 0.05
    if "num_iterations" in settings:
        assert max(entry["ratio_max"] for entry in ours.history) > 1.05


def test_logps_and_entropies_for_other_code_are_trls(tiny_model):
    ids = torch.arange(3, 19).view(2, 8)
    found = []
    for trainer_class, extra in ((GRPOTrainer, {}), (ExpoGRPOTrainer, PLAIN)):
        trainer = make_trainer(trainer_class, tiny_model, extra=extra, temperature=0.7)
        found.append(
            trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), 4, compute_entropy=True
            )[:2]
        )
    for theirs, ours in zip(*found, strict=True):
        assert ours.requires_grad
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_entropy_bonus_covers_the_tokens_of_high_entropy(tiny_model, loss_type):
    compare(tiny_model, loss_type=loss_type, entropy_coef=0.1, top_entropy_quantile=0.4)


@pytest.mark.parametrize("settings", [{"loss_type": "dapo"}, {"loss_type": "grpo", "top_entropy_quantile": 0.4}])
def test_the_entropy_coefficient_follows_the_entropy(tiny_model, settings):
    control = {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_coef_delta": 0.01}
    theirs = run(make_trainer(GRPOTrainer, tiny_model, **settings))
    target = sorted(entry["entropy"] for entry in theirs.history)[2]
    ours = compare(tiny_model, gradient_accumulation_steps=2, entropy_target=target, **control, **settings)
    assert len({entry["entropy_coef"] for entry in ours.history}) > 1


def test_a_resumed_run_goes_on_from_the_saved_entropy_coefficient(tiny_model, tmp_path):
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings |= {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_target": 10.0}
    whole = run(make_trainer(ExpoGRPOTrainer, tiny_model, extra=PLAIN, **settings))
    resumed = make_trainer(ExpoGRPOTrainer, tiny_model, extra=PLAIN, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.log_history[-2]["entropy_coef"] == whole.history[-1]["entropy_coef"]
    for name, value in resumed.model.named_parameters():
        assert torch.equal(value, whole.parameters[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo", "delta": 1.05},
        {"loss_type": "dapo", "delta": 1.0, "beta": 0.02},
        {"loss_type": "grpo", "delta": 1.1, "importance_sampling_level": "sequence"},
        {"loss_type": "luspo", "delta": 1.28},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_delta_within_the_clip_range_bounds_the_ratio_from_above(tiny_model, settings):
    ours = compare(tiny_model, num_iterations=3, learning_rate=1e-2, epsilon_high=0.28, **settings)
    assert max(entry["ratio_max"] for entry in ours.history) > 1.28


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (CohereConfig, {"logit_scale": 0.0625, "use_qk_norm": False}),
        (GraniteConfig, {"logits_scaling": 8.0}),
        (Gemma2Config, {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    ],
    ids=["cohere", "granite", "gemma2"],
)
def test_models_that_scale_or_cap_their_logits(tmp_path, config_class, settings):
    folder = save_model(tmp_path / "model", config_class, **settings)
    compare(folder, beta=0.02, temperature=0.7, num_iterations=2)


def test_a_scale_applies_before_the_softcap(tmp_path):
    folder = save_model(tmp_path / "model", Gemma2Config, final_logit_softcapping=2.0, logit_scale=3.0)
    compare(folder, beta=0.02, temperature=0.7)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1.0),
        ({"logit_scale": None}, 1.0),
        ({"logit_scale": 0.25}, 0.25),
        ({"output_multiplier": 0.25}, 0.25),
        ({"lm_head_multiplier": 0.25}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "granite"}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
    ],
)
def test_the_scale_of_the_logits_is_read_from_the_config(fields, scale):
    assert logit_scale(SimpleNamespace(**fields)) == scale


def test_a_scale_that_is_not_positive_is_refused(tmp_path):
    folder = save_model(tmp_path / "model", CohereConfig, logit_scale=0.0)
    with pytest.raises(ValueError, match=r"multiplies its logits by 0\.0; expected a factor > 0"):
        make_trainer(ExpoGRPOTrainer, folder, extra=PLAIN)


@pytest.mark.parametrize("beta", [0.0, 0.02])
def test_a_head_in_modules_to_save_is_trained(tiny_model, beta):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights="gaussian")
    ours = compare(tiny_model, extra={"peft_config": adapter}, beta=beta, num_iterations=2)
    copies = {name: value for name, value in ours.parameters.items() if "lm_head" in name}
    original, trained = (value for _, value in sorted(copies.items(), key=lambda item: "modules_to_save" in item[0]))
    assert not torch.equal(original, trained)


def test_heads_whose_output_is_not_that_of_a_weight_are_refused(tiny_model):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]})
    with pytest.raises(NotImplementedError, match=r"lm_head is not supported: weight is a .*TrainableTokensWrapper"):
        make_trainer(ExpoGRPOTrainer, tiny_model, extra=PLAIN | {"peft_config": adapter})
    adapter = LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(NotImplementedError, match=r"lm_head is not supported: .*LoRA variant"):
        check_head(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), adapter))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_routers_auxiliary_loss_is_trls(tmp_path, accumulation):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    folder = save_model(tmp_path / "model", Qwen3MoeConfig, router_aux_loss_coef=0.1, **experts)
    ours = compare(folder, beta=0.02, gradient_accumulation_steps=accumulation)
    assert ours.history[0]["aux_loss"] > 0.0
    without = run(make_trainer(ExpoGRPOTrainer, folder, extra=PLAIN, router_aux_loss_coef=0.0, beta=0.02))
    with pytest.raises(AssertionError):
        assert_same(without, ours)
