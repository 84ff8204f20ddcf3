"""The DeepSpeed engine under a policy: its settings, models that ZeRO has split over the ranks, and its checkpoints."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo.config import PolicySection
from expo.errors import ConfigError
from expo.runtime.distributed import Ranks
from expo.runtime.logging_filters import errors_only

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # or DeepSpeed looks for one

GATHER_ELEMENTS = 2**28  # parameters that ZeRO 3 brings together at once when weights leave the policy: 1 GiB
BUCKET_ELEMENTS = 2 * 10**8  # of gradients reduced at once; DeepSpeed holds a buffer of that size, 2 GB by its default
TAG = "policy"  # the name under which an engine saves its states


def start_engine(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, section: PolicySection, max_grad_norm: float
) -> Any:
    """DeepSpeed's engine for `module`; without an optimizer, one that only runs it forward."""
    deepspeed = _library()
    # without ZeRO the norm is taken by the policy: DeepSpeed would not tell it, nor skip a step by it
    clip = max_grad_norm if section.zero_stage and optimizer is not None else 0.0
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    settings = {**_settings(section, num_parameters), "gradient_clipping": clip}
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def _settings(section: PolicySection, num_parameters: int = BUCKET_ELEMENTS) -> dict[str, Any]:
    """DeepSpeed's settings; source: docs/_pages/config-json.md of deepspeed 0.19."""
    bucket = min(num_parameters, BUCKET_ELEMENTS)
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # counts passes; what a pass holds is ours to say
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": section.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **({"offload_optimizer": offload} if section.offload_optimizer else {}),
            **({"offload_param": offload} if section.offload_parameters else {}),
        },
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW: no compiler needed, fused on a GPU
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _library() -> Any:
    """The library, loaded when first used; it takes seconds."""
    with errors_only():
        import deepspeed
    # of its own calls, which its users cannot change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # its shared-memory collectives for CPUs would be compiled on the spot, and spin for ever where a rank has died
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


# --- models that ZeRO 3 has split


@contextmanager
def loading_parts(section: PolicySection) -> Iterator[None]:
    """Inside, ZeRO 3 has transformers load each rank's part of a model only."""
    if section.zero_stage < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    _library()
    held = HfDeepSpeedConfig(_settings(section))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        del held


def whole_parameters(model: Any, dtype: torch.dtype, zero_stage: int) -> Iterator[tuple[str, Tensor]]:
    """A copy of every parameter, whole, in `dtype` under its name; all ranks go through it together."""
    deepspeed = _library()
    bucket: list[tuple[str, Any]] = []

    def flush() -> list[tuple[str, Tensor]]:
        parameters = [parameter for _, parameter in bucket]
        with deepspeed.zero.GatheredParameters(parameters) if zero_stage == 3 else nullcontext():
            # copies: what is gathered is gone when the block ends
            found = [(name, value.detach().to(dtype, copy=True)) for name, value in bucket]
        bucket.clear()
        return found

    held = 0
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if bucket and held + size > GATHER_ELEMENTS:
            yield from flush()
            held = 0
        bucket.append((name, parameter))
        held += size
    yield from flush()


# --- checkpoints


def save_states(engine: Any, folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the engine's states, and `state` beside them; every rank writes its part.

    Raises: OSError if this rank could not, after all ranks have come through.
    """
    with errors_only(), _writing_on(engine) as failures:
        engine.save_checkpoint(str(folder), tag=TAG, client_state=dict(state), save_latest=False)
    if failures:
        raise OSError(str(failures[0]).splitlines()[0]) from failures[0]


@contextmanager
def _writing_on(engine: Any) -> Iterator[list[Exception]]:
    """Inside, a file that cannot be written is listed and the engine goes on: its ranks wait for each other after
    writing, and one that an error kept away would leave the others waiting.
    """
    failures: list[Exception] = []
    writer = engine.checkpoint_engine
    write = writer.save

    def attempt(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch.save gives a RuntimeError for some full disks
            failures.append(error)

    writer.save = attempt
    # two scripts that nothing here reads, copied by rank 0 alone
    engine._copy_recovery_script = lambda _: None
    try:
        yield failures
    finally:
        del writer.save, engine._copy_recovery_script


def load_states(engine: Any, folder: Path, ranks: Ranks, *, converts: bool) -> dict[str, Any]:
    """Takes up what `save_states` wrote, and returns the state beside it.

    Args:
        converts: put what ZeRO has split together and split it anew, for another number of ranks.
    """
    if converts:
        folder = _universal(folder, ranks)
    engine._config.load_universal_checkpoint = converts  # read by load_checkpoint alone
    with errors_only():
        path, state = engine.load_checkpoint(str(folder), tag=TAG)
    assert path is not None, f"{folder} holds no DeepSpeed checkpoint"
    if converts:
        ranks.barrier()
        if ranks.is_rank0:
            shutil.rmtree(folder)
    found: dict[str, Any] = state
    return found


def _universal(folder: Path, ranks: Ranks) -> Path:
    """A copy of a DeepSpeed checkpoint that any number of ranks can load, beside the one it is made from."""
    converted = folder.parent.with_name(f".{folder.parent.name}.universal")

    def convert() -> None:
        shutil.rmtree(converted, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        paths = ["--input_folder", str(folder / TAG), "--output_folder", str(converted / TAG)]
        done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
        if done.returncode:
            problem = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            shutil.rmtree(converted, ignore_errors=True)
            raise ConfigError(
                f"the checkpoint {folder.parent} was made by another number of ranks and could not be converted "
                f"for {ranks.size}: {problem}; resume with as many as made it"
            )

    ranks.run_on_rank0(convert)
    return converted
