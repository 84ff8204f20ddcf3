"""The files of a model, before its weights are loaded: every file that cannot be used is one line that names it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from expo import ledger
from expo.config import ModelSection
from expo.errors import ConfigError, first_line

WEIGHTS = (".safetensors", ".bin")
OF_A_MODEL = (*WEIGHTS, ".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")
WHOLE_BYTES = 2**22  # a larger file is hashed in parts, which takes milliseconds
NUM_PARTS, PART_BYTES = 64, 2**16
LFS_POINTER = b"version https://git-lfs"
CODE_HINT = "trust_remote_code"


def check_model_path(config: ModelSection) -> str:
    """The folder of the model, or its hub id.

    Raises: ConfigError if model.path is neither a hub id nor a folder that holds a model.
    """
    path = str(ledger.MODEL_PATH) if config.path == "ledger" else config.path
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if (Path(path) / "config.json").is_file() or (is_hub_id and not Path(path).exists()):
        return path
    problem = "has no config.json" if Path(path).is_dir() else "does not exist"
    raise ConfigError(f'model.path = {config.path} {problem}; give a transformers folder, a hub id, or "ledger"')


def check_model_files(config: ModelSection) -> None:
    """Checks the files of a local folder without loading weights; a hub id is checked by its download.

    Raises: ConfigError, which names the file, if weights are missing, truncated, or pointers of Git LFS.
    """
    folder = Path(check_model_path(config))
    if not folder.is_dir():
        return
    where = f"model.path = {config.path}"
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    for file in files:
        with file.open("rb") as content:
            start = content.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ConfigError(f"{where}: {file.name} is a pointer of Git LFS, not the file; run git lfs pull there")
        if file.suffix in (*WEIGHTS, ".json") and not start:
            raise ConfigError(f"{where}: {file.name} is empty; download it again")
        if file.suffix == ".safetensors":
            _check_safetensors(where, file)
        if file.name.endswith(".index.json"):
            _check_index(where, file)
    if not any(file.suffix in WEIGHTS for file in files):
        raise ConfigError(f"{where} holds no weights, neither *.safetensors nor *.bin; download them")


def _check_safetensors(where: str, file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):  # reads the header, and compares its end with the size of the file
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{where}: {file.name} is truncated or no safetensors file ({first_line(error)}); download it again"
        ) from error


def _check_index(where: str, file: Path) -> None:
    try:
        shards = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: {file.name} is no index of weights; download it again") from error
    missing = sorted(shard for shard in shards if not (file.parent / str(shard)).is_file())
    if missing:
        raise ConfigError(f"{where}: {missing[0]}, which {file.name} names, is missing; download it")


def file_digests(config: ModelSection, model_config: Any) -> dict[str, str]:
    """What identifies the model's files: of a folder, size and hash of each file by its name; of a hub id, its commit.

    Of a large file, the beginning and evenly spaced parts up to its end are hashed.
    """
    folder = Path(check_model_path(config))
    if not folder.is_dir():
        return {"the commit": str(getattr(model_config, "_commit_hash", None))}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in OF_A_MODEL]
    return {file.name: _file_digest(file) for file in files}


def _file_digest(file: Path) -> str:
    size, hashed = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as content:
        hashed.update(content.read(WHOLE_BYTES))
        for part in range(NUM_PARTS if size > WHOLE_BYTES else 0):
            content.seek((size - PART_BYTES) * (part + 1) // NUM_PARTS)
            hashed.update(content.read(PART_BYTES))
    return f"{size} bytes, sha256 {hashed.hexdigest()[:16]}"


def hub_options(config: ModelSection) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for model.revision and model.trust_remote_code."""
    # False, not unset: transformers would ask on the terminal
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    return options if config.revision is None else {**options, "revision": config.revision}


def load_error(config: ModelSection, what: str, error: Exception) -> ConfigError:
    """The error for a part of the model that does not load."""
    if CODE_HINT in str(error):
        return ConfigError(
            f"{what} of model.path = {config.path} is Python code that comes with the model; read that code, then set "
            f"--model.trust_remote_code=true, or choose another model"
        )
    return ConfigError(f"{what} of model.path = {config.path} does not load: {first_line(error)}")


def load_model_config(config: ModelSection) -> Any:
    """The configuration of the model, without its weights.

    Raises: ConfigError if it does not load.
    """
    return _load(config, "the configuration", AutoConfig.from_pretrained)


def load_tokenizer(config: ModelSection) -> Any:
    """Loads the tokenizer of `model.path`.

    Raises: ConfigError if it does not load.
    """
    return _load(config, "the tokenizer", AutoTokenizer.from_pretrained)


def _load(config: ModelSection, what: str, load: Callable[..., Any]) -> Any:
    path = check_model_path(config)
    try:
        return load(path, **hub_options(config))
    except Exception as error:  # damaged JSON files raise many unrelated types
        raise load_error(config, what, error) from error
