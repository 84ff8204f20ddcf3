"""Rollout engines sample replies from the policy."""

from expo.rollout.engine import (
    AdapterEngine,
    GenerationRequest,
    RolloutEngine,
    Sampling,
    StagingEngine,
    end_ids,
    request_seed,
)

__all__ = [
    "AdapterEngine",
    "GenerationRequest",
    "RolloutEngine",
    "Sampling",
    "StagingEngine",
    "end_ids",
    "request_seed",
]
