"""What every section of a configuration has in common, and the types of its fields."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from expo.runtime.cli import as_yaml

# Every number has two bounds: beyond them float32 overflows, waits and sizes overflow C's integers, or the machine is
# exhausted before anything is checked. Fields whose values use memory, processes or threads have narrower ones.
YEAR_S = 31_536_000
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Weight = Annotated[float, Field(ge=-1e6, le=1e6)]
Temperature = Annotated[float, Field(ge=0.01, le=1000)]  # vLLM raises lower ones to 0.01 by itself
Seconds = Annotated[float, Field(gt=0, le=YEAR_S)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]  # replies or questions
Length = Annotated[int, Field(ge=1, le=2**24)]  # tokens of a prompt or a reply


def _in_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


T = TypeVar("T")
Several = Annotated[list[T], BeforeValidator(_in_a_list)]  # a list of choices; one choice stands for a list of it


class Section(BaseModel):
    """Typed fields that cannot be changed; an unknown field is an error. The text under a field is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


class Config(Section):
    """A configuration, whose fields are sections."""

    @property
    def settings(self) -> dict[str, Any]:
        """The value of every field by its dotted name, such as "run.seed", as YAML holds it."""
        return {
            f"{section}.{field}": value
            for section, fields in self.model_dump(mode="json").items()
            for field, value in fields.items()
        }

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; reading it back gives an equal one."""
        return as_yaml(self)


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The settings of `after` that have another value in `before`, each as "run.seed (0 -> 1)"."""
    return [f"{name} ({before.get(name)} -> {value})" for name, value in after.items() if before.get(name) != value]
