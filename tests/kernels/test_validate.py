"""Invalid calls are refused before any arithmetic, and the error names the argument."""

import pytest
import torch

from expo_kernels import (
    Objective,
    _validate,
    debug_checks,
    expo_loss,
    expo_loss_from_logps,
    linear_expo_loss,
    linear_token_logps,
    token_logps,
)

B, T, H, V = 2, 3, 4, 5


def call(**changes):
    arguments = {
        "hidden": torch.randn(B, T, H),
        "weight": torch.randn(V, H),
        "completion_ids": torch.zeros(B, T, dtype=torch.int64),
        "completion_mask": torch.ones(B, T, dtype=torch.bool),
        "advantages": torch.ones(B),
        "beta": 0.0,
    }
    return linear_expo_loss(**(arguments | changes))


LOGPS = torch.zeros(B, T)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": torch.randn(B, T, H + 1)}, "hidden has 5 features and weight 4"),
        ({"hidden": torch.randn(B * T, H)}, r"expected 3 dimensions \[B, T, H\]"),
        ({"weight": torch.randn(0)}, r"weight has shape \[0\]"),
        ({"bias": torch.randn(V + 1)}, r"bias has shape \[6\]"),
        ({"completion_ids": torch.zeros(B, T + 1, dtype=torch.int64)}, r"row t predicts completion_ids\[:, t\]"),
        ({"completion_ids": torch.full((B, T), V)}, "completion_ids holds 5; expected 0 <= id < 5"),
        ({"completion_ids": torch.full((B, T), -100)}, "completion_ids holds -100"),
        ({"completion_mask": torch.ones(B, T + 1)}, "completion_mask has shape"),
        ({"completion_mask": torch.full((B, T), 0.5)}, "completion_mask holds values other than 0 and 1"),
        ({"advantages": torch.ones(B + 1)}, "advantages has shape"),
        ({"advantages": torch.ones(B, 1)}, "advantages has shape"),
        ({"advantages": None}, "exactly one"),
        ({"rewards": torch.ones(B), "group_size": 2}, "one or the other"),
        ({"advantages": None, "rewards": torch.ones(B)}, "exactly one"),
        ({"advantages": None, "rewards": torch.ones(2 * B), "group_size": 2}, r"expected \[B\] = \[2\]"),
        ({"old_logps": torch.zeros(B, T - 1)}, r"old_logps has shape \[2, 2\], but completion_mask needs \[2, 3\]"),
        ({"completion_lengths": torch.tensor([3])}, r"completion_lengths has shape \[1\]; expected \[2\]"),
        ({"completion_lengths": torch.tensor([3, 2])}, r"completion_lengths is \[3, 2\], but the mask has \[3, 3\]"),
        ({"beta": 0.1}, "ref_logps is None, but beta is 0.1"),
        ({"beta": torch.tensor(0.1)}, "ref_logps is None"),
        ({"beta": -0.1, "ref_logps": LOGPS}, "beta is -0.1"),
        ({"beta": float("nan"), "ref_logps": LOGPS}, "beta is nan"),
        ({"beta": torch.zeros(1), "ref_logps": LOGPS}, "beta has shape"),
        ({"entropy_bonus": -0.1}, "entropy_bonus is -0.1"),
        ({"entropy_bonus": torch.tensor(-0.1)}, "entropy_bonus is -0.1"),
        ({"normalizer": 0}, "normalizer is 0"),
        ({"normalizer": torch.tensor(-1.0)}, "normalizer is -1"),
        ({"rollout_logps": LOGPS}, "rollout_logps would be ignored"),
        ({"objective": Objective(rollout_correction="token")}, "needs rollout_logps"),
        ({"objective": Objective(kl_importance_weighted=True)}, "kl_importance_weighted has no effect"),
        ({"logits_budget_mb": 0.0}, "logits_budget_mb is 0.0"),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, r"expected 2 dimensions \[N, H\]"),
    ],
)
def test_a_bad_call_is_a_value_error(changes, named):
    with pytest.raises(ValueError, match=named):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": torch.zeros(B, T, H, dtype=torch.int64)}, "hidden has dtype torch.int64"),
        ({"weight": None}, "weight is a NoneType"),
        ({"completion_ids": torch.zeros(B, T)}, "completion_ids has dtype torch.float32"),
        ({"completion_mask": None}, "completion_mask is a NoneType"),
        ({"advantages": [1.0, 1.0]}, "advantages is a list"),
        ({"old_logps": torch.zeros(B, T, dtype=torch.int64)}, "old_logps has dtype"),
        ({"beta": "0.1"}, "beta is '0.1'"),
        ({"objective": {"clip_low": 0.1}}, "objective is a dict"),
    ],
)
def test_a_wrong_type_is_a_type_error(changes, named):
    with pytest.raises(TypeError, match=named):
        call(**changes)


@pytest.mark.parametrize(
    "cu_seqlens", [torch.tensor([0, 3]), torch.tensor([1, 6]), torch.tensor([0, 4, 2, 6]), torch.tensor([[0, 6]])]
)
def test_cu_seqlens_must_rise_from_zero_to_the_number_of_tokens(cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens"):
        expo_loss_from_logps(torch.zeros(6), torch.ones(6), advantages=torch.ones(6), beta=0.0, cu_seqlens=cu_seqlens)


def test_log_probs_refuse_what_the_losses_refuse():
    hidden, weight, ids = torch.randn(B, T, H), torch.randn(V, H), torch.zeros(B, T, dtype=torch.int64)
    with pytest.raises(ValueError, match="completion_ids holds 5"):
        linear_token_logps(hidden, weight, ids + V)
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logps(hidden, ids, temperature=0)
    with pytest.raises(ValueError, match="logits has shape"):
        token_logps(torch.zeros(V), torch.tensor(0))
    with pytest.raises(ValueError, match="mask has shape"):
        token_logps(hidden, ids, mask=torch.ones(B))
    lengths, mask = torch.tensor([3, 2]), torch.ones(B, T, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"completion_lengths is \[3, 2\], but the mask has \[3, 3\]"):
        linear_token_logps(hidden, weight, ids, mask=mask, completion_lengths=lengths)
    with pytest.raises(ValueError, match=r"completion_lengths is \[5\], but the mask has \[6\]"):
        linear_token_logps(hidden.view(-1, H), weight, ids.view(-1), mask=mask.view(-1), completion_lengths=lengths)
    with pytest.raises(ValueError, match="completion_lengths would be ignored"):
        linear_token_logps(hidden, weight, ids, completion_lengths=lengths)
    with pytest.raises(ValueError, match="completion_lengths is on meta"):
        linear_token_logps(hidden, weight, ids, mask=mask, completion_lengths=lengths.to("meta"))
    with pytest.raises(ValueError, match="logits has shape"):
        expo_loss(torch.zeros(6, V), ids.view(-1), torch.ones(6), advantages=torch.ones(6), beta=0.0)


def test_beta_zero_as_a_tensor_needs_no_reference():
    assert call(beta=torch.tensor(0.0)).metrics["kl"] == 0


def test_debug_checks_is_a_switch_and_a_block():
    elsewhere = torch.empty(1, device="meta")
    before = _validate.may_read(elsewhere)
    with debug_checks(True):
        assert _validate.may_read(elsewhere)
        with debug_checks(False):
            assert not _validate.may_read(elsewhere)
            assert _validate.may_read(torch.empty(1))
        assert _validate.may_read(elsewhere)
    assert _validate.may_read(elsewhere) == before
