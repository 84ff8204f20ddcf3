"""Every policy loss, aggregation, KL penalty and rollout correction of verl that an `Objective` expresses."""

import dataclasses
import math

import pytest
import torch
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights, compute_rollout_rejection_mask

from expo_kernels import Objective, expo_loss_from_logps
from tests.verl.calls import AGGREGATIONS, TOLERANCES, B, T, make_call, make_config, of_verl, with_gradient

BOUNDS = {"clip_low": 0.1, "clip_high": 0.28}  # of `make_config`
REINFORCE = {"rollout_correction": {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 2.0}}
PPO_CLIP = {"rollout_correction": {"loss_type": "ppo_clip"}}
WITHOUT_COUNTERPART = {"dppo_kl"}  # a mask by the binary KL divergence
DTYPES = (torch.float32, torch.float64)
OURS = {"token-mean": "token", "token-sum": "token", "seq-mean-token-sum": "sum", "seq-mean-token-mean": "sequence"}


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """What expresses a loss of verl: settings of `Objective`, and what else is passed to the loss."""

    mode: str
    settings: dict
    policy_loss: dict = dataclasses.field(default_factory=dict)
    """Settings of verl's `actor.policy_loss`."""
    clip_ratio_c: float = 3.0
    beta: float = 0.0
    is_on_policy: bool = False
    """No old log-probs are given."""
    same_value: bool = True
    """Otherwise only the gradients are equal."""
    aggregations: tuple = AGGREGATIONS


COUNTERPARTS = {
    "vanilla": Counterpart("vanilla", BOUNDS | {"dual_clip": 3.0}),
    # verl's value is -sg(r) A logp, ours -r A; verl truncates r at clip_ratio_c
    "dppo_tv": Counterpart("dppo_tv", BOUNDS | {"surrogate": "dppo_tv"}, clip_ratio_c=100.0, same_value=False),
    "gspo": Counterpart("gspo", BOUNDS | {"ratio": "sequence_token"}),
    "sapo": Counterpart("sapo", {"surrogate": "sapo"}, aggregations=("seq-mean-token-mean",)),
    "gpg": Counterpart("gpg", {"surrogate": "cispo"}, is_on_policy=True),
    # all candidates are chosen: which ones a smaller share draws depends on the generator
    "clip_cov": Counterpart(
        "clip_cov",
        BOUNDS | {"surrogate": "clip_cov", "cov_ratio": 1.0, "clip_cov_low": 0.1},
        {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1},
    ),
    "kl_cov": Counterpart(
        "kl_cov",
        {"surrogate": "kl_cov", "cov_ratio": 0.3, "kl_cov_coef": 0.1},
        {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.1},
    ),
    # verl clips log-ratios to these bounds, and counts sequences without tokens
    "geo_mean": Counterpart(
        "geo_mean",
        {"surrogate": "gmpo", "clip_low": 1.0 - math.exp(-0.1), "clip_high": math.exp(0.28) - 1.0},
        aggregations=("seq-mean-token-mean",),
    ),
    "dro": Counterpart("dro", {"surrogate": "cispo", "kl": "k2"}, {"dro_beta": 0.3}, beta=0.3, is_on_policy=True),
    "cispo": Counterpart("cispo", BOUNDS | {"surrogate": "cispo"}),
    "bypass_mode, PPO": Counterpart("bypass_mode", BOUNDS | {"dual_clip": 3.0}, PPO_CLIP),
    "bypass_mode, REINFORCE": Counterpart(
        "bypass_mode", {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 1.0}, REINFORCE
    ),
}


def of_aggregation(aggregation, mask):
    """Settings of `Objective`, and the normalizer."""
    if aggregation == "seq-mean-token-sum-norm":
        return {"aggregation": "constant", "max_completion_length": T}, (mask.sum(1) > 0).sum()
    counts = {"token-mean": mask.sum(), "token-sum": 1.0}
    return {"aggregation": OURS[aggregation]}, counts.get(aggregation, (mask.sum(1) > 0).sum())


def ours(objective, normalizer, **given):
    def loss(log_prob, response_mask, advantages, old_log_prob=None, ref_log_prob=None, rollout_log_prob=None):
        return expo_loss_from_logps(
            log_prob,
            response_mask,
            advantages=advantages,
            old_logps=old_log_prob,
            ref_logps=ref_log_prob,
            rollout_logps=rollout_log_prob,
            objective=objective,
            normalizer=normalizer,
            **given,
        ).loss

    return loss


def test_every_loss_that_verl_registers_has_a_counterpart():
    compared = {counterpart.mode for counterpart in COUNTERPARTS.values()}
    registered = {mode for mode in core_algos.POLICY_LOSS_REGISTRY if not mode.startswith("expo")}
    assert registered - compared == WITHOUT_COUNTERPART


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "aggregation"), [(name, mode) for name, other in COUNTERPARTS.items() for mode in other.aggregations]
)
def test_losses_and_gradients_are_verls(name, aggregation, dtype):
    counterpart, call = COUNTERPARTS[name], make_call(dtype)
    config = make_config(counterpart.policy_loss, clip_ratio_c=counterpart.clip_ratio_c)
    theirs = of_verl(counterpart.mode, call, aggregation, config)
    settings, normalizer = of_aggregation(aggregation, call["response_mask"])
    if counterpart.mode == "geo_mean":
        normalizer = float(B)
    mine = call if counterpart.beta == 0.0 else call | {"ref_log_prob": call["old_log_prob"]}
    if counterpart.is_on_policy:
        mine = {key: value for key, value in mine.items() if key != "old_log_prob"}
    objective = Objective(**counterpart.settings, **settings)
    value, gradient = with_gradient(ours(objective, normalizer, beta=counterpart.beta), mine)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, theirs[1], **TOLERANCES[dtype])
    if counterpart.same_value:
        torch.testing.assert_close(value, theirs[0], **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "estimator"), [(kind, kind) for kind in ("k1", "k2", "k3")] + [("low_var_kl", "k3")])
def test_penalties_are_verls(kind, estimator, dtype):
    call = make_call(dtype)
    ref_log_prob, mask = call["old_log_prob"], call["response_mask"]

    def theirs(log_prob, response_mask, **_):
        return core_algos.agg_loss(core_algos.kl_penalty(log_prob, ref_log_prob, kind), response_mask, "token-mean")

    mine = {"log_prob": call["log_prob"], "advantages": torch.zeros(B, dtype=dtype), "ref_log_prob": ref_log_prob}
    loss = ours(Objective(kl=estimator, aggregation="token"), None, beta=1.0)
    expected = with_gradient(theirs, call)
    for one, other in zip(with_gradient(loss, mine | {"response_mask": mask}), expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCES[dtype])


# settings of `Objective`, and verl's level and threshold; the mask's bounds are of the inverse ratio in verl
CORRECTIONS = {
    "token": ({"rollout_cap": 1.5}, "token", 1.5),
    "sequence": ({"rollout_cap": 1.5}, "sequence", 1.5),
    "token_mask": ({"rollout_floor": 0.5, "rollout_cap": 1.5}, "token", "0.5_1.5"),
    "sequence_mask": ({"rollout_floor": 0.5, "rollout_cap": 1.5}, "sequence", "0.5_1.5"),
    "geometric_mask": ({"rollout_floor": 1 / 1.2, "rollout_cap": 1 / 0.9}, "seq_mean_k1", "0.9_1.2"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_rollout_corrections_are_verls(correction, dtype):
    settings, level, threshold = CORRECTIONS[correction]
    call = make_call(dtype)
    mask = call["response_mask"]
    drift = torch.linspace(-0.2, 0.2, B * T, dtype=dtype).view(B, T) * (4 if level == "token" else 1)
    if level == "sequence":
        drift = drift * 2
    if level.startswith("seq_mean"):
        weights = compute_rollout_rejection_mask(drift, mask, level, threshold)[0].to(dtype)
    else:
        weights = compute_rollout_correction_weights(drift, mask, level, threshold)[0]
    kept = weights[mask > 0]
    assert kept.min() != kept.max()  # the bounds apply to some and not to all
    theirs = of_verl("vanilla", call | {"rollout_is_weights": weights}, "token-mean", make_config())
    objective = Objective(**BOUNDS, dual_clip=3.0, aggregation="token", rollout_correction=correction, **settings)
    mine = call | {"rollout_log_prob": call["old_log_prob"] - drift}
    for one, other in zip(with_gradient(ours(objective, None, beta=0.0), mine), theirs, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCES[dtype])
