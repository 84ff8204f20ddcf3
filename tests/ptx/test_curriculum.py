"""The curriculum's kernels, as PTX, against the PyTorch path and an independent Philox."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)

from expo_kernels import CurriculumTable
from tests.ptx.checks import IN_EVERY_ORDER, no_errors

pytestmark = pytest.mark.medium  # compiles and emulates kernels

SETTINGS = {"std": 0.2, "momentum": 0.6}


def philox(seed: int, counter: np.ndarray) -> list[np.ndarray]:
    """Philox 4x32-10 (Salmon et al. 2011) of [n] counters: four arrays of 32-bit numbers."""
    low = np.uint64(0xFFFFFFFF)
    words = [counter.astype(np.uint64), *(np.zeros(counter.size, np.uint64) for _ in range(3))]
    keys = [np.uint64(seed) & low, np.uint64(seed) >> np.uint64(32)]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        high = [product >> np.uint64(32) for product in (first, second)]
        words = [high[1] ^ words[1] ^ keys[0], second & low, high[0] ^ words[3] ^ keys[1], first & low]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return words


@pytest.mark.parametrize("estimate", ["ema", "counted"])
@pytest.mark.parametrize(("num_questions", "count"), [(1, 1), (5, 600), (3000, 2500)])
def test_updates_agree_with_pytorch(num_questions, count, estimate):
    steps = [(torch.randint(0, num_questions, (count,)), torch.rand(count)) for _ in range(2)]
    plain, table = (CurriculumTable(num_questions, estimate=estimate, **SETTINGS) for _ in range(2))
    for ids, rates in steps:
        plain.update(ids, rates)
        with no_errors(schedules=IN_EVERY_ORDER):
            table.update(ids, rates)
    assert torch.equal(table.visits, plain.visits)
    assert torch.allclose(table.pass_rates, plain.pass_rates, rtol=2e-7)
    assert torch.allclose(table.weights, plain.weights, rtol=2e-6)


def test_keys_are_log_weights_plus_gumbel_noise_of_philox():
    from expo_kernels._triton import curriculum

    seed = 3 * 10**18 + 7
    log_weights = -torch.rand(1500, generator=torch.Generator().manual_seed(1))
    with no_errors(schedules=IN_EVERY_ORDER):
        keys = curriculum.launch_race(log_weights, torch.tensor([seed]))
    high, low, _, _ = philox(seed, np.arange(1500))
    bits = (high >> np.uint64(5)).astype(np.float64) * 2.0**26 + (low >> np.uint64(6)).astype(np.float64)
    truth = log_weights.double().numpy() - np.log(-np.log((bits + 0.5) * 2.0**-53))
    np.testing.assert_allclose(keys.numpy(), truth, rtol=0, atol=1e-12)


def test_a_draw_without_replacement_has_no_question_twice():
    table = CurriculumTable(300, **SETTINGS)
    with no_errors(schedules=IN_EVERY_ORDER):
        drawn = table.sample(50, generator=torch.Generator().manual_seed(7))
    assert drawn.unique().numel() == 50
