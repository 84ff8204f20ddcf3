"""Reads the weights of a checkpoint on one process, without the optimizer, however ZeRO sharded them."""

import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo.config import PolicySection
from expo.errors import CheckpointError, first_line
from expo.learner._compat_deepspeed import load_deepspeed
from expo.learner.deepspeed import TAG
from expo.learner.lora import add_adapters, merge_adapters
from expo.run.checkpoint import Checkpoints
from expo.runtime.distributed import Ranks
from expo.runtime.logging_filters import errors_only
from expo.runtime.safe_load import weights_only_loading


def load_checkpoint_weights(model: Any, section: PolicySection, folder: Path) -> None:
    """Copies the float32 weights of a checkpoint into `model`; LoRA adapters are merged.

    Args:
        model: the initial model of the run, unsharded and without adapters; changed in place.
        section: of the run; says how the weights were sharded and whether there are adapters.
        folder: the folder that `Policy.save` wrote.

    Raises: CheckpointError if the files do not hold the model's weights.
    """
    adapted = with_adapters(model, section)
    weights = read_checkpoint_weights(adapted, section, folder)
    if section.lora_rank:
        weights = merge_adapters(weights, adapted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def with_adapters(model: Any, section: PolicySection) -> Any:
    """`model`, or for a run with LoRA a copy of its architecture with adapters, without weights (device "meta")."""
    if not section.lora_rank:
        return model
    with torch.device("meta"):
        adapted = type(model)(model.config)
    add_adapters(adapted, section.lora_rank, section.lora_alpha)
    return adapted


def read_checkpoint_weights(model: Any, section: PolicySection, folder: Path) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint by the names of the parameters of `model`, on the CPU.

    Args:
        model: of the run's architecture, with adapters if the run has them; its own weights are not used.
        section: of the run; says how the weights were sharded.
        folder: the folder that `Policy.save` wrote.

    Raises: CheckpointError if the files do not hold the model's weights.
    """
    try:
        load_deepspeed()
        with weights_only_loading():
            parameters = _read_parameters(section.zero_stage, folder)
        return {name: _weight(parameters, name, parameter) for name, parameter in model.named_parameters()}
    except Exception as error:  # damaged or forged files raise many unrelated types
        raise CheckpointError(
            f"{folder} does not hold the weights of the run's model ({type(error).__name__}: {first_line(error)}); "
            f"restore it, or choose another step"
        ) from error


def _weight(parameters: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    saved = parameters[f"model.{name}"]  # the policy's module holds the model
    if saved.shape != parameter.shape:  # copy_ would broadcast it
        raise ValueError(f"{name} has shape {list(saved.shape)}, expected {list(parameter.shape)}")
    return saved.float()


def find_checkpoint(run: Path, step: int | None, ranks: Ranks) -> Path:
    """The folder of a run's checkpoint of that step (None: the newest that is whole).

    Raises: CheckpointError if there is none.
    """
    checkpoints = Checkpoints(run / "checkpoints", ranks, config_hash=None)
    checkpoint = checkpoints.newest_whole() if step is None else checkpoints.whole(step)
    if checkpoint is None:
        raise CheckpointError(f"the run {run} has no checkpoint yet; wait for its first one (run.checkpoint_every)")
    return checkpoint


def _read_parameters(zero_stage: int, folder: Path) -> dict[str, Tensor]:
    """Parameters by their name in the policy's module."""
    parameters: dict[str, Tensor]
    if zero_stage < 3:  # every rank had all parameters; only optimizer states are sharded
        file = folder / TAG / "mp_rank_00_model_states.pt"
        parameters = torch.load(file, map_location="cpu", mmap=True)["module"]
        return parameters
    # DeepSpeed prints its progress
    with errors_only(), Path(os.devnull).open("w") as devnull, redirect_stdout(devnull), redirect_stderr(devnull):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        parameters = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return parameters
