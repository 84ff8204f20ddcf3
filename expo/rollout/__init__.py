"""Rollout engines: what samples replies from the policy."""

from expo.rollout.engine import EngineError, GenerationRequest, Reply, RolloutEngine, Sampling, end_ids, request_seed

__all__ = ["EngineError", "Reply", "GenerationRequest", "RolloutEngine", "Sampling", "end_ids", "request_seed"]
