"""How fast a step went and what memory it took.

Every number is of the whole run: tokens of all ranks over seconds of the phase, the largest memory of any rank.
"""

import resource
import sys
from collections.abc import Sequence

import torch

from expo.graded import Graded
from expo.metrics import PhaseTimer
from expo.policy import MiniBatch
from expo.ranks import Ranks

GIB = 2**30


def throughput(
    graded: Graded, mini_batches: Sequence[MiniBatch], ranks: Ranks, timer: PhaseTimer
) -> dict[str, float | None]:
    """Entries of metrics.jsonl that are about speed and memory, as `STEP_METRICS` names them."""
    trained = sum(sum(mini_batch.lengths) for mini_batch in mini_batches)
    positions = sum(mini_batch.num_positions for mini_batch in mini_batches)
    peak, reserved = ranks.maximum(_memory())
    return {
        "rollout_tokens_per_second": graded.num_tokens / timer.seconds_of("rollout"),
        "training_tokens_per_second": trained / timer.seconds_of("update"),
        "padding_fraction": 1 - trained / positions,
        "memory_peak_gib": peak / GIB,
        "memory_reserved_gib": reserved / GIB,
    }


def _memory() -> tuple[float, float]:
    """Bytes: most held and most reserved so far, of the GPU; without one, the process's largest resident set, twice."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()), float(torch.cuda.max_memory_reserved())
    resident = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    resident *= 1 if sys.platform == "darwin" else 1024
    return resident, resident
