import functools

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from expo_kernels import akl_beta, debug_checks, group_advantages


def test_each_group_has_its_own_mean():
    rewards = torch.tensor([1.0, 0.0, 3.0, 5.0])
    torch.testing.assert_close(group_advantages(rewards, 2, eps=0.0), torch.tensor([1.0, -1.0, -1.0, 1.0]))
    torch.testing.assert_close(group_advantages(rewards, 2, scale="none"), torch.tensor([0.5, -0.5, -1.0, 1.0]))
    batch_std = (sum((r - 2.25) ** 2 for r in (1.0, 0.0, 3.0, 5.0)) / 4) ** 0.5
    expected = torch.tensor([0.5, -0.5, -1.0, 1.0]) / batch_std
    torch.testing.assert_close(group_advantages(rewards, 2, scale="batch", eps=0.0), expected)


@given(
    value=st.floats(-1e6, 1e6, width=32),
    group_size=st.integers(2, 7),
    scale=st.sampled_from(["group", "batch", "none"]),
)
def test_a_constant_group_is_exactly_zero(value, group_size, scale):
    rewards = torch.cat([torch.full((group_size,), value), torch.arange(group_size).float()])
    assert group_advantages(rewards, group_size, scale=scale)[:group_size].eq(0).all()


def test_integer_rewards_and_an_empty_batch():
    assert group_advantages(torch.tensor([1, 0]), 2, eps=0.0).tolist() == [1.0, -1.0]
    assert group_advantages(torch.zeros(0), 4).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "group_size", "options", "named"),
    [
        ([1.0, 0.0, 1.0], 2, {}, "group_size is 2, which does not divide the batch of 3"),
        ([1.0, float("nan")], 2, {}, "rewards holds 1 non-finite"),
        ([1.0, float("inf")], 2, {}, "rewards holds 1 non-finite"),
        ([1.0, 0.0], 0, {}, "group_size is 0"),
        ([1.0, 0.0], 1, {}, "group_size is 1; expected a whole number >= 2"),
        ([], 1, {"scale": "none"}, "group_size is 1"),
        (1.0, 2, {}, r"rewards has shape \[\]; expected \[B\]"),
        ([1.0, 0.0], 2, {"scale": "std"}, "scale is 'std'"),
        ([1.0, 0.0], 2, {"eps": -1.0}, "eps"),
        ([[1.0, 0.0]], 2, {}, r"rewards has shape .*; use rewards.flatten\(\), \[2\]"),
    ],
)
def test_bad_rewards_are_refused(rewards, group_size, options, named):
    with pytest.raises(ValueError, match=named):
        group_advantages(torch.tensor(rewards), group_size, **options)


def test_beta_rises_with_accuracy_from_half_to_0_88():
    assert akl_beta(torch.zeros(4), 1.0).item() == 0.5
    assert akl_beta(torch.ones(4), 1.0).item() == pytest.approx(0.88080, abs=1e-5)
    betas = [akl_beta(torch.tensor(x)).item() for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert betas == sorted(set(betas))
    assert betas[0] == pytest.approx(0.01)


def test_rho_constant_is_grpo_and_a_callable_is_used():
    accuracies = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert akl_beta(accuracies, 0.04, rho="constant").item() == pytest.approx(0.04)
    assert akl_beta(accuracies, torch.tensor(0.04), rho=lambda x: 1 + x).item() == pytest.approx(0.05)


@pytest.mark.parametrize(
    "accuracies",
    [torch.tensor([True, False]), torch.tensor([1, 0]), torch.tensor([1, 0], dtype=torch.uint8), torch.tensor(0.5),
     torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)],
    ids=lambda value: str(value.dtype),
)  # fmt: skip
def test_verdicts_of_every_type_are_accuracies(accuracies):
    assert torch.equal(akl_beta(accuracies), akl_beta(torch.tensor([0.5])))


def test_complex_numbers_are_refused():
    with pytest.raises(TypeError, match=r"rewards has dtype torch.complex64; expected real numbers"):
        group_advantages(torch.zeros(2, dtype=torch.complex64), 2)
    with pytest.raises(TypeError, match=r"accuracies has dtype torch.complex64"):
        akl_beta(torch.zeros(2, dtype=torch.complex64))


def test_a_constant_beta_reads_no_accuracies():
    for value in (-9.0, 9.0, float("nan")):
        assert akl_beta(torch.tensor([value]), 0.04, rho="constant").item() == pytest.approx(0.04)


def test_a_beta_of_zero_still_needs_accuracies():
    with pytest.raises(ValueError, match=r"accuracies ranges over \[-9, -9\]"):
        akl_beta(torch.tensor([-9.0]), 0.0)


def test_values_on_another_device_are_read_only_if_asked():
    with debug_checks(False):
        assert akl_beta(torch.full((2,), 9.0, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("accuracies", "options", "named"),
    [
        (torch.zeros(0), {}, "accuracies is empty"),
        (torch.tensor([float("nan")]), {}, "accuracies holds 1 non-finite"),
        (torch.tensor([0.5, 9.0]), {}, r"accuracies ranges over \[0.5, 9\]; expected values in \[0, 1\]"),
        (torch.tensor([-1, 1]), {}, r"accuracies ranges over \[-1, 1\]"),
        (torch.tensor(1.5), {"rho": lambda x: x}, r"accuracies ranges over \[1.5, 1.5\]"),
        (torch.tensor([1.001]), {"beta": torch.tensor(0.02)}, r"accuracies ranges over"),
        (torch.ones(1), {"beta": -0.1}, "beta is -0.1"),
        (torch.ones(1), {"rho": "linear"}, "rho is 'linear'"),
    ],
)
def test_bad_accuracies_are_refused(accuracies, options, named):
    with pytest.raises(ValueError, match=named):
        akl_beta(accuracies, **options)


def _rank_beta(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        # one rank has three rollouts and one has one: the mean is over all four
        share = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0])][rank]
        results[rank] = akl_beta(share, 1.0, rho=lambda x: x, process_group=torch.distributed.group.WORLD).item()
        with pytest.raises(ValueError, match="accuracies is empty on every rank"):
            akl_beta(torch.zeros(0), process_group=torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.medium
def test_accuracy_is_the_mean_over_all_ranks(tmp_path):
    results = mp.get_context("spawn").Manager().dict()
    run = functools.partial(mp.spawn, args=(tmp_path / "store", results), nprocs=2)
    run(_rank_beta)
    assert dict(results) == {0: 0.5, 1: 0.5}
