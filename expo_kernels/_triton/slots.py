"""Index of each static number of an `Objective` in the float32 block that kernels read.

Kernels read the numbers from memory, so that a new value compiles nothing. The names are the objective's fields and
values derived from them. Kernels import the indices as constants, `from expo_kernels._triton.slots import TEMPERATURE`,
and Triton makes their values part of a binary's key.
"""

from dataclasses import fields
from typing import get_args

import triton.language as tl

from expo_kernels.objective import Objective

REWARD_SCALE_EPS = 1e-6  # the default of `group_advantages`: added to the group's std before division

# settings of surrogates that no kernel computes
_UNREAD = ("cov_ratio", "clip_cov_low", "clip_cov_high", "kl_cov_coef")
_NUMBERS = [
    field.name
    for field in fields(Objective)
    if {int, float} & {field.type, *get_args(field.type)} and field.name not in _UNREAD
]

HYPER_PARAMETERS = (
    "temperature",  # first: at another index the largest kernel spills on sm_80
    *(name for name in _NUMBERS if name != "temperature"),
    "ratio_low",
    "ratio_high",
    "rollout_kept",  # factor of a weight out of bounds: 1, or 0 if the correction masks
    "reward_eps",
)


def hyper_parameters(objective: Objective) -> list[float]:
    """The block, in the order of `HYPER_PARAMETERS`; 1 for a setting that is None, which no kernel uses then."""
    made = {
        "ratio_low": max(1.0 - objective.clip_low, 0.0),
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
