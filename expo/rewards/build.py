"""Builds the verifier that the config section `reward` names."""

import importlib.util

from expo.config import RewardSection
from expo.errors import ConfigError
from expo.rewards.compose import load_function
from expo.rewards.methods import Reading
from expo.rewards.verifier import Verifier


def check_verifier(name: str) -> None:
    """Checks that `reward.verifier` can be imported. Raises: ConfigError."""
    if name == "reasoning-gym" and importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("reward.verifier = reasoning-gym needs reasoning-gym; install expo-rl[reasoning]")
    if ":" in name:
        load_function("reward.verifier", name)


def build_verifier(section: RewardSection, some_prompt: str) -> Verifier:
    """The verifier of a run or an evaluation.

    Args:
        section: its settings.
        some_prompt: the text of a prompt; where a chat template ends it with an opening tag, replies start inside their
            thinking.
    """
    tags = tuple(section.think_tags.items())
    is_thinking = any(some_prompt.rstrip().endswith(opening) for opening, _ in tags)
    return Verifier(
        section.workers,
        section.timeout_s,
        method=section.verifier,
        accept_unevaluated=section.unevaluated == "accept",
        reading=Reading(tags, is_thinking),
    )
