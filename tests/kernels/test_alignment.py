"""Tensors whose positions do not match: the error says which row predicts which id, and its advice is right."""

import re

import pytest
import torch

from expo_kernels import (
    LinearExpoLoss,
    Objective,
    debug_checks,
    expo_loss,
    expo_loss_from_logps,
    linear_expo_loss,
    linear_token_logps,
    token_logps,
)
from expo_kernels.integrations.liger import LigerFusedLinearGRPOLoss
from expo_kernels.integrations.verl import FusedLinearForPPO, policy_loss

B, P, T, H, V = 4, 3, 6, 5, 11
torch.manual_seed(0)
ALL_HIDDEN = torch.randn(B, P + T, H)  # of prompts and completions
ALL_IDS = torch.randint(V, (B, P + T))
WEIGHT = torch.randn(V, H)
ALL_LOGPS = torch.randn(B, P + T - 1)  # of every token but the first
OPTIONS = {"beta": 0.0, "advantages": torch.ones(B)}
RIGHT = {
    "hidden": ALL_HIDDEN[:, P - 1 : -1],
    "completion_ids": ALL_IDS[:, P:],
    "completion_mask": torch.ones(B, T),
    "advantages": torch.arange(B).float(),
}


def call(**changes):
    return linear_expo_loss(weight=WEIGHT, **{"beta": 0.0} | RIGHT | changes)


def advice(error):
    """The expression that a message recommends."""
    message = str(error.value)
    assert "\n" not in message
    assert "pad " not in message
    return re.search(r"\buse (.*?)(:(?= )|, the| \(|$|, if| if)", message).group(1)


SHIFTED = {
    "one row more": {"hidden": ALL_HIDDEN[:, P - 1 :]},
    "with the prompt": {"hidden": ALL_HIDDEN},
    "rows in the first dimension": {"hidden": RIGHT["hidden"].transpose(0, 1)},
    "flat ids": {"completion_ids": RIGHT["completion_ids"].flatten()},
    "mask with the prompt": {"completion_mask": torch.ones(B, P + T)},
    "mask transposed": {"completion_mask": torch.ones(T, B)},
    "flat mask": {"completion_mask": torch.ones(B * T)},
    "mask with a last dimension": {"completion_mask": torch.ones(B, T, 1)},
    "log-probs with the prompt": {"old_logps": ALL_LOGPS},
    "advantages with the prompt": {"advantages": torch.arange(B).float()[:, None].expand(B, P + T)},
    "advantages in a column": {"advantages": RIGHT["advantages"][:, None]},
    "advantages per question": {"advantages": RIGHT["advantages"].view(2, 2)},
}


@pytest.mark.parametrize("changes", SHIFTED.values(), ids=SHIFTED)
def test_the_advice_works(changes):
    with pytest.raises(ValueError, match="has shape") as error:
        call(**changes)
    (name,) = changes
    mended = eval(advice(error), {"hidden": ALL_HIDDEN, **changes})
    expected = call(**({name: ALL_LOGPS[:, P - 1 :]} if "logps" in name else {}))
    torch.testing.assert_close(call(**{name: mended}).loss, expected.loss)


def test_one_row_more_is_what_a_model_gives():
    with pytest.raises(ValueError, match=r"\[4, 7, 5\] and completion_ids \[4, 6\]; row t predicts") as error:
        call(hidden=ALL_HIDDEN[:, P - 1 :])
    assert "row t predicts completion_ids[:, t]" in str(error.value)
    assert advice(error) == "hidden[:, :-1]"


def test_ids_with_the_tokens_before_are_cut_at_their_start():
    with pytest.raises(ValueError, match="row t predicts") as error:
        call(completion_ids=ALL_IDS)
    assert torch.equal(eval(advice(error), {"completion_ids": ALL_IDS}), RIGHT["completion_ids"])


def test_advantages_of_questions_are_repeated():
    with pytest.raises(ValueError, match="of questions") as error:
        call(advantages=torch.tensor([1.0, 2.0]))
    assert advice(error) == "advantages.repeat_interleave(2)"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": ALL_HIDDEN[:2, P - 1 : -1]}, "same sequences: hidden has 2 and completion_ids 4"),
        ({"completion_mask": torch.ones(B, T - 1)}, "1 tokens of each sequence have none"),
        ({"completion_mask": torch.ones(2, T)}, "give the 4 sequences of completion_ids in the same order"),
        ({"completion_mask": torch.ones(T + 1)}, "give it 2 dimensions"),
        ({"completion_mask": torch.tensor(1.0)}, "give it 2 dimensions"),
        ({"old_logps": torch.zeros(B, T - 2)}, "2 tokens of each sequence have none"),
        ({"ref_logps": torch.zeros(B, T, V)}, "ref_logps has shape .* give it 2 dimensions"),
        ({"advantages": torch.tensor(1.0)}, "advantages has shape"),
        ({"completion_ids": torch.tensor(3)}, r"give completion_ids of shape \[4, 6\]"),
    ],
)
def test_what_no_slice_can_mend_is_said_without_one(changes, named):
    with pytest.raises(ValueError, match=named) as error:
        call(**changes)
    assert "use " not in str(error.value)


def test_packed_rows_are_named():
    packed = {"cu_seqlens": torch.tensor([0, 2, 6]), "beta": 0.0, "advantages": torch.ones(2)}
    ids, mask = torch.zeros(6, dtype=torch.int64), torch.ones(6)
    with pytest.raises(ValueError, match=r"row n predicts completion_ids\[n\].*never its last row"):
        linear_expo_loss(torch.randn(8, H), WEIGHT, ids, mask, **packed)
    with pytest.raises(ValueError, match=r"2 tokens have none"):
        linear_expo_loss(torch.randn(6, H), WEIGHT, ids, torch.ones(4), **packed)
    with pytest.raises(ValueError, match=r"leave out those of other tokens"):
        expo_loss_from_logps(torch.randn(6), torch.ones(8), **packed)


LONG, IDS, MASK = ALL_HIDDEN[:, P - 1 :], RIGHT["completion_ids"], RIGHT["completion_mask"]
LONG_LOGITS = LONG @ WEIGHT.T
CONFIG = type("Config", (), {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio_c": 3.0})()
CONFIG.global_batch_info = {}


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda: expo_loss(LONG_LOGITS, IDS, MASK, **OPTIONS), r"use logits\[:, :-1\]"),
        (lambda: token_logps(LONG_LOGITS, IDS), r"use logits\[:, :-1\]"),
        (lambda: linear_token_logps(LONG, WEIGHT, IDS), r"use hidden\[:, :-1\]"),
        (lambda: linear_token_logps(LONG[:, :-1], WEIGHT, IDS, mask=torch.ones(B, P + T)), r"use mask\[:, -6:\]"),
        (lambda: LinearExpoLoss(Objective())(LONG, WEIGHT, IDS, MASK, **OPTIONS), r"use hidden\[:, :-1\]"),
        (lambda: expo_loss_from_logps(ALL_LOGPS[:, P - 1 :], torch.ones(B, P + T), **OPTIONS), "completion_mask"),
        (lambda: LigerFusedLinearGRPOLoss(beta=0.0)(LONG, WEIGHT, IDS, MASK, torch.ones(B)), r"use _input\[:, :-1\]"),
        (
            lambda: LigerFusedLinearGRPOLoss(beta=0.0)(LONG[:, :-1], WEIGHT, IDS, torch.ones(B, P + T), torch.ones(B)),
            r"use attention_mask\[:, -6:\]",
        ),
        (
            lambda: LigerFusedLinearGRPOLoss(beta=0.1)(
                LONG[:, :-1], WEIGHT, IDS, MASK, torch.ones(B), ref_input=LONG, ref_weight=WEIGHT
            ),
            r"use ref_input\[:, :-1\]",
        ),
        (
            lambda: LigerFusedLinearGRPOLoss(beta=0.0)(
                LONG[:, :-1], WEIGHT, IDS, MASK, torch.ones(B), old_per_token_logps=ALL_LOGPS
            ),
            r"use old_per_token_logps\[:, -6:\]",
        ),
        (lambda: FusedLinearForPPO()(LONG, WEIGHT, IDS), r"use hidden_states\[:, :-1\]"),
        (
            lambda: policy_loss("expo", ALL_LOGPS, ALL_LOGPS[:, P - 1 :], MASK, MASK, config=CONFIG),
            r"use old_log_prob\[:, -6:\]",
        ),
        (
            lambda: policy_loss("expo", MASK, MASK, MASK, torch.ones(B, P + T), config=CONFIG),
            r"use response_mask\[:, -6:\]",
        ),
    ],
)
def test_every_public_function_names_its_own_arguments(function, named):
    with pytest.raises(ValueError, match=named):
        function()


def test_shapes_are_compared_without_reading_a_tensor():
    with debug_checks(False), pytest.raises(ValueError, match=r"use hidden\[:, :-1\]"):
        linear_token_logps(LONG.to("meta"), WEIGHT.to("meta"), IDS.to("meta"))
