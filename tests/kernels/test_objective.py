import dataclasses

import pytest

from expo_kernels import Objective


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"surrogate": "klip"}, "surrogate is 'klip'"),
        ({"kl": "k4"}, "'k1', 'k2', 'k3'"),
        ({"ratio": "batch"}, "ratio"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"rollout_correction": "mask"}, "rollout_correction"),
        ({"clip_low": 1.5}, "clip_low is 1.5"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_low": -0.1, "surrogate": "cispo"}, "clip_low is -0.1; expected a finite number >= 0"),
        ({"clip_low": float("inf"), "surrogate": "cispo"}, "clip_low is inf"),
        ({"clip_low": 10.0, "surrogate": "gmpo"}, "clip_low is 10.0; expected a finite number >= 0 and <= 1"),
        ({"clip_high": float("nan")}, "clip_high"),
        ({"clip_high": -0.1}, "clip_high is -0.1; expected a finite number >= 0"),
        (
            {"clip_high": -1.0, "clip_low": 1.0, "surrogate": "cispo"},
            "clip_high is -1.0; expected a finite",
        ),
        ({"clip_high": -0.5, "surrogate": "cispo"}, "clip_high is -0.5 and clip_low is 0.2"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"logit_softcap": 0.0}, "logit_softcap"),
        ({"log_ratio_clamp": 100.0}, "log_ratio_clamp"),
        ({"sapo_tau_neg": 0.0}, "sapo_tau_neg"),
        ({"rollout_cap": 0.0}, "rollout_cap"),
        ({"rollout_floor": 3.0, "rollout_correction": "token"}, "rollout_floor is 3.0"),
        ({"vespo_k_pos": 0.0, "surrogate": "vespo"}, "vespo_k_pos"),
        ({"cov_ratio": 0.0, "surrogate": "kl_cov"}, "cov_ratio is 0.0"),
        ({"clip_cov_high": 0.5, "surrogate": "clip_cov"}, "clip_cov_high is 0.5; expected a finite number > 1"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "dual_clip=3.0 has no effect"),
        ({"aggregation": "constant"}, "give it"),
        ({"aggregation": "constant", "max_completion_length": 0}, "max_completion_length is 0"),
        ({"max_completion_length": 8}, "has no effect"),
    ],
)
def test_a_bad_setting_is_refused_by_name(setting, named):
    with pytest.raises(ValueError, match=named):
        Objective(**setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"clip_low": "0.2"},
        {"temperature": True},
        {"kl_importance_weighted": 1},
        {"aggregation": "constant", "max_completion_length": 8.0},
    ],
)
def test_a_setting_of_the_wrong_type_is_a_type_error(setting):
    with pytest.raises(TypeError, match=next(reversed(setting))):
        Objective(**setting)


def test_objectives_are_immutable_values():
    assert Objective(clip_high=0.28) == dataclasses.replace(Objective(), clip_high=0.28)
    assert hash(Objective()) == hash(Objective())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective().clip_low = 0.3
