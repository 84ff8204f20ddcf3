"""Each formula, compared with numbers computed by hand."""

import math

import pytest
import torch

from expo_kernels import Objective, reference


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def terms(logps, old, ref=None, rollout=None, advantages=(1.0,), beta=0.0, sequences=None, **options):
    logps = doubles(*logps)
    index = torch.zeros(logps.numel(), dtype=torch.int64) if sequences is None else torch.tensor(sequences)
    advantages = doubles(*advantages).expand(logps.numel())
    return reference.token_terms(
        logps,
        old_logps=doubles(*old),
        ref_logps=None if ref is None else doubles(*ref),
        rollout_logps=None if rollout is None else doubles(*rollout),
        advantages=advantages,
        beta=doubles(beta)[0],
        sequence_index=index,
        num_sequences=int(index.max()) + 1,
        objective=Objective(**options),
    )


def test_logp_and_entropy_of_three_to_one_odds():
    logits = doubles(math.log(3), 0.0)
    assert reference.token_logps(logits, torch.tensor(0), 1.0) == pytest.approx(math.log(0.75))
    assert reference.token_entropies(logits, 1.0) == pytest.approx(0.5623351446188083)
    assert reference.log_sum_exps(logits, 1.0) == pytest.approx(math.log(4))
    assert reference.log_sum_exps(logits, 0.5) == pytest.approx(math.log(10))
    # temperature 0.5 squares the odds: 9 to 1
    assert reference.token_logps(logits, torch.tensor(0), 0.5) == pytest.approx(math.log(0.9))
    # cap 1: tanh(ln 3) = 0.8
    expected = 0.8 - math.log(math.exp(0.8) + 1)
    assert reference.token_logps(logits, torch.tensor(0), 1.0, 1.0) == pytest.approx(expected)


def test_advantages_of_one_success_in_four():
    # mean 1/4, population std sqrt(3)/4
    rewards = doubles(1.0, 0.0, 0.0, 0.0)
    expected = doubles(3 / math.sqrt(3), *[-1 / math.sqrt(3)] * 3)
    torch.testing.assert_close(reference.group_advantages(rewards, 4, "group", 0.0), expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.5, 2.0, -2.4), (0.5, 2.0, -1.0), (1.5, -2.0, 3.0), (0.5, -2.0, 1.6), (1.1, 2.0, -2.2)],
)
def test_clipped_surrogate(ratio, advantage, loss):
    assert terms([math.log(ratio)], [0.0], advantages=[advantage]).losses.item() == pytest.approx(loss)


def test_clip_flags_name_the_side_and_only_where_the_clipped_term_was_chosen():
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.0], [1.0, -1.0, 1.0, -1.0, 1.0]
    made = terms([math.log(r) for r in ratios], [0.0] * 5, advantages=advantages)
    assert made.clipped_high.tolist() == [True, False, False, False, False]
    assert made.clipped_low.tolist() == [False, False, False, True, False]


def test_dual_clip_caps_the_loss_of_a_negative_advantage():
    made = terms([math.log(5.0), math.log(2.0)], [0.0, 0.0], advantages=[-2.0], dual_clip=3.0)
    assert made.losses.tolist() == pytest.approx([6.0, 4.0])
    assert made.clipped_high.tolist() == [True, False]


def test_cispo_weighs_the_logp_by_the_clipped_ratio():
    made = terms([math.log(1.5), math.log(0.5)], [0.0, 0.0], advantages=[2.0], surrogate="cispo")
    assert made.losses.tolist() == pytest.approx([-1.2 * 2 * math.log(1.5), -0.8 * 2 * math.log(0.5)])


def test_cispo_has_no_lower_bound_from_a_clip_low_of_one_on():
    for clip_low in (1.0, 10.0):
        made = terms([math.log(1e-3)], [0.0], advantages=[2.0], surrogate="cispo", clip_low=clip_low)
        assert made.losses.tolist() == pytest.approx([-1e-3 * 2 * math.log(1e-3)])
        assert not made.clipped_low.any()


def test_cispo_with_a_bound_below_one():
    made = terms([0.0, math.log(0.1)], [0.0, 0.0], advantages=[2.0], surrogate="cispo", clip_low=1.0, clip_high=-0.8)
    assert made.losses.tolist() == pytest.approx([0.0, -0.1 * 2 * math.log(0.1)])
    assert made.clipped_high.tolist() == [True, False]


def test_sapo_gate():
    made = terms([0.0, math.log(2.0), math.log(2.0)], [0.0] * 3, advantages=[1.0, 1.0, -1.0], surrogate="sapo")
    positive = 4 / (1 + math.exp(-1.0))
    negative = 4 / 1.05 / (1 + math.exp(-1.05))
    assert made.losses.tolist() == pytest.approx([-2.0, -positive, negative])


def test_gmpo_is_the_geometric_mean_of_ratios_clipped_where_they_gain():
    # ratios 4 (clipped to 2), 0.5 (not: A > 0) and 1 in one sequence: geometric mean 1; A = 3
    logps = [math.log(4), math.log(0.5), 0.0, math.log(0.25)]
    made = terms(
        logps, [0.0] * 4, advantages=[3.0, 3.0, 3.0, -2.0], sequences=[0, 0, 0, 1], surrogate="gmpo", clip_low=0.5,
        clip_high=1.0,
    )  # fmt: skip
    # the other sequence: 0.25 is clipped to 0.5, for A < 0
    assert made.losses.tolist() == pytest.approx([-3.0, -3.0, -3.0, 2.0 * 0.5])
    assert made.clipped_high.tolist() == [True, False, False, False]
    assert made.clipped_low.tolist() == [False, False, False, True]


def test_gmpo_gives_no_gradient_to_a_clipped_token():
    logps = doubles(math.log(4), math.log(0.5)).requires_grad_()
    objective = Objective(surrogate="gmpo", clip_high=1.0)
    ratios, *_ = reference.gmpo_ratios(logps, doubles(1.0, 1.0), torch.tensor([0, 0]), 1, objective)
    (slopes,) = torch.autograd.grad(ratios.sum(), logps)
    # sqrt(2 * 0.5) = 1 for both tokens, d/dx of exp of a mean of two: 1/2 for each
    assert slopes.tolist() == pytest.approx([0.0, 1.0])


def test_vespo_weighs_the_logp_by_the_whole_sequence_s_ratio():
    # the ratios 2 and 1.5 multiply to 3; by the sign of A: w^2 exp(3 (1 - w)) and w^3 exp(2 (1 - w))
    logps, old = [-1.0, -2.0, -1.0], [-1.0 - math.log(2), -2.0 - math.log(1.5), -1.0]
    for advantage, weight in ((2.0, 9 * math.exp(-6)), (-2.0, 27 * math.exp(-4))):
        made = terms(logps, old, advantages=[advantage], sequences=[0, 0, 1], surrogate="vespo")
        assert made.losses.tolist() == pytest.approx([advantage * weight, 2 * advantage * weight, advantage])


def test_vespo_takes_the_rollout_correction_into_its_ratio():
    # ratio 1 twice, corrections 4 (truncated to 2) and 0.75: w = 1.5
    made = terms(
        [-1.0, -1.0], [-1.0, -1.0], rollout=[-1.0 - math.log(4), -1.0 - math.log(0.75)], rollout_correction="token",
        surrogate="vespo",
    )  # fmt: skip
    assert made.losses.tolist() == pytest.approx([2.25 * math.exp(-1.5)] * 2)


def test_dppo_masks_a_token_whose_probability_moved_too_far_and_no_small_one():
    # from 0.5 to 0.75: by 0.25; from 0.01 to 0.03: the ratio is 3, but the probability moves by 0.02
    logps, old = [math.log(0.75), math.log(0.03), math.log(0.25)], [math.log(0.5), math.log(0.01), math.log(0.5)]
    for advantage, losses, high, low in (
        (2.0, [0.0, -6.0, -1.0], [True, False, False], [False] * 3),
        (-2.0, [3.0, 6.0, 0.0], [False] * 3, [False, False, True]),
    ):
        made = terms(logps, old, advantages=[advantage], surrogate="dppo_tv")
        assert made.losses.tolist() == pytest.approx(losses)
        assert made.clipped_high.tolist() == high
        assert made.clipped_low.tolist() == low


# log-probs -3, -2, -1, 0 (mean -1.5) and advantages -1, 0, 0, 1 (mean 0): covariances 1.5, 0, 0, 1.5
COV_LOGPS, COV_ADVANTAGES = doubles(-3.0, -2.0, -1.0, 0.0), doubles(-1.0, 0.0, 0.0, 1.0)


def test_covariances_of_log_probs_and_advantages():
    assert reference.covariances(COV_LOGPS, COV_ADVANTAGES).tolist() == [1.5, 0.0, 0.0, 1.5]


@pytest.mark.parametrize(("share", "num_drawn"), [(0.01, 1), (0.5, 2), (1.0, 2)])
def test_clip_cov_drops_tokens_drawn_from_those_within_its_bounds(share, num_drawn):
    objective = Objective(surrogate="clip_cov", cov_ratio=share)
    losses, low, high = reference.clip_cov_surrogate(COV_LOGPS, torch.ones(4).double(), COV_ADVANTAGES, objective)
    assert int((losses == 0).sum()) == 2 + num_drawn
    assert high.tolist() == [
        bool(loss == 0 and advantage) for loss, advantage in zip(losses, COV_ADVANTAGES, strict=True)
    ]
    assert not low.any()


def test_clip_cov_draws_no_token_that_is_clipped_or_out_of_its_bounds():
    ratios = doubles(1.0, 1.0, 1.0, 1.5)
    made = reference.clip_cov_surrogate(
        COV_LOGPS, ratios, COV_ADVANTAGES, Objective(surrogate="clip_cov", cov_ratio=1.0)
    )
    assert made[0].tolist() == pytest.approx([0.0, 0.0, 0.0, -1.2])
    objective = Objective(surrogate="clip_cov", cov_ratio=1.0, clip_cov_high=1.4)
    assert reference.clip_cov_surrogate(COV_LOGPS, ratios, COV_ADVANTAGES, objective)[0].tolist() == pytest.approx(
        [1.0, 0.0, 0.0, -1.2]
    )


def test_kl_cov_penalizes_the_tokens_of_the_largest_covariances_and_does_not_clip():
    # the first covariance is -1.5 * -1.75 and the last 1.5 * 1.25; one token of four is selected
    logps, advantages = COV_LOGPS, doubles(-2.0, 0.0, 0.0, 1.0)
    old = logps - math.log(2.0)
    made = reference.kl_cov_surrogate(
        logps, old, doubles(2.0, 2.0, 2.0, 2.0), advantages, Objective(surrogate="kl_cov", kl_cov_coef=3.0)
    )
    assert made.tolist() == pytest.approx([4.0 + 3.0 * math.log(2.0), 0.0, 0.0, -2.0])


def test_sequence_ratio_is_the_geometric_mean():
    # ratios 2 and 8 in one sequence: geometric mean 4; a single ratio of 3 in another
    made = terms([math.log(2), math.log(8), math.log(3)], [0.0] * 3, sequences=[0, 0, 1], ratio="sequence")
    assert made.ratios.tolist() == pytest.approx([4.0, 4.0, 3.0])


@pytest.mark.parametrize(("ratio", "slopes"), [("sequence", [-4.0, -4.0]), ("sequence_token", [-2.0 * 4, 0.0])])
def test_gspo_token_has_the_ratio_of_the_sequence_and_the_gradient_of_the_token(ratio, slopes):
    # ratios 2 and 8, geometric mean 4; advantages 2 and 0: the loss is -4 * 2
    logps = doubles(math.log(2), math.log(8)).requires_grad_()
    objective = Objective(ratio=ratio, clip_high=9.0)
    sequences = torch.tensor([0, 0]), 1, objective
    losses, ratios, *_ = reference.surrogate_terms(logps, doubles(0.0, 0.0), doubles(2.0, 0.0), None, *sequences)
    assert ratios.tolist() == pytest.approx([4.0, 4.0])
    assert losses.tolist() == pytest.approx([-8.0, 0.0])
    # through the mean of two, each log-prob has half of -8
    assert torch.autograd.grad(losses.sum(), logps)[0].tolist() == pytest.approx(slopes)


@pytest.mark.parametrize(("kl", "penalty"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5)])
def test_kl_estimators(kl, penalty):
    made = terms([-1.0], [-1.0], ref=[-0.5], beta=0.1, advantages=[0.0], kl=kl)
    assert made.penalties.item() == pytest.approx(penalty)
    assert made.losses.item() == pytest.approx(0.1 * penalty)


@pytest.mark.parametrize(
    ("kl", "penalty", "slope"), [("k1", 300.0, 1.0), ("k2", 45_000.0, 300.0), ("k3", math.exp(-20.0) + 19, 0.0)]
)
def test_only_the_estimator_with_an_exp_is_clamped(kl, penalty, slope):
    logps, ref_logps = doubles(-1.0).requires_grad_(), doubles(-301.0)
    penalties = reference.kl_penalties(logps, ref_logps, Objective(kl=kl))
    assert penalties.item() == pytest.approx(penalty)
    assert torch.autograd.grad(penalties.sum(), logps)[0].item() == slope


def test_importance_weighted_kl_is_multiplied_by_the_ratio():
    made = terms([math.log(2.0)], [0.0], ref=[math.log(4.0)], beta=1.0, advantages=[0.0], kl_importance_weighted=True)
    assert made.losses.item() == pytest.approx(2.0 * (2.0 - math.log(2.0) - 1.0))


def test_rollout_weight_is_truncated_and_leaves_the_kl_alone():
    gaps = [math.log(1.5), math.log(4.0)]
    made = terms([0.0, 0.0], [0.0, 0.0], rollout=[-gap for gap in gaps], rollout_correction="token")
    assert made.losses.tolist() == pytest.approx([-1.5, -2.0])
    # over the sequence: 1.5 * 0.5 = 0.75
    made = terms(
        [0.0, 0.0], [0.0, 0.0], rollout=[-math.log(1.5), math.log(2.0)], rollout_correction="sequence",
        ref=[1.0, 1.0], beta=1.0,
    )  # fmt: skip
    assert made.losses.tolist() == pytest.approx([-0.75 + math.e - 2] * 2)


@pytest.mark.parametrize(
    ("correction", "gaps", "weights"),
    [
        ("token", [0.25, 1.5, 8.0], [0.5, 1.5, 5.0]),
        ("token_mask", [0.25, 1.5, 8.0], [0.0, 1.5, 0.0]),
        ("sequence_mask", [0.25, 1.5, 8.0], [3.0] * 3),
        ("sequence_mask", [0.25, 1.5, 1.0], [0.0] * 3),
        ("sequence", [0.25, 1.5, 1.0], [0.5] * 3),
        # geometric means 2 and 8
        ("geometric_mask", [0.5, 2.0, 8.0], [1.0] * 3),
        ("geometric_mask", [4.0, 16.0, 8.0], [0.0] * 3),
    ],
)
def test_rollout_weights_are_kept_within_their_bounds_or_masked(correction, gaps, weights):
    made = terms(
        [0.0] * 3, [0.0] * 3, rollout=[-math.log(gap) for gap in gaps], rollout_correction=correction, rollout_cap=5.0,
        rollout_floor=0.5,
    )  # fmt: skip
    assert made.losses.tolist() == pytest.approx([-weight for weight in weights])


@pytest.mark.parametrize(
    ("aggregation", "length", "expected"),
    [("sequence", None, (2.0 + 5.0) / 3), ("sum", None, 9.0 / 3), ("token", None, 9.0 / 3), ("constant", 10, 9.0 / 30)],
)
def test_aggregations_of_a_long_a_short_and_an_empty_sequence(aggregation, length, expected):
    # losses 1 and 3 in the first sequence, 5 in the second, none in the third
    losses = doubles(1.0, 3.0, 5.0)
    objective = Objective(aggregation=aggregation, max_completion_length=length)
    weights = reference.token_weights(torch.tensor([0, 0, 1]), 3, None, losses, objective)
    assert (weights * losses).sum().item() == pytest.approx(expected)


def test_the_whole_loss_of_two_short_sequences():
    # ratios 1.5 (clipped to 1.2) and 1, advantages 1 and -2; k3 of x = 0.5 at each token, beta 0.1
    logps = doubles(-1.0, -2.0).view(2, 1)
    loss = reference.expo_loss_from_logps(
        logps,
        torch.ones(2, 1, dtype=torch.bool),
        advantages=doubles(1.0, -2.0),
        old_logps=doubles(-1.0 - math.log(1.5), -2.0).view(2, 1),
        ref_logps=logps + 0.5,
        rollout_logps=None,
        beta=doubles(0.1)[0],
        objective=Objective(),
    )
    assert loss.item() == pytest.approx((-1.2 + 2.0) / 2 + 0.1 * (math.exp(0.5) - 1.5))


def test_akl_scale_and_curriculum_weight():
    assert reference.akl_scale(doubles(0.0, 1.0), "tanh").tolist() == pytest.approx([0.5, 0.8807970779778824])
    weights = reference.log_curriculum_weights(doubles(0.5, 0.0, 1.0), 0.5, 0.35).exp()
    assert weights.tolist() == pytest.approx([1.0, 0.36044778, 0.36044778])
    assert reference.smoothed_pass_rates(doubles(0.5), doubles(1.0), 0.9).item() == pytest.approx(0.55)
    # the momentum after 0, 1, 3 and 4 visits: a running mean up to 1 / (1 - 0.75) = 4 visits
    assert reference.counted_momentum(doubles(0, 1, 3, 4), 0.75).tolist() == pytest.approx([0, 0.5, 0.75, 0.75])
