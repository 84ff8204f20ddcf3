"""Questions made by reasoning-gym, which needs no download: "reasoning-gym:chain_sum?level=1&size=500&seed=0".

Only families whose answer is one integer, which the verifier grades as their own scorers do. The others have answers
that the verifier would judge wrongly: countdown asks for an expression, of which any with the right value would pass.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from expo.data.questions import Row
from expo.errors import ConfigError

PREFIX = "reasoning-gym:"
FAMILIES = (
    "aiw", "basic_arithmetic", "chain_sum", "count_bits", "count_primes", "gcd", "gsm_symbolic", "lcm", "leg_counting",
    "letter_counting", "products", "simple_equations", "simple_geometry",
)  # fmt: skip
DEFAULTS = {"size": 500, "seed": 0}
"""Questions drawn, of which equal ones are kept once; seed of the draw."""


def reasoning_rows(source: str) -> Iterator[Row]:
    """The questions of one family; equal sources give equal questions.

    `level` is the family's own difficulty, from 0; without it the family's defaults hold.

    Raises: ConfigError if reasoning-gym is not installed, the family cannot be graded, or an option is wrong.
    """
    family, _, options = source.removeprefix(PREFIX).partition("?")
    if family not in FAMILIES:
        raise ConfigError(
            f"{source}: no family {family!r} whose answers are integers; give one of {', '.join(FAMILIES)}"
        )
    chosen = _options(source, options)
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ConfigError(f"{source} needs reasoning-gym; install expo-rl[reasoning]") from error
    level = chosen.pop("level", None)
    for number, item in enumerate(_make(factory, source, family, level, chosen), 1):
        yield Row(f"{source}:{number}", item["question"].strip(), str(item["answer"]), level=_level_name(level))


def _options(source: str, text: str) -> dict[str, int]:
    given = dict(parse_qsl(text, keep_blank_values=True))
    unknown = [name for name, value in given.items() if name not in (*DEFAULTS, "level") or not value.isdecimal()]
    if unknown or given.get("size") == "0":
        raise ConfigError(f"{source}: expected level, size and seed as whole numbers, as in ?level=1&size=500&seed=0")
    return {**DEFAULTS, **{name: int(value) for name, value in given.items()}}


def _make(factory: Any, source: str, family: str, level: int | None, options: dict[str, int]) -> Any:
    if level is None:
        return factory.create_dataset(family, **options)
    try:
        curriculum = factory.create_curriculum(family)
    except ValueError as error:
        raise ConfigError(f"{source}: {family} has no levels; leave ?level= out") from error
    curriculum.set_global_level(level)
    return factory.create_dataset(family, **vars(curriculum.generate_configuration(options)))


def _level_name(level: int | None) -> str:
    return "" if level is None else f"level-{level}"
