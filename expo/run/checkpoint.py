"""Checkpoints: everything a run is, written whole or not at all by all ranks together, and found again.

A checkpoint is a folder `step-000050`. It is written under a temporary name, flushed to disk, listed with sizes and
checksums in its manifest, renamed, and then named by the file `latest`: a folder that bears its final name and agrees
with its manifest is whole. The folder must lie where every rank can reach it.
"""

import json
import random
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor

from expo.errors import CheckpointError
from expo.learner.policy import Policy
from expo.runtime.atomic_io import flush, remove_leftovers, write_bytes_whole
from expo.runtime.distributed import Ranks

MANIFEST = "manifest.json"
LATEST = "latest"
READ_BYTES = 2**22

T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """Where a run stands after a step, but for its weights: all that the next step reads besides them."""

    step: int
    curriculum: Mapping[str, Any]  # CurriculumTable.state_dict()
    generator: Tensor  # state of the generator that draws questions
    bad_updates: int = 0  # skipped updates in a row
    reply_tokens: int = 0  # sampled so far
    random: Mapping[str, Any] | None = None  # this rank's `random_states()`; None: as they are when it is saved


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they lie, shared by all ranks.
        ranks: the processes of the run; every method is called by all of them.
        config_hash: digest of the settings that make the run what it is; one of another run is not taken up. None: of
            whatever run, for reading alone.
    """

    def __init__(self, folder: Path, ranks: Ranks, config_hash: str | None) -> None:
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
        if self._ranks.broadcast_from_rank0(path.is_dir()):
            return path
        temporary = path.with_name(f".{path.name}.part")
        try:
            self._together(lambda: self._make_room(temporary))
            self._together(lambda: self._write(temporary, position, policy))
            sums = self._together(lambda: self._checksums(temporary))
            facts = {
                "step": position.step,
                "ranks": self._ranks.size,
                "score": score,
                "config_hash": self._config_hash,
                "files": {name: found for part in sums for name, found in part.items()},
            }
            self._together(lambda: self._put_in_place(temporary, path, facts))
        except CheckpointError as error:
            if self._ranks.is_rank0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {path} could not be written ({error}); earlier ones are untouched"
            ) from None
        return path

    def _together(self, make: Callable[[], T]) -> list[T]:
        """What `make` returns on each rank; CheckpointError on all of them if one of them met an OSError."""
        problem, mine = None, None
        try:
            mine = make()
        except OSError as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        found = self._ranks.gather((problem, mine))
        for rank, (problem, _) in enumerate(found):
            if problem is not None:
                raise CheckpointError(f"rank {rank}: {problem}")
        return [made for _, made in found]  # type: ignore[misc]  # None only beside a problem

    def _make_room(self, temporary: Path) -> None:
        if self._ranks.is_rank0:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "policy").mkdir(parents=True)

    def _write(self, temporary: Path, position: Position, policy: Policy) -> None:
        policy.save(temporary / "policy")
        _save(position.random or random_states(), temporary / f"random-rank{self._ranks.rank}.pt")
        if self._ranks.is_rank0:
            shared = {name: value for name, value in vars(position).items() if name != "random"}
            _save(shared, temporary / "position.pt")

    def _checksums(self, temporary: Path) -> dict[str, list[int]]:
        """Size and CRC-32 of this rank's share of the files, flushed to disk."""
        found = {}
        for path in self._ranks.shard(sorted(path for path in temporary.rglob("*") if path.is_file())):
            flush(path)
            found[path.relative_to(temporary).as_posix()] = [path.stat().st_size, _crc(path)]
        return found

    def _put_in_place(self, temporary: Path, path: Path, facts: Mapping[str, Any]) -> None:
        if not self._ranks.is_rank0:
            return
        manifest = {**facts, "crc": _crc_of_facts(facts)}
        write_bytes_whole(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        for folder in [path for path in temporary.rglob("*") if path.is_dir()]:
            flush(folder)
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
        write_bytes_whole(path.parent / LATEST, path.name.encode())

    def retain(self, newest: int, *, best: bool) -> None:
        """Deletes all but the `newest` last ones, and the one of the highest score where `best`."""
        if not self._ranks.is_rank0:
            return
        every = self.list()
        kept = set(every[-newest:])
        scores = {path: _score(path) for path in every}
        scored = [path for path in every if scores[path] is not None]
        if best and scored:
            kept.add(max(scored, key=lambda path: (scores[path], path)))
        self._delete([path for path in every if path not in kept])

    @staticmethod
    def _delete(paths: "list[Path]") -> None:
        for path in paths:
            # under a name that is no checkpoint's first: a deletion that dies leaves no half of one
            retired = path.with_name(f".{path.name}.old")
            try:
                shutil.rmtree(retired, ignore_errors=True)
                path.rename(retired)
                shutil.rmtree(retired)
            except OSError as error:
                sys.stderr.write(f"checkpoint {path} could not be deleted ({error}); delete it by hand\n")

    def list(self) -> "list[Path]":
        """Checkpoints that bear their final name, oldest first."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
        return sorted(found, key=_step)

    def tidy(self) -> None:
        """Removes what processes that died have left half written or half deleted."""
        if self._ranks.is_rank0:
            remove_leftovers(self.folder)

    def newest_whole(self) -> Path | None:
        """The newest checkpoint that agrees with its manifest; None if there are none at all.

        One that does not is named on stderr with what is wrong, and the one before it is looked at.

        Raises: CheckpointError if there are some, but not one is whole.
        """
        every = self._ranks.broadcast_from_rank0(self.list())
        for path in reversed(every):
            problems = [problem for problem in self._ranks.gather(self._problem(path)) if problem]
            if not problems:
                return path
            if self._ranks.is_rank0:
                sys.stderr.write(f"checkpoint {path} is not whole ({problems[0]}); looking at the one before\n")
        if every:
            raise CheckpointError(
                f"not one of the {len(every)} checkpoints in {self.folder} is whole; bring one back, or delete "
                f"them to start the run over"
            )
        return None

    def whole(self, step: int) -> Path:
        """The checkpoint after `step`.

        Raises: CheckpointError if there is none, or it does not agree with its manifest.
        """
        every = self._ranks.broadcast_from_rank0({_step(path): path for path in self.list()})
        if step not in every:
            known = ", ".join(map(str, every)) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has {known}")
        problems = [problem for problem in self._ranks.gather(self._problem(every[step])) if problem]
        if problems:
            raise CheckpointError(f"checkpoint {every[step]} is not whole ({problems[0]}); take another step")
        return every[step]

    def _problem(self, path: Path) -> str | None:
        try:
            facts = _facts(path)
            if self._config_hash not in (None, facts["config_hash"]):
                return "it belongs to a run of other settings"
            for name in self._ranks.shard(sorted(facts["files"])):
                size, crc = facts["files"][name]
                if not (path / name).is_file():
                    return f"{name} is missing"
                if (path / name).stat().st_size != size:
                    return f"{name} has {(path / name).stat().st_size} bytes, expected {size}"
                if _crc(path / name) != crc:
                    return f"{name} has changed"
        except (OSError, ValueError, KeyError, TypeError) as error:
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
        self._ranks.barrier()
        if self._ranks.is_rank0:
            # newer ones are not whole, and the run is about to write them again
            self._delete([later for later in self.list() if _step(later) > _step(path)])
            with suppress(OSError):
                write_bytes_whole(self.folder / LATEST, path.name.encode())
        return position


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _facts(path: Path) -> dict[str, Any]:
    """The manifest's; ValueError, KeyError or TypeError if it is not what was written."""
    found: dict[str, Any] = dict(json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    if found.pop("crc") != _crc_of_facts(found):
        raise ValueError(f"{MANIFEST} has changed")
    return found


def _crc_of_facts(facts: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _score(path: Path) -> float | None:
    try:
        found: float | None = _facts(path)["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _save(value: Any, path: Path) -> None:
    """torch.save, whose errors of the disk are all OSErrors."""
    try:
        torch.save(value, path)
    except RuntimeError as error:
        # of a full disk it says only that its archive failed
        raise OSError(str(error).splitlines()[0]) from error


def _crc(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            found = zlib.crc32(block, found)
    return found


def random_states() -> dict[str, Any]:
    """Where every random generator of this process that belongs to nobody in particular stands."""
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
