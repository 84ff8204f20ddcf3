"""Replies and verdicts as tensors: every value is restored bit for bit."""

import math
import struct

import pytest
import torch

from expo.rollout.packing import (
    PackedReplies,
    all_gather_replies,
    all_gather_verdicts,
    broadcast_replies,
    pack_replies,
)
from expo.runtime.distributed import Ranks
from expo.types import Reply, Verdict

ONE_RANK = Ranks(torch.device("cpu"), 0, 1)
GROUPS = [
    [Reply([5, 16, 2], [-0.1, -1 / 3, -2.5e-8], False, "à\n"), Reply([7], [-20.0], True, "")],
    [],
    [Reply([2**31 - 1], [-math.inf], False, "\ud800 and \U0001f600"), Reply([9, 9], [-0.0, 5e-324], True, "99")],
]
VERDICTS = [
    Verdict("correct", "4"),
    Verdict("wrong", ""),
    Verdict("wrong", "12*12", is_unevaluated=True),
    Verdict("unparsed", None),
    Verdict("timeout", "9^{9^{9}} \ud800 é"),
]


def bits(groups):
    """The contents of the groups, with log-probs as bytes, so that NaN equals NaN and -0.0 differs from 0.0."""
    return [
        [(r.token_ids, [struct.pack("d", logp) for logp in r.logps], r.is_truncated, r.text) for r in group]
        for group in groups
    ]


@pytest.mark.parametrize("groups", [GROUPS, [], [[]], [[Reply([3], [math.nan], True, "x")]]])
def test_replies_are_restored(groups):
    packed = pack_replies(groups)
    assert bits(packed.unpack()) == bits(groups)
    assert bits(PackedReplies(*packed.tensors()).unpack()) == bits(groups)
    assert bits(PackedReplies.from_dict(packed.to_dict()).unpack()) == bits(groups)
    assert bits(broadcast_replies(packed, ONE_RANK)) == bits(groups)
    assert [bits(shard) for shard in all_gather_replies(groups, ONE_RANK)] == [bits(groups)]


def test_log_probs_keep_all_bits_of_a_python_float():
    (group,) = pack_replies([[Reply([1], [0.1], False, "")]]).unpack()
    assert group[0].logps == [0.1]
    assert isinstance(group[0].token_ids[0], int)


@pytest.mark.parametrize("verdicts", [VERDICTS, []])
def test_verdicts_are_restored(verdicts):
    assert all_gather_verdicts(verdicts, ONE_RANK) == [verdicts]
