"""The weights in a checkpoint, whole, on one process and without the optimizer, however ZeRO had split them."""

import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo.config import PolicySection
from expo.learner.deepspeed import TAG
from expo.learner.lora import add_adapters, merge_adapters
from expo.runtime.logging_filters import errors_only


def load_checkpoint_weights(model: Any, section: PolicySection, folder: Path) -> None:
    """Puts the float32 weights that a policy saved into `model`, the one its run started from; adapters are merged in.

    Args:
        model: whole and without adapters.
        section: the run's; says how the weights were split and whether they are adapters.
        folder: what `Policy.save` was given.
    """
    saved = {name.removeprefix("model."): value for name, value in _saved(section.zero_stage, folder).items()}
    if section.lora_rank:
        with torch.device("meta"):  # for the names and scales of the adapters alone
            shape = type(model)(model.config)
        add_adapters(shape, section.lora_rank, section.lora_alpha)
        saved = merge_adapters(saved, shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])


def _saved(zero_stage: int, folder: Path) -> dict[str, Tensor]:
    """Parameters by their name in the policy's module."""
    found: dict[str, Tensor]
    if zero_stage < 3:  # every rank had them all; only the optimizer's states are split
        file = folder / TAG / "mp_rank_00_model_states.pt"
        found = torch.load(file, map_location="cpu", weights_only=False, mmap=True)["module"]
        return found
    # it prints its steps
    with errors_only(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return found
