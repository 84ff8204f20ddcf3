"""Where each static number of an `Objective` stands in the float32 block that kernels read.

Numbers travel in a block, so that a new value compiles nothing. The names are the objective's own fields and what is
made of them; kernels import the slots as constants, `from expo_kernels._triton.slots import TEMPERATURE`, and Triton
makes their values part of a binary's key.
"""

from dataclasses import fields
from typing import get_args

import triton.language as tl

from expo_kernels.objective import Objective

REWARD_SCALE_EPS = 1e-6  # `group_advantages`'s own default: what the loss divides by beside the group's std

_NUMBERS = [field.name for field in fields(Objective) if {int, float} & {field.type, *get_args(field.type)}]

HYPER_PARAMETERS = (
    "temperature",  # first: in another place the largest kernel spills on sm_80
    *(name for name in _NUMBERS if name != "temperature"),
    "ratio_low",
    "ratio_high",
    "rollout_kept",  # of a weight out of bounds: 1, or 0 where the correction masks
    "reward_eps",
)


def hyper_parameters(objective: Objective) -> list[float]:
    """The block, in the order of `HYPER_PARAMETERS`; 1 for what is not set, which no kernel uses then."""
    made = {
        "ratio_low": 1.0 - objective.clip_low,
        "ratio_high": 1.0 + objective.clip_high,
        "rollout_kept": 0.0 if objective.masks_rollouts else 1.0,
        "reward_eps": REWARD_SCALE_EPS,
    }
    values = [made[name] if name in made else getattr(objective, name) for name in HYPER_PARAMETERS]
    return [1.0 if value is None else float(value) for value in values]


def __getattr__(name: str) -> tl.constexpr:
    if name.isupper() and name.lower() in HYPER_PARAMETERS:
        return tl.constexpr(HYPER_PARAMETERS.index(name.lower()))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
