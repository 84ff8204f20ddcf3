"""Rewards: the verifier and its workers, reward functions, and the groups that a step trains on."""

from expo.errors import GoldError
from expo.rewards.verifier import Verifier, check_answers, ungradable_answers
from expo.types import Verdict

__all__ = ["GoldError", "Verdict", "Verifier", "check_answers", "ungradable_answers"]
