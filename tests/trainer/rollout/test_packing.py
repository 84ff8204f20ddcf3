"""Replies and verdicts as tensors: every value comes back as it was, on one rank and on two."""

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
from tests.trainer.two_ranks import run_on_two_ranks

ONE_RANK = Ranks(torch.device("cpu"), 0, 1)
GROUPS = [
    [Reply([5, 16, 2], [-0.1, -1 / 3, -2.5e-8], False, "à\n"), Reply([7], [-20.0], True, "")],
    [],
    [Reply([2**31 - 1], [-math.inf], False, "\ud800 and \U0001f600"), Reply([9, 9], [-0.0, 5e-324], True, "99")],
]
VERDICTS = [
    Verdict("correct", "4"),
    Verdict("wrong", ""),
    Verdict("unparsed", None),
    Verdict("timeout", "9^{9^{9}} \ud800 é"),
]


def bits(groups):
    """Everything that the groups hold, the log-probs as bytes, which NaN and -0.0 compare equal by."""
    return [
        [(r.token_ids, [struct.pack("d", logp) for logp in r.logps], r.is_truncated, r.text) for r in group]
        for group in groups
    ]


@pytest.mark.parametrize("groups", [GROUPS, [], [[]], [[Reply([3], [math.nan], True, "x")]]])
def test_replies_come_back_as_they_were(groups):
    packed = pack_replies(groups)
    assert bits(packed.unpack()) == bits(groups)
    assert bits(PackedReplies(*packed.tensors()).unpack()) == bits(groups)
    assert bits(PackedReplies.from_dict(packed.to_dict()).unpack()) == bits(groups)
    assert bits(broadcast_replies(packed, ONE_RANK)) == bits(groups)
    assert [bits(shard) for shard in all_gather_replies(groups, ONE_RANK)] == [bits(groups)]


def test_a_float_is_not_rounded_to_float32():
    (group,) = pack_replies([[Reply([1], [0.1], False, "")]]).unpack()
    assert group[0].logps == [0.1]
    assert isinstance(group[0].token_ids[0], int)


@pytest.mark.parametrize("verdicts", [VERDICTS, []])
def test_verdicts_come_back_as_they_were(verdicts):
    assert all_gather_verdicts(verdicts, ONE_RANK) == [verdicts]


TWO_RANKS = """
from expo.errors import GoldError, StopRequested
from expo.rollout import GenerationRequest, Sampling
from expo.rollout.data_parallel import DataParallelEngine, DataParallelVerifier
from expo.rollout.packing import broadcast_replies, pack_replies
from expo.runtime.distributed import join_ranks, leave_ranks
from expo.runtime.signals import StopSwitch
from expo.types import Reply, Verdict
from tests.trainer.rollout.test_packing import GROUPS, VERDICTS, bits

ranks = join_ranks("cpu", 60)

class Engine:
    problem = None
    def generate(self, requests, sampling, on_progress):
        if self.problem is not None:
            raise self.problem
        return [[reply_of(seed) for seed in request.seeds] for request in requests]

def reply_of(seed):
    return Reply(list(range(seed + 1)), [-1 / (3 + token) for token in range(seed + 1)], seed % 2 == 0, "é" * seed)

requests = [GenerationRequest([1], list(range(number, 2 * number))) for number in range(5)]
engine = DataParallelEngine(Engine(), ranks, StopSwitch())
expected = [[reply_of(seed) for seed in request.seeds] for request in requests]
assert bits(engine.generate(requests, Sampling(1.0, 9))) == bits(expected)
assert engine.generate([], Sampling(1.0, 9)) == []
together = DataParallelEngine(Engine(), ranks, StopSwitch(), width=2)
assert bits(together.generate(requests, Sampling(1.0, 9))) == bits(expected)
assert bits(broadcast_replies(pack_replies(GROUPS) if ranks.is_rank0 else None, ranks)) == bits(GROUPS)
if not ranks.is_rank0:
    Engine.problem = StopRequested("SIGTERM")
try:
    engine.generate(requests, Sampling(1.0, 9))
    raise AssertionError("it was not stopped")
except StopRequested as reason:
    assert str(reason) == "SIGTERM"

class Verifier:
    def grade(self, replies, answers):
        if "bad" in answers:
            raise GoldError("a bad gold answer")
        return [VERDICTS[int(reply)] for reply in replies]

verifier = DataParallelVerifier(Verifier(), ranks)
for numbers in ([0, 1, 2, 3, 3], [2], []):
    assert verifier.grade([str(n) for n in numbers], ["gold"] * len(numbers)) == [VERDICTS[n] for n in numbers]
try:
    verifier.grade(["0", "0"], ["gold", "bad"])
    raise AssertionError("nothing was raised")
except GoldError as error:
    assert str(error) == "a bad gold answer"
leave_ranks()
"""


def test_two_ranks_have_all_replies_and_verdicts_bit_for_bit(tmp_path):
    run_on_two_ranks(tmp_path, TWO_RANKS)
