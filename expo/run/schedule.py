"""When a run ends, and after which steps it evaluates and saves."""

from expo.config import RunSection
from expo.run.checkpoint import Position


def is_over(section: RunSection, position: Position) -> bool:
    """Whether the run has taken all its steps, or sampled run.reply_tokens tokens."""
    is_budget_spent = section.reply_tokens is not None and position.reply_tokens >= section.reply_tokens
    return position.step >= section.steps or is_budget_spent


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; 0 means never."""
    return every > 0 and step % every == 0
