"""EngineConfig: what a rollout engine reads of a configuration."""

from typing import Protocol

from expo.config.general import ModelSection, RunSection
from expo.config.policy import PolicySection
from expo.config.sampling import RolloutSection, VllmSection


class EngineConfig(Protocol):
    """The sections from which a rollout engine is built; a RunConfig and an EvalConfig have them."""

    @property
    def run(self) -> RunSection:
        """Threads and device."""

    @property
    def model(self) -> ModelSection:
        """The model that vLLM loads."""

    @property
    def rollout(self) -> RolloutSection:
        """The engine and its batch size."""

    @property
    def vllm(self) -> VllmSection:
        """Settings of vLLM."""

    @property
    def policy(self) -> PolicySection:
        """The dtype of the policy."""

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence: the longest prompt with the longest reply."""
