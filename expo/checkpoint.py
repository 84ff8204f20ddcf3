"""Checkpoints: everything a run is, written whole or not at all by all ranks together, and found again.

A checkpoint is a folder `step-000050`. It is written under a temporary name, flushed to disk, listed with sizes and
checksums in its manifest, renamed, and then named by the file `latest`: a folder that bears its final name and agrees
with its manifest is whole. The folder must lie where every rank can reach it.
"""

import json
import random
import shutil
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from expo.files import flush, write_bytes_whole
from expo.policy import Policy
from expo.ranks import Ranks

MANIFEST = "manifest.json"
LATEST = "latest"
READ_BYTES = 2**22


@dataclass(frozen=True)
class Position:
    """Where a run stands after a step, but for its weights: all that the next step reads besides them."""

    step: int
    curriculum: Mapping[str, Any]  # CurriculumTable.state_dict()
    generator: Tensor  # state of the generator that draws questions
    bad_updates: int = 0  # skipped updates in a row


class CheckpointError(Exception):
    """A checkpoint could not be written; the run's earlier ones are as they were."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they lie, shared by all ranks.
        ranks: the processes of the run; every method is called by all of them.
        config_hash: digest of the settings that make the run what it is; one of another run is not taken up.
    """

    def __init__(self, folder: Path, ranks: Ranks, config_hash: str) -> None:
        self.folder, self._ranks, self._config_hash = folder, ranks, config_hash

    def save(self, position: Position, policy: Policy, score: float | None = None) -> Path:
        """Writes `step-NNNNNN` and returns its path; one that is there already is left as it is.

        Args:
            position: where the run stands.
            policy: gives its weights and optimizer states.
            score: how good the policy is, larger is better; None if it was not measured after this step.

        Raises: CheckpointError if a rank could not write; nothing that was there before is lost.
        """
        path = self.folder / f"step-{position.step:06d}"
        if self._ranks.from_first(path.is_dir()):
            return path
        temporary = path.with_name(f".{path.name}.part")
        if self._ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "policy").mkdir(parents=True)
        self._ranks.wait()
        failures = self._ranks.gather(_failure_of(lambda: self._write(temporary, position, policy)))
        sums = self._checksums(temporary) if not any(failures) else {}
        if self._ranks.is_first and not any(failures):
            facts = {
                "step": position.step,
                "ranks": self._ranks.size,
                "score": score,
                "config_hash": self._config_hash,
                "files": sums,
            }
            failures = [_failure_of(lambda: self._put_in_place(temporary, path, facts))]
        problem = self._ranks.from_first(next((failure for failure in failures if failure), None))
        if problem is not None:
            if self._ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"checkpoint {path} could not be written ({problem}); earlier ones are untouched")
        return path

    def _write(self, temporary: Path, position: Position, policy: Policy) -> None:
        policy.save(temporary / "policy")
        torch.save(_random_states(), temporary / f"random-rank{self._ranks.rank}.pt")
        if self._ranks.is_first:
            torch.save(vars(position), temporary / "position.pt")

    def _checksums(self, temporary: Path) -> dict[str, list[int]]:
        """Size and CRC-32 of every file, each rank reading its share, flushed to disk."""
        self._ranks.wait()
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        found = {}
        for path in self._ranks.share(files):
            flush(path)
            found[path.relative_to(temporary).as_posix()] = [path.stat().st_size, _crc(path)]
        return {name: facts for part in self._ranks.gather(found) for name, facts in part.items()}

    @staticmethod
    def _put_in_place(temporary: Path, path: Path, facts: Mapping[str, Any]) -> None:
        write_bytes_whole(temporary / MANIFEST, json.dumps(facts, indent=1).encode())
        for folder in [path for path in temporary.rglob("*") if path.is_dir()]:
            flush(folder)
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
        write_bytes_whole(path.parent / LATEST, path.name.encode())

    def retain(self, newest: int, *, best: bool) -> None:
        """Deletes all but the `newest` last ones, and the one of the highest score where `best`."""
        if not self._ranks.is_first:
            return
        every = self.list()
        kept = set(every[-newest:])
        scores = {path: _facts(path).get("score") for path in every}
        scored = [path for path in every if scores[path] is not None]
        if best and scored:
            kept.add(max(scored, key=lambda path: (scores[path], path)))
        for path in every:
            if path not in kept:
                # under a name that is no checkpoint's first: a deletion that dies leaves no half of one
                retired = path.with_name(f".{path.name}.old")
                path.rename(retired)
                shutil.rmtree(retired)

    def list(self) -> "list[Path]":
        """Checkpoints that bear their final name, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def newest_whole(self) -> Path | None:
        """The newest checkpoint that agrees with its manifest; None if there is none.

        One that does not is named on stderr with what is wrong, and the one before it is looked at.
        """
        for path in reversed(self._ranks.from_first(self.list())):
            problems = [problem for problem in self._ranks.gather(self._problem(path)) if problem]
            if not problems:
                return path
            if self._ranks.is_first:
                sys.stderr.write(f"checkpoint {path} is not whole ({problems[0]}); looking at the one before\n")
        return None

    def _problem(self, path: Path) -> str | None:
        try:
            facts = _facts(path)
            if facts["config_hash"] != self._config_hash:
                return "it belongs to a run of other settings"
            for name in self._ranks.share(sorted(facts["files"])):
                size, crc = facts["files"][name]
                if not (path / name).is_file():
                    return f"{name} is missing"
                if (path / name).stat().st_size != size:
                    return f"{name} has {(path / name).stat().st_size} bytes, expected {size}"
                if _crc(path / name) != crc:
                    return f"{name} has changed"
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def load(self, path: Path, policy: Policy) -> Position:
        """Takes up a whole checkpoint: the policy's states, this rank's random states, and where the run stood."""
        ranks_before = _facts(path)["ranks"]
        policy.load(path / "policy", self._ranks.size != ranks_before)
        position = Position(**torch.load(path / "position.pt", map_location="cpu", weights_only=True))
        own = path / f"random-rank{self._ranks.rank}.pt"
        if self._ranks.size == ranks_before:
            _set_random_states(torch.load(own, map_location="cpu", weights_only=True))
        return position


def _facts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return found


def _failure_of(write: Any) -> str | None:
    """What went wrong with a file, or None; other errors go on."""
    try:
        write()
    except (OSError, RuntimeError) as error:
        # torch.save says of a full disk only that its archive failed
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _crc(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            found = zlib.crc32(block, found)
    return found


def _random_states() -> dict[str, Any]:
    name, keys, *rest = numpy.random.get_state()  # libraries draw from it
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(numpy.asarray(keys).astype("int64")), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
