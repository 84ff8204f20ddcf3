"""Writes a checkpoint of a run as a model: `python -m expo.export RUN [--step N] [--adapter] [--out DIR]`.

The model is a transformers folder: weights in the run's policy.dtype with LoRA adapters merged, config, generation
config and tokenizer; its bits are those of the export that a finished run writes itself. With `--adapter`, it is the
LoRA adapter alone, as peft writes it. Nothing in the run's folder is executed, and nothing that exists is overwritten.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo.config import PolicySection, RunConfig, load_config
from expo.errors import CheckpointError, ConfigError, NotARunError
from expo.evaluation.config import find_run, require_given_code, step_number
from expo.evaluation.saved_weights import find_checkpoint, read_checkpoint_weights, with_adapters
from expo.learner.lora import merge_adapters, write_adapter
from expo.learner.model import load_model
from expo.learner.model_files import check_model_path
from expo.learner.model_folder import write_model
from expo.runtime.atomic_io import write_whole
from expo.runtime.cli import flag_value
from expo.runtime.config_errors import Overrides
from expo.runtime.distributed import Ranks
from expo.runtime.endings import disk_errors, errors_on_one_line
from expo.runtime.parser import OneLineParser
from expo.runtime.stdout import write_stdout

PROGRAM = "python -m expo.export"
REMOTE_CODE = "model.trust_remote_code"
MODEL_FLAGS = {
    "model.path": "the initial model, if it is no longer where the run found it",
    REMOTE_CODE: "true: run the Python code that comes with the initial model",
}


def export(
    run: str, step: int | None = None, *, adapter: bool = False, out: Path | None = None, overrides: Overrides = ()
) -> Path:
    """Writes a checkpoint of a run as a model folder, whole or not at all, and returns its path.

    Args:
        run: folder of a run or of one of its checkpoints; the run may still be in progress.
        step: of the checkpoint; None: the newest.
        adapter: write the LoRA adapter alone.
        out: new folder; None: export-step-NNNNNN or adapter-step-NNNNNN in the run's folder.
        overrides: settings of the run in MODEL_FLAGS that replace those in its config.yaml.

    Raises:
        NotARunError: if `run` is no run.
        ConfigError: if the run's config.yaml, the initial model or `out` cannot be used.
        CheckpointError: if there is no such checkpoint, or it is damaged or not finite.
        FolderError: if the folder cannot be written.
    """
    folder, step = find_run(run, step) if Path(run).exists() else (None, step)
    if folder is None:
        problem = "has no config.yaml" if Path(run).is_dir() else "is no folder"
        raise NotARunError(f"{run} {problem}, so it is no run; give the folder of a run")
    config = _config(folder, overrides)
    if adapter and not config.policy.lora_rank:
        raise ConfigError(f"--adapter: the run {folder} trained all weights (policy.lora_rank = 0); leave it out")
    if out is not None:
        _require_new(out)
    checkpoint = find_checkpoint(folder, step, Ranks(torch.device("cpu"), rank=0, size=1))
    path = out or folder / f"{'adapter' if adapter else 'export'}-{checkpoint.name}"
    _require_new(path)
    model, tokenizer = load_model(config.model, torch.device("meta"))  # the weights are those of the checkpoint
    adapted = with_adapters(model, config.policy)
    weights = read_checkpoint_weights(adapted, config.policy, checkpoint / "policy")
    _require_finite(weights, checkpoint)

    def write(temporary: Path) -> None:
        temporary.mkdir(parents=True)
        if adapter:
            write_adapter(temporary, weights, adapted, check_model_path(config.model), config.model.revision)
        else:
            dtype = getattr(torch, config.policy.dtype)
            write_model(temporary, model, _merged(weights, adapted, config.policy, dtype), dtype)
            tokenizer.save_pretrained(temporary)

    with disk_errors(path, "free some space, or give another folder as --out"):
        write_whole(path, write)
    return path


def _config(run: Path, overrides: Overrides) -> RunConfig:
    config = load_config(run / "config.yaml", overrides)
    code = {REMOTE_CODE: "true" if config.model.trust_remote_code else None}
    require_given_code(run / "config.yaml", code, [name for name, _ in overrides])
    return config


def _require_new(path: Path) -> None:
    """Raises: ConfigError if the path exists, also as a link to nothing."""
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists, and nothing is overwritten; give a new folder as --out")


def _require_finite(weights: dict[str, Tensor], checkpoint: Path) -> None:
    for name, value in weights.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{checkpoint}: {name} is not finite; choose an earlier step with --step")


def _merged(weights: dict[str, Tensor], adapted: Any, section: PolicySection, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in `dtype`, adapters merged after the cast, as `named_weights` of the policy has them."""
    cast = {name: value.to(dtype) for name, value in weights.items()}
    return merge_adapters(cast, adapted) if section.lora_rank else cast


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description="Write a checkpoint of a run as a transformers folder, LoRA adapters merged.",
        epilog="Prints the path of the new folder. A finished run has its own export in RUN/export.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--step", metavar="N", help="step of the checkpoint (default: the newest)")
    parser.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone, for peft")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="new folder (default: export-step-N or adapter-step-N in RUN)"
    )
    for name, text in MODEL_FLAGS.items():
        parser.add_argument(f"--{name}", dest=name, metavar="VALUE", help=text)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`. Exit codes: 0, 1 if the checkpoint is damaged or the folder cannot be written, 2 if
    the command line or the run's folder is wrong, 130 after Ctrl-C.
    """
    options = vars(_parser(prog).parse_args(argv))
    with errors_on_one_line(prog):
        overrides = [(name, flag_value(name, options[name])) for name in MODEL_FLAGS if options[name] is not None]
        step = None if options["step"] is None else step_number(options["step"])
        path = export(options["run"], step, adapter=options["adapter"], out=options["out"], overrides=overrides)
        write_stdout(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
