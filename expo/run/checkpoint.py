"""Checkpoints: the whole state of a run, written atomically by all ranks together, verified and loaded.

A checkpoint is a folder `step-000050`. It is written under a temporary name, flushed to disk, listed with sizes and
checksums in its manifest, renamed, and then named in the file `latest`. A folder with its final name whose files match
the manifest is whole. The folder must be on a file system that every rank can reach.

A checkpoint is data: loading one runs nothing in it (`expo/runtime/safe_load.py`).
"""

import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor

from expo.errors import CheckpointError, ExpoError, first_line
from expo.learner.policy import Policy
from expo.run.logs import LogState
from expo.run.manifest import (
    MANIFEST,
    UNREADABLE,
    Manifest,
    crc_of_file,
    find_change,
    find_code,
    find_unlisted,
    manifest_text,
    read_manifest,
    step_name,
)
from expo.runtime.atomic_io import flush, remove_leftovers, write_bytes_whole
from expo.runtime.distributed import Ranks
from expo.runtime.safe_load import load_plain
from expo_kernels import CurriculumTable

LATEST = "latest"

T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """The state of a run after a step, except for the policy: all else that the next step reads."""

    step: int
    curriculum: Mapping[str, Any]  # CurriculumTable.state_dict()
    generator: Tensor  # state of the generator that draws questions
    bad_updates: int = 0  # skipped updates in a row
    reply_tokens: int = 0  # sampled so far
    good_step: int = 0  # the last step after which a whole step without a sign of divergence was taken
    ahead: Sequence[Any] = ()  # `StepRollouts` of the steps sampled before; from a checkpoint, their `to_dict`
    random: Mapping[str, Any] | None = None  # this rank's `random_states()`; None: those at the time of saving


def current_position(step: int, curriculum: CurriculumTable, generator: torch.Generator, **further: Any) -> Position:
    """The position of a run after `step`, with the current states of its curriculum and random generators.

    Args:
        further: the position's bad_updates, reply_tokens, good_step and ahead, where they have not their defaults.
    """
    return Position(step, curriculum.state_dict(), generator.get_state(), **further, random=random_states())


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: of the checkpoints, shared by all ranks.
        ranks: the processes of the run; all of them call every method.
        config_hash: digest of the settings that may not change on resume; a checkpoint with another digest is refused.
            None: accept any, for reading only.
        earlier_hash: the same, as earlier versions computed it; their checkpoints are accepted too.
        flush_logs: flushes the run's logs to disk on rank 0, and returns their states for the manifest; None: it
            records none.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        config_hash: str | None,
        flush_logs: Callable[[], dict[str, LogState]] | None = None,
        earlier_hash: str | None = None,
    ) -> None:
        self.folder, self._ranks, self._flush_logs = folder, ranks, flush_logs
        self._config_hash, self._earlier_hash = config_hash, earlier_hash

    def save(self, position: Position, policy: Policy, score: float | None = None) -> Path:
        """Writes `step-NNNNNN` and returns its path; an existing checkpoint of that step is left as it is.

        Args:
            position: of the run.
            policy: writes its weights and optimizer states.
            score: of the policy, larger is better; None if it was not evaluated after this step.

        Raises: CheckpointError on every rank if a rank could not write; earlier checkpoints are untouched.
        """
        path = self.folder / step_name(position.step)
        if self._ranks.broadcast_from_rank0(path.is_dir()):
            return path
        temporary = path.with_name(f".{path.name}.part")
        try:
            self._run_on_all_ranks(lambda: self._make_folder(temporary))
            self._run_on_all_ranks(lambda: self._write(temporary, position, policy))
            checksums = self._run_on_all_ranks(lambda: self._checksums(temporary))
            logs = self._run_on_all_ranks(lambda: None if self._flush_logs is None else self._flush_logs())
            manifest = Manifest(
                step=position.step,
                ranks=self._ranks.size,
                score=score,
                config_hash=self._config_hash,
                files={name: entry for part in checksums for name, entry in part.items()},
                logs=logs[0],
            )
            self._run_on_all_ranks(lambda: self._publish(temporary, path, manifest))
        except CheckpointError as error:
            if self._ranks.is_rank0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {path} could not be written ({error}); earlier ones are untouched"
            ) from None
        return path

    def _run_on_all_ranks(self, function: Callable[[], T]) -> list[T]:
        """The result of `function` on each rank. Raises: CheckpointError on every rank if one had an OSError."""
        problem, result = None, None
        try:
            result = function()
        except OSError as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
        gathered = self._ranks.gather((problem, result))
        for rank, (problem, _) in enumerate(gathered):
            if problem is not None:
                raise CheckpointError(f"rank {rank}: {problem}")
        return [result for _, result in gathered]  # type: ignore[misc]  # None only where there is a problem

    def _make_folder(self, temporary: Path) -> None:
        if self._ranks.is_rank0:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "policy").mkdir(parents=True)

    def _write(self, temporary: Path, position: Position, policy: Policy) -> None:
        policy.save(temporary / "policy")
        _save(position.random or random_states(), temporary / f"random-rank{self._ranks.rank}.pt")
        if self._ranks.is_rank0:
            shared = {name: value for name, value in vars(position).items() if name != "random"}
            shared["ahead"] = [rollouts.to_dict() for rollouts in position.ahead]
            _save(shared, temporary / "position.pt")

    def _checksums(self, temporary: Path) -> dict[str, tuple[int, int]]:
        """Flushes this rank's share of the files to disk; their sizes and CRC-32."""
        entries = {}
        for path in self._ranks.shard(sorted(path for path in temporary.rglob("*") if path.is_file())):
            flush(path)
            entries[path.relative_to(temporary).as_posix()] = (path.stat().st_size, crc_of_file(path))
        return entries

    def _publish(self, temporary: Path, path: Path, manifest: Manifest) -> None:
        if not self._ranks.is_rank0:
            return
        write_bytes_whole(temporary / MANIFEST, manifest_text(manifest).encode())
        for folder in [path for path in temporary.rglob("*") if path.is_dir()]:
            flush(folder)
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
        with suppress(OSError):  # for people; the checkpoint has its final name
            write_bytes_whole(path.parent / LATEST, path.name.encode())

    def retain(self, newest: int, *, best: bool, good_step: int = 0, scored_since: int = 0) -> None:
        """Deletes checkpoints that are no longer needed.

        Args:
            newest: how many of the last checkpoints are kept.
            best: whether the one with the highest score is kept, too.
            good_step: the newest checkpoint up to this step is kept, too.
            scored_since: scores of earlier steps do not count, since they are those of other evaluations.
        """
        if not self._ranks.is_rank0:
            return
        paths = self.list()
        kept = {*paths[-newest:], *self.list(good_step)[-1:]}
        scores = {path: _score(path) for path in paths}
        scored = [path for path in paths if scores[path] is not None and _step(path) >= scored_since]
        if best and scored:
            kept.add(max(scored, key=lambda path: (scores[path], path)))
        self._delete([path for path in paths if path not in kept])

    @staticmethod
    def _delete(paths: "list[Path]") -> None:
        for path in paths:
            # renamed first: an interrupted deletion must not leave half of a checkpoint under its final name
            retired = path.with_name(f".{path.name}.old")
            try:
                shutil.rmtree(retired, ignore_errors=True)
                path.rename(retired)
                shutil.rmtree(retired)
            except OSError as error:
                sys.stderr.write(f"checkpoint {path} could not be deleted ({error}); delete it by hand\n")

    def list(self, up_to: int | None = None) -> "list[Path]":
        """Checkpoints with their final name, of steps up to `up_to`, oldest first.

        Raises: CheckpointError if their folder is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is no folder; restore the run's checkpoints, or move it away")
        paths = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
        return [path for path in sorted(paths, key=_step) if up_to is None or _step(path) <= up_to]

    def newest_step(self, up_to: int) -> int:
        """The step of the newest checkpoint up to a step; 0, the start of the run, if there is none."""
        return max((_step(path) for path in self.list(up_to)), default=0)

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        if self._ranks.is_rank0:
            self._delete([path for path in self.list() if _step(path) > step])

    def remove_leftovers(self) -> None:
        """Removes what interrupted processes left half written or half deleted."""
        if self._ranks.is_rank0:
            remove_leftovers(self.folder)

    def newest_whole(self, up_to: int | None = None) -> Path | None:
        """The newest checkpoint, of a step up to `up_to`, that matches its manifest; None if there are no checkpoints.

        A checkpoint that does not match is reported on stderr and skipped.

        Raises: CheckpointError if there are checkpoints, but none of them is whole, or one names code to run.
        """
        paths = self._ranks.broadcast_from_rank0(self.list(up_to))
        for path in reversed(paths):
            problem = self._problem(path)
            if problem is None:
                return path
            if self._ranks.is_rank0:
                sys.stderr.write(f"checkpoint {path} is not whole ({problem}); trying the one before\n")
        if paths:
            raise CheckpointError(
                f"none of the {len(paths)} checkpoints in {self.folder} is whole; restore one, or delete them to start "
                f"the run over"
            )
        return None

    def whole(self, step: int) -> Path:
        """The checkpoint after `step`.

        Raises: CheckpointError if there is none, it does not match its manifest, or it names code to run.
        """
        paths = self._ranks.broadcast_from_rank0({_step(path): path for path in self.list()})
        if step not in paths:
            known = ", ".join(map(str, paths)) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has {known}")
        problem = self._problem(paths[step])
        if problem is not None:
            raise CheckpointError(f"checkpoint {paths[step]} is not whole ({problem}); choose another step")
        return paths[step]

    def _problem(self, path: Path) -> str | None:
        """Why the checkpoint is not whole, on every rank; None if it is.

        Raises: CheckpointError on every rank if its files match the manifest, but would run code.
        """
        inspected = self._ranks.gather(self._inspect(path))
        problems = [problem for problem, _ in inspected if problem is not None]
        code = [found for _, found in inspected if found is not None]
        if not problems and code:
            raise CheckpointError(
                f"checkpoint {path} is refused: {code[0]}, and this program writes data only; the folder was forged, "
                f"do not use it"
            )
        return problems[0] if problems else None

    def _inspect(self, path: Path) -> tuple[str | None, str | None]:
        """Why this rank's share of the files is not whole, or what in it is more than data."""
        try:
            manifest = read_manifest(path)
        except UNREADABLE as error:
            return f"{MANIFEST} cannot be read: {type(error).__name__}, {first_line(error)}", None
        if self._config_hash is not None and manifest.config_hash not in (self._config_hash, self._earlier_hash):
            return "it belongs to a run with other settings", None
        names = self._ranks.shard(sorted(manifest.files))
        try:
            problem = find_change(path, manifest, names) or find_unlisted(path, manifest)
        except OSError as error:
            return f"{type(error).__name__}: {first_line(error)}", None
        return (problem, None) if problem else (None, find_code(path, names))

    def load(self, path: Path, policy: Policy) -> Position:
        """Restores the policy and this rank's random states from a whole checkpoint; returns the run's position.

        The random states are restored only if the number of ranks is the one that saved them.

        Raises: CheckpointError on every rank if one of them cannot load its files.
        """
        position = self._ranks.raise_on_all_ranks(lambda: self._load(path, policy))
        self.delete_after(_step(path))  # they are not whole or diverged, and the run will write them again
        if self._ranks.is_rank0:
            with suppress(OSError):
                write_bytes_whole(self.folder / LATEST, path.name.encode())
        return position

    def _load(self, path: Path, policy: Policy) -> Position:
        try:
            saved_size = read_manifest(path).ranks
            position = Position(**load_plain(path / "position.pt"))
            if position.step != _step(path):
                raise ValueError(f"position.pt is that of step {position.step}")
            policy.load(path / "policy", self._ranks.size != saved_size)
            if self._ranks.size == saved_size:
                _set_random_states(load_plain(path / f"random-rank{self._ranks.rank}.pt"))
        except ExpoError:
            raise
        except Exception as error:  # files that match a manifest but not this run raise many unrelated types
            raise CheckpointError(
                f"checkpoint {path} cannot be loaded ({type(error).__name__}: {first_line(error)}); restore it, or "
                f"delete it to continue from the one before"
            ) from error
        return position

    def logs_at(self, path: Path) -> dict[str, LogState] | None:
        """The states of the logs that a whole checkpoint recorded; None if it is of an earlier version."""
        return read_manifest(path).logs


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _score(path: Path) -> float | None:
    try:
        return read_manifest(path).score
    except UNREADABLE:
        return None


def _save(value: Any, path: Path) -> None:
    """torch.save that raises an OSError for every error of the disk."""
    try:
        torch.save(value, path)
    except RuntimeError as error:
        # on a full disk its message is only that the archive failed
        raise OSError(first_line(error)) from error


def random_states() -> dict[str, Any]:
    """The states of this process's global random generators: Python's, numpy's and torch's."""
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
