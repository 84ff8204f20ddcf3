"""Throughput, hardware utilisation and memory of a training step.

Every number covers all ranks: tokens of all ranks over the seconds of the phase, and the peak memory of any rank.
"""

from collections.abc import Sequence
from typing import Any

import torch

from expo.config import RunConfig
from expo.errors import ConfigError
from expo.learner.batch import MiniBatch
from expo.learner.flops import ModelShape, peak_flops, training_flops
from expo.rewards.groups import GradedRollouts
from expo.runtime.distributed import Ranks
from expo.runtime.host import peak_resident_bytes
from expo.runtime.timer import PhaseTimer

GIB = 2**30


class Throughput:
    """Measures the steps of a run.

    Args:
        config: of the run.
        model_config: transformers' configuration of the model; the FLOPs of an unknown model type are not counted.
        ranks: the processes of the run.
    """

    def __init__(self, config: RunConfig, model_config: Any, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._peak = None
        if ranks.device.type == "cuda" and config.policy.dtype == "bfloat16":
            self._peak = peak_flops(torch.cuda.get_device_name(ranks.device))
        try:
            self._shape = ModelShape.from_config(model_config)
        except ConfigError:
            self._peak = None

    def row(
        self, graded: GradedRollouts, mini_batches: Sequence[MiniBatch], timer: PhaseTimer, rollout_seconds: float
    ) -> dict[str, float | None]:
        """The entries of metrics.jsonl about throughput and memory; `STEP_METRICS` describes them.

        `rollout_seconds`: that sampling took, which may have been while the policy learned.
        """
        num_tokens = sum(sum(mini_batch.lengths) for mini_batch in mini_batches)
        num_positions = sum(mini_batch.num_positions for mini_batch in mini_batches)
        peak, reserved = self._ranks.all_reduce_max(_memory())
        return {
            "rollout_tokens_per_second": graded.num_tokens / rollout_seconds,
            "training_tokens_per_second": num_tokens / timer.seconds_of("update"),
            "mfu": self._utilisation(mini_batches, timer.seconds_of("reference") + timer.seconds_of("update")),
            "padding_fraction": 1 - num_tokens / num_positions if num_positions else 0.0,
            "memory_peak_gib": peak / GIB,
            "memory_reserved_gib": reserved / GIB,
        }

    def _utilisation(self, mini_batches: Sequence[MiniBatch], seconds: float) -> float | None:
        if self._peak is None:
            return None
        policy = self._config.policy
        recomputes_old_logps = policy.old_logps == "recompute" and policy.updates_per_step > 1
        flops = sum(
            training_flops(
                self._shape,
                mini_batch.lengths,
                gradient_checkpointing=False,
                forward_only_passes=int(self._config.kl.beta > 0) + recomputes_old_logps,
                num_scored=mini_batch.num_trained_tokens,
                trains_base=policy.lora_rank == 0,
            )
            for mini_batch in mini_batches
        )
        return flops / (seconds * self._peak * self._ranks.size)


def _memory() -> tuple[float, float]:
    """Peak bytes so far, allocated and reserved on the GPU; without one, the process's peak resident set, twice."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()), float(torch.cuda.max_memory_reserved())
    resident = peak_resident_bytes()
    return resident, resident
