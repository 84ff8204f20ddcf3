"""The manifest of a checkpoint: what its files and the run's logs were when it was written, and whether they still are.

The checksums find what disks, copies and people change by accident. They are no signature: who can write to the folder
can write a manifest that fits, so the files are never loaded by anything that could run them.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from expo.run.logs import LogState
from expo.runtime.safe_load import foreign_code

MANIFEST = "manifest.json"
READ_BYTES = 2**22
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)
"""What reading a manifest raises if it is damaged or foreign."""

Natural = Annotated[int, Field(ge=0, strict=True)]


class Manifest(BaseModel):
    """The content of manifest.json beside its own checksum.

    ranks: the number of processes that wrote it; score: of the policy, larger is better; config_hash: digest of the
    settings that may not change on resume; files: bytes and CRC-32 of each; logs: the state of each log after `step`,
    None in checkpoints of earlier versions.
    """

    model_config = ConfigDict(frozen=True)

    step: Natural
    ranks: Annotated[int, Field(ge=1, strict=True)]
    score: float | None
    config_hash: str | None
    files: dict[str, tuple[Natural, Natural]]
    logs: dict[str, LogState] | None = None


def manifest_text(manifest: Manifest) -> str:
    """The text of the file, with its checksum."""
    content = manifest.model_dump(mode="json")
    return json.dumps({**content, "crc": _crc_of(content)}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in a folder `step-NNNNNN`.

    Raises: one of UNREADABLE if it is not as it was written, or belongs to another step.
    """
    content: dict[str, Any] = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    if content.pop("crc") != _crc_of(content):
        raise ValueError(f"{MANIFEST} has changed")
    manifest = Manifest.model_validate(content)
    if folder.name != step_name(manifest.step):
        raise ValueError(f"{MANIFEST} belongs to {step_name(manifest.step)}")
    return manifest


def step_name(step: int) -> str:
    """The name of the folder of a checkpoint."""
    return f"step-{step:06d}"


def _crc_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def crc_of_file(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            crc = zlib.crc32(block, crc)
    return crc


def find_change(folder: Path, manifest: Manifest, names: Sequence[str]) -> str | None:
    """The first of the named files that is not as the manifest records it, as a message; None if all are."""
    for name in names:
        size, crc = manifest.files[name]
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if crc_of_file(path) != crc:
            return f"{name} has changed"
    return None


def find_unlisted(folder: Path, manifest: Manifest) -> str | None:
    """A file of tensors that the manifest does not name, as a message: DeepSpeed finds files by their names."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.pt")}
    unlisted = sorted(found - set(manifest.files))
    return f"{unlisted[0]} is not in {MANIFEST}" if unlisted else None


def find_code(folder: Path, names: Sequence[str]) -> str | None:
    """The first of the named files that holds more than data, as a message; None if none does."""
    for name in names:
        problem = foreign_code(folder / name)
        if problem is not None:
            return f"{name} {problem}"
    return None
