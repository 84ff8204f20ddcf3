"""Every internal of DeepSpeed that this project relies on, in one place: attributes and switches without documentation.

Source: deepspeed 0.19. `learner/deepspeed.py` uses the public interface of the library that is loaded here.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from expo.runtime.logging_filters import errors_only

# before DeepSpeed is imported, which would otherwise look for an accelerator
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def load_deepspeed() -> Any:
    """The library, imported on first use, which takes seconds."""
    with errors_only():
        import deepspeed
    # raised by its own calls, which its users cannot change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # its shared-memory collectives for CPUs are compiled at run time, and never return if another rank has died
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO 3 has partitioned the parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def num_elements(parameter: Any) -> int:
    """Elements of a parameter; of a partitioned one, over all ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def num_dimensions(parameter: Any) -> int:
    """Dimensions of a parameter; of a partitioned one, before it was flattened."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def collect_write_errors(engine: Any) -> Iterator[list[Exception]]:
    """Collects the errors of files that `engine.save_checkpoint` cannot write, in place of raising them.

    The ranks of an engine wait for each other after writing, so an error raised on one of them would block the others.
    """
    errors: list[Exception] = []
    writer = engine.checkpoint_engine
    write = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError for some full disks
            errors.append(error)

    writer.save = save
    # it would copy two scripts that this project does not use, on rank 0 alone
    engine._copy_recovery_script = lambda _: None
    try:
        yield errors
    finally:
        del writer.save, engine._copy_recovery_script


def set_universal_loading(engine: Any, *, is_universal: bool) -> None:
    """Has `engine.load_checkpoint` read a universal checkpoint, or an ordinary one."""
    engine._config.load_universal_checkpoint = is_universal


@contextmanager
def keep_group_settings(engine: Any) -> Iterator[None]:
    """While `engine` loads a checkpoint, its optimizer's parameter groups keep their settings; each parameter then has
    a step of its own.

    Loading a universal checkpoint with ZeRO 3 gives the first group's settings to all groups, so that norms would get
    weight decay, and one step tensor to all parameters, which AdamW would then increase once for each of them.
    """
    optimizer = engine.basic_optimizer
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    is_on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            # as AdamW keeps it: beside the parameter if it is fused, otherwise on the CPU
            state["step"] = state["step"].to(parameter.device if is_on_device else "cpu", torch.float32, copy=True)


def set_gradient_clipping(engine: Any, max_norm: float) -> None:
    """Sets the norm to which ZeRO clips gradients, which its checkpoints of stages 1 and 2 overwrite."""
    engine.optimizer.clip_grad = max_norm


def universal_conversion(source: Path, target: Path) -> list[str]:
    """The command line that converts an engine's checkpoint into a universal one, for any number of ranks."""
    command = [sys.executable, "-m", "expo.learner.universal", "--inject_missing_state"]
    return [*command, "--input_folder", str(source), "--output_folder", str(target)]


def convert_to_universal(arguments: Sequence[str]) -> None:
    """DeepSpeed's conversion with the arguments of its command line."""
    from deepspeed.checkpoint import ds_to_universal

    sys.argv[1:] = arguments  # it reads them from there
    ds_to_universal.main(ds_to_universal.parse_arguments())
