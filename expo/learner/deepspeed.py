"""The DeepSpeed engine under a policy: its settings, models that ZeRO 3 partitions over the ranks, and checkpoints."""

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo.config import PolicySection
from expo.errors import ConfigError, first_line
from expo.learner._compat_deepspeed import (
    collect_write_errors,
    keep_group_settings,
    load_deepspeed,
    num_elements,
    set_universal_loading,
    universal_conversion,
)
from expo.runtime.distributed import Ranks
from expo.runtime.logging_filters import errors_only
from expo.runtime.safe_load import weights_only_loading

GATHER_ELEMENTS = 2**28  # parameters that ZeRO 3 gathers at once for the rollout engine and the export: 1 GiB
BUCKET_ELEMENTS = 2 * 10**8  # gradients reduced at once; DeepSpeed allocates a buffer of that size, by default of 2 GB
TAG = "policy"  # the tag of an engine's checkpoint


def start_engine(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, section: PolicySection, max_grad_norm: float
) -> Any:
    """DeepSpeed's engine for `module`; without an optimizer, for forward passes only."""
    deepspeed = load_deepspeed()
    # without ZeRO the policy clips: DeepSpeed would not report the norm, nor skip a step with a non-finite one
    clip = max_grad_norm if section.zero_stage and optimizer is not None else 0.0
    num_parameters = sum(num_elements(parameter) for parameter in module.parameters())
    settings = {**_settings(section, num_parameters), "gradient_clipping": clip}
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def _settings(section: PolicySection, num_parameters: int = BUCKET_ELEMENTS) -> dict[str, Any]:
    """DeepSpeed's settings; source: docs/_pages/config-json.md of deepspeed 0.19."""
    bucket = min(num_parameters, BUCKET_ELEMENTS)
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # counts forward passes; the policy chooses the sequences of each
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": section.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **({"offload_optimizer": offload} if section.offload_optimizer else {}),
            **({"offload_param": offload} if section.offload_parameters else {}),
        },
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW: needs no compiler, fused on a GPU
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


# --- models that ZeRO 3 partitions


@contextmanager
def partitioned_loading(section: PolicySection) -> Iterator[None]:
    """With ZeRO 3, a model that transformers loads inside is partitioned while it loads."""
    if section.zero_stage < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    load_deepspeed()
    # transformers holds only a weak reference to it
    hf_config = HfDeepSpeedConfig(_settings(section))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        del hf_config


def gathered_parameters(
    model: Any, dtype: torch.dtype, zero_stage: int, is_wanted: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """An unsharded copy in `dtype` of every parameter, or of those whose names are wanted, with its name; all ranks
    iterate together.
    """
    deepspeed = load_deepspeed()
    bucket: list[tuple[str, Any]] = []

    def flush() -> list[tuple[str, Tensor]]:
        parameters = [parameter for _, parameter in bucket]
        with deepspeed.zero.GatheredParameters(parameters) if zero_stage == 3 else nullcontext():
            # copied: gathered parameters are freed at the end of the block
            copies = [(name, value.detach().to(dtype, copy=True)) for name, value in bucket]
        bucket.clear()
        return copies

    bucket_size = 0
    for name, parameter in model.named_parameters():
        if is_wanted is not None and not is_wanted(name):
            continue
        size = num_elements(parameter)
        if bucket and bucket_size + size > GATHER_ELEMENTS:
            yield from flush()
            bucket_size = 0
        bucket.append((name, parameter))
        bucket_size += size
    yield from flush()


# --- checkpoints


def save_states(engine: Any, folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the states of the engine, and `state` beside them; every rank writes its part.

    Raises: OSError if this rank could not write, after all ranks have finished.
    """
    with errors_only(), collect_write_errors(engine) as errors:
        engine.save_checkpoint(str(folder), tag=TAG, client_state=dict(state), save_latest=False)
    if errors:
        raise OSError(first_line(errors[0])) from errors[0]


def load_states(engine: Any, folder: Path, ranks: Ranks, *, converts: bool) -> dict[str, Any]:
    """Restores what `save_states` wrote, and returns the state beside it.

    Args:
        engine: to restore.
        folder: that `save_states` was given.
        ranks: the processes of the run.
        converts: whether to convert states that ZeRO partitioned for another number of ranks.

    Nothing in the files is run: what is neither a tensor nor a plain value is refused while it is read.

    Raises: ConfigError if the states cannot be converted.
    """
    if converts:
        folder = _convert_to_universal(folder, ranks)
    set_universal_loading(engine, is_universal=converts)
    with errors_only(), weights_only_loading(), keep_group_settings(engine):
        path, loaded = engine.load_checkpoint(str(folder), tag=TAG)
    assert path is not None, f"{folder} holds no DeepSpeed checkpoint"
    if converts:
        ranks.barrier()
        if ranks.is_rank0:
            shutil.rmtree(folder)
    state: dict[str, Any] = loaded
    return state


def _convert_to_universal(folder: Path, ranks: Ranks) -> Path:
    """A copy of a DeepSpeed checkpoint that any number of ranks can load, beside the original."""
    converted = folder.parent.with_name(f".{folder.parent.name}.universal")

    def convert() -> None:
        shutil.rmtree(converted, ignore_errors=True)
        command = universal_conversion(folder / TAG, converted / TAG)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            problem = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            shutil.rmtree(converted, ignore_errors=True)
            raise ConfigError(
                f"the checkpoint {folder.parent} was saved by another number of ranks and could not be converted "
                f"for {ranks.size}: {problem}; resume with the number of ranks that saved it"
            )

    ranks.run_on_rank0(convert)
    return converted
