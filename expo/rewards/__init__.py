"""Rewards: the verifier and its workers, reward functions, and the groups that a step trains on."""

from expo.rewards.verifier import GoldError, Kind, Verdict, Verifier, check_answers, ungradable_answers

__all__ = ["GoldError", "Kind", "Verdict", "Verifier", "check_answers", "ungradable_answers"]
