"""The mismatch metrics: numbers worked by hand, and equal ones for every split of a step."""

import math

import pytest
import torch

from expo.learner.mismatch import summary
from tests.trainer.learner.test_policy import BETA, make, samples


def test_metrics_worked_by_hand():
    # weights 1, 2, 4 and 1/4
    found = summary(torch.tensor([0.0, math.log(2), math.log(4), -math.log(4)]))
    assert found == pytest.approx(
        {
            "rollout_logp_difference_mean": 5 * math.log(2) / 4,
            "rollout_logp_difference_max": 2 * math.log(2),
            "rollout_ratio_median": 1.0,
            "rollout_ratio_p99": 4.0,
            "rollout_effective_sample_fraction": 7.25**2 / (4 * (1 + 4 + 16 + 1 / 16)),
        }
    )


def test_a_percentile_is_the_smallest_value_with_that_share_at_or_below_it():
    found = summary(torch.arange(200).div(200).log()[torch.randperm(200)])
    assert found["rollout_ratio_median"] == pytest.approx(99 / 200)
    assert found["rollout_ratio_p99"] == pytest.approx(197 / 200)


def test_equal_logps_have_weight_one_and_a_full_effective_sample_size():
    found = summary(torch.zeros(7))
    assert list(found.values()) == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_without_a_token_the_metrics_are_nan():
    assert all(math.isnan(value) for value in summary(torch.empty(0)).values())


def metrics_of(**overrides):
    policy = make(**overrides)
    for mini_batch in policy.prepare(samples(policy)):
        policy.update(mini_batch, BETA)
    return policy.mismatch()


@pytest.mark.parametrize(
    "split",
    [{"micro_batch_tokens": 64}, {"updates_per_step": 4}, {"packing": True}, {"old_logps": "rollout"}],
)
def test_the_split_of_a_step_does_not_change_the_metrics(split):
    expected = metrics_of(optimizer__lr=1e-2)
    assert expected["rollout_logp_difference_max"] > 0.3
    found = metrics_of(optimizer__lr=1e-2, **{f"policy__{name}": value for name, value in split.items()})
    assert found == pytest.approx(expected, rel=1e-4)


def test_each_step_has_its_own_metrics():
    policy = make()
    found = []
    for count in (12, 3):
        (mini_batch,) = policy.prepare(samples(policy, count))
        assert math.isnan(policy.mismatch()["rollout_ratio_median"])
        policy.update(mini_batch, BETA)
        found.append(policy.mismatch())
    assert found[0] == metrics_of()
    assert found[1] != found[0]


def test_with_rollout_logps_as_old_logps_only_the_first_update_counts():
    policy = make(policy__old_logps="rollout", policy__updates_per_step=2, optimizer__lr=1e-2)
    first, second = policy.prepare(samples(policy))
    policy.update(first, BETA)
    expected = policy.mismatch()
    policy.update(second, BETA)
    assert policy.mismatch() == expected
