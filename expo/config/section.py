"""What every section of a configuration has in common, and the types of its fields."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from expo.runtime.cli import as_yaml

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


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
