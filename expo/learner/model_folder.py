"""Writes a model as a transformers folder, from weights by name."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_model(folder: Path, model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes safetensors, config and generation config.

    Args:
        folder: created if it does not exist.
        model: of the architecture; its own weights may be others, adapted, or on the device "meta".
        weights: by the names of the model's parameters without adapters, in `dtype` on the CPU; without a tied head.
        dtype: recorded in the config.
    """
    state, names = dict(weights), set(model.state_dict())
    tied = {name: state[kept] for name, kept in getattr(model, "all_tied_weights_keys", {}).items()}
    state.update({name: value for name, value in tied.items() if name in names})
    model.save_pretrained(folder, state_dict=state)
    config = copy.deepcopy(model.config)
    config.dtype = dtype  # save_pretrained records that of the parameters
    config.save_pretrained(folder)
    make_readable(folder, "config.json")


def make_readable(folder: Path, config: str) -> None:
    """Gives the safetensors files of a folder, which are readable for their owner alone, the mode of its `config`."""
    mode = (folder / config).stat().st_mode  # as the umask of this process has it
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)
