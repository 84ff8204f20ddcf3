"""Rollout engines: what samples replies from the policy."""

from expo.rollout.engine import EngineError, Reply, Request, RolloutEngine, Sampling, end_ids, request_seed

__all__ = ["EngineError", "Reply", "Request", "RolloutEngine", "Sampling", "end_ids", "request_seed"]
