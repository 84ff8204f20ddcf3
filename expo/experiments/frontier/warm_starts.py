"""The initial models of the frontier plan: the shipped one, and others of the same recipe from other seeds.

    python -m expo.experiments.frontier.warm_starts SEED FOLDER

makes one in about 11 minutes of one core. Its weights are kept as float16, 1.8 MB, and loaded as float32: the same seed
gives the same weights on one machine only, so they are stored beside the results and not made again elsewhere.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from expo.errors import ConfigError
from expo.ledger import MODEL_PATH
from expo.ledger.warm_start import WarmStart, make, sha256
from expo.runtime.atomic_io import write_bytes_whole, write_whole
from expo.runtime.endings import errors_on_one_line

PROGRAM = "python -m expo.experiments.frontier.warm_starts"
SHIPPED = 0  # the seed of the embedded model
WEIGHTS = "model.safetensors"


def warm_start_folder(results: Path, seed: int) -> Path:
    """The folder of an initial model."""
    return MODEL_PATH if seed == SHIPPED else results / "warm-starts" / f"seed-{seed}"


@cache
def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights of an initial model.

    Raises: ConfigError if they are missing.
    """
    try:
        return sha256(folder / WEIGHTS)
    except OSError as error:
        raise ConfigError(f"the initial model in {folder} cannot be read ({error}); restore it") from error


@dataclass(frozen=True)
class WarmStartJob:
    """Makes one initial model; a job of `expo.experiments.ablation.runs`."""

    results: Path
    out: Path
    seed: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"warm start, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The folder of its log."""
        return self.out / "warm-starts" / f"seed-{self.seed}"

    @property
    def is_ready(self) -> bool:
        """True: it depends on nothing."""
        return True

    @property
    def is_finished(self) -> bool:
        """Whether the model is there."""
        return warm_start_folder(self.results, self.seed).exists()

    def command(self) -> list[str]:
        """The command that makes it."""
        folder = warm_start_folder(self.results, self.seed)
        return [sys.executable, "-m", "expo.experiments.frontier.warm_starts", str(self.seed), str(folder)]


def make_warm_start(settings: WarmStart, folder: Path) -> None:
    """Makes an initial model with float16 weights; `folder` appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        whole = Path(parent) / "float32"
        make(settings, whole)
        store_as_float16(whole, folder)


def store_as_float16(whole: Path, folder: Path) -> None:
    """Copies a model folder with its weights rounded to float16; its provenance has both hashes."""

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for path in whole.iterdir():
            if path.name != WEIGHTS:
                write_bytes_whole(temporary / path.name, path.read_bytes())
        rounded = {name: value.to(torch.float16) for name, value in load_file(whole / WEIGHTS).items()}
        save_file(rounded, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / WEIGHTS).chmod(0o644)
        provenance = json.loads((whole / "provenance.json").read_text(encoding="utf-8"))
        provenance |= {
            "float32_weights_sha256": provenance["weights_sha256"],
            "weights_sha256": sha256(temporary / WEIGHTS),
        }
        write_bytes_whole(temporary / "provenance.json", (json.dumps(provenance, indent=2) + "\n").encode())

    write_whole(folder, write)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Make an initial model of the frontier plan.")
    parser.add_argument("seed", type=int, help="of the weights and demonstrations")
    parser.add_argument("folder", type=Path, help="to write; it must not exist yet")
    options = parser.parse_args(argv)
    if options.folder.exists():
        parser.error(f"{options.folder} exists already; remove it, or give another folder")
    with errors_on_one_line(PROGRAM):
        make_warm_start(WarmStart(seed=options.seed), options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
