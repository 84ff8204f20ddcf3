"""Engine and verifier on two ranks: each rank handles its shard, and both have all results."""

import pytest

from tests.trainer.two_ranks import run_on_two_ranks

pytestmark = pytest.mark.medium

TWO_RANKS = """
from expo.errors import EngineError, ExpoError, GoldError, StopRequested
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

Engine.score = Engine.describe_weights = lambda self, *_: self.generate([], None, None)
for problem, expected in [
    (EngineError("no server"), ((EngineError, "rank 1: no server"), (EngineError, "rank 1: no server"))),
    (OSError("pipe"), ((ExpoError, "rank 1 failed: OSError: pipe"), (OSError, "pipe"))),
]:
    Engine.problem = problem if ranks.rank == 1 else None
    for call in (
        lambda: engine.generate(requests, Sampling(1.0, 9)), lambda: engine.score([], [], 1.0), engine.describe_weights
    ):
        try:
            call()
            raise AssertionError("nothing was raised")
        except Exception as error:
            assert (type(error), str(error)) == expected[ranks.rank], (error, ranks.rank)
Engine.problem = StopRequested("SIGTERM") if ranks.is_rank0 else EngineError("no server")
try:
    engine.generate(requests, Sampling(1.0, 9))
    raise AssertionError("nothing was raised")
except EngineError as error:
    assert str(error) == "rank 1: no server"  # a run that was asked to stop could not be saved as sampled

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


def test_both_ranks_have_all_replies_and_verdicts_bit_for_bit(tmp_path):
    run_on_two_ranks(tmp_path, TWO_RANKS)
