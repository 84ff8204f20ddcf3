"""Loads files of torch.save without running code: tensors, plain containers, and the values that DeepSpeed adds.

A pickle can name any function of any module, and loading it calls that function. Everything that is loaded from the
folder of a run therefore goes through torch's `weights_only` unpickler, which knows a fixed list of names. DeepSpeed
asks torch.load for the other unpickler; inside `weights_only_loading` torch refuses to give it.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from expo.errors import first_line

DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What DeepSpeed 0.19 writes beside tensors and containers: three classes that hold numbers and run nothing."""
FORCE_SAFE, FORCE_UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_plain(path: Path) -> Any:
    """The content of a file that holds tensors and plain containers only, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def weights_only_loading() -> Iterator[None]:
    """Inside, every torch.load of this process and its children uses the `weights_only` unpickler, also where its
    caller asks for the other one; DEEPSPEED_CLASSES are allowed besides, so DeepSpeed must have been imported.
    """
    names = [name.rpartition(".") for name in DEEPSPEED_CLASSES]
    classes = [getattr(importlib.import_module(module), name) for module, _, name in names]
    before = {name: os.environ.pop(name, None) for name in (FORCE_SAFE, FORCE_UNSAFE)}
    os.environ[FORCE_SAFE] = "1"
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        del os.environ[FORCE_SAFE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def foreign_code(path: Path) -> str | None:
    """What a file would run if it were loaded by pickle, as a message; None if it holds data only.

    The pickle is read, not run. The check gives a clear message before anything is loaded; what protects the process
    is the unpickler, which also sees a file that changes in between.
    """
    try:
        names = sorted(set(get_unsafe_globals_in_checkpoint(path)) - set(DEEPSPEED_CLASSES))
    except Exception as error:  # a forged file can raise anything
        return f"is no file of torch.save ({first_line(error)})"
    return f"names the code {', '.join(names)}" if names else None
