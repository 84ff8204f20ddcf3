"""Rollout engines sample replies from the policy."""

from expo.rollout.engine import GenerationRequest, RolloutEngine, Sampling, StagingEngine, end_ids, request_seed

__all__ = ["GenerationRequest", "RolloutEngine", "Sampling", "StagingEngine", "end_ids", "request_seed"]
