"""Rewards: the verifier and its worker processes, reward functions, and graded groups of replies."""

from expo.errors import GoldError
from expo.rewards.verifier import Verifier, check_answers, ungradable_answers
from expo.types import Verdict

__all__ = ["GoldError", "Verdict", "Verifier", "check_answers", "ungradable_answers"]
