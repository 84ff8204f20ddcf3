"""The folder of a run: opening it, and writing and reading its files."""

import errno
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from expo.config import RunConfig, load_config
from expo.errors import ConfigError, ExpoError, FolderError, first_line
from expo.reporting.reader import starts_of
from expo.run.changes import changes, initial_settings, is_free, is_record, is_steering, require_allowed
from expo.run.environment import ENVIRONMENT, describe_environment
from expo.run.logs import LOGS, LogState, cut, parse_object, parse_row
from expo.runtime.atomic_io import flush, write_bytes_whole
from expo.runtime.distributed import Ranks

RUNS = Path("runs")
ADDED_LATER = (
    "model.revision",
    "model.trust_remote_code",
    "data.columns",
    "data.template",
    "data.system",
    "data.chat_template_kwargs",
    "reward.verifier",
    "reward.unevaluated",
    "reward.think_tags",
    "rollout.stop_tokens",
    "policy.gradient_tolerance",
    "rollout.ahead",
    "rollout.exact",
    "vllm.lora",
)
"""Settings that checkpoints of earlier versions do not know: the digest leaves them out if they have their default."""


class RunFolder:
    """The files of a run. Lines are appended to its logs; every other file is written atomically.

    Args:
        path: the folder, created if it does not exist.
        is_writer: whether this rank writes; on the other ranks all writing methods do nothing.

    Raises: ConfigError if the folder cannot be created.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path, self._is_writer = path, is_writer
        self._lock: IO[str] | None = None
        self._logs: dict[str, LogState] = {}  # as this process wrote them, whatever is in the files
        if is_writer:
            with _folder_errors(path, ConfigError):
                path.mkdir(parents=True, exist_ok=True)

    def lock(self) -> None:
        """Locks the folder until `release`, or until this process ends.

        Raises: ConfigError if another process holds the lock, or the folder cannot be written.
        """
        if not self._is_writer:
            return
        with _folder_errors(self.path, ConfigError):
            self._lock = (self.path / ".lock").open("a")  # "w" would empty a file that a link here names
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is at work in run.dir = {self.path}; end it first, or choose another folder"
            ) from error

    def release(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()

    def append(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Appends rows to `<name>.jsonl`. Raises: FolderError if they cannot be written."""
        if not self._is_writer:
            return
        content = _json_lines(rows).encode("utf-8")
        with _folder_errors(self.path), (self.path / f"{name}.jsonl").open("ab") as file:
            file.write(content)
        self._logs[name] = self._logs.get(name, LogState()).extended(content)

    def write_text(self, name: str, text: str) -> None:
        """Writes one file atomically. Raises: FolderError if it cannot be written."""
        if self._is_writer:
            with _folder_errors(self.path):
                write_bytes_whole(self.path / name, text.encode("utf-8"))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes one JSON file atomically. Raises: FolderError if it cannot be written."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def record_start(self, num_ranks: int, changed: Mapping[str, Any] | None = None) -> list[str]:
        """Appends to environment.json the environment in which the run starts or resumes, and the changed settings.

        Returns: a message if the file was damaged, so that the earlier starts are lost.
        """
        if not self._is_writer:
            return []
        before = self.starts()
        is_lost = (self.path / ENVIRONMENT).exists() and not self.read_object(ENVIRONMENT)
        start = {**describe_environment(), "ranks": num_ranks, **({"changed": changed} if changed else {})}
        self.write_json(ENVIRONMENT, {"starts": [*before, start]})
        message = f"warning: {ENVIRONMENT} was damaged; the earlier starts of the run are lost from it"
        return [message] if is_lost else []

    def record_first_step(self, step: int) -> None:
        """Adds to the last start in environment.json the first step that it takes."""
        starts = self.starts()
        if self._is_writer and starts:
            self.write_json(ENVIRONMENT, {"starts": [*starts[:-1], {**starts[-1], "first_step": step}]})

    def starts(self) -> list[dict[str, Any]]:
        """Every start of the run in order, as environment.json records them; none if it is missing or damaged."""
        starts = starts_of(self.read_object(ENVIRONMENT))
        return [{name: v for name, v in start.items() if name != "changed" or is_record(v)} for start in starts]

    def remove(self, name: str) -> None:
        """Removes a file if it exists. Raises: FolderError if it cannot be removed."""
        if self._is_writer:
            with _folder_errors(self.path):
                (self.path / name).unlink(missing_ok=True)

    def read_object(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty if the file is missing or damaged."""
        try:
            return parse_object((self.path / name).read_bytes())
        except OSError:
            return {}

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of `<name>.jsonl`; what is not a whole row is left out."""
        path = self.path / f"{name}.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        return [row for row in map(parse_row, lines) if row]

    def rewind(self, step: int, saved: Mapping[str, LogState] | None = None) -> list[str]:
        """Cuts every log of the run after `step`: a resumed run writes the later lines again.

        Args:
            step: of the checkpoint; -1 without one, to start all logs anew.
            saved: the states of the logs at the checkpoint, None if it recorded none.

        Returns: a message for each log that lost lines, or whose lines were changed.

        Raises: FolderError if a log cannot be read or written.
        """
        messages: list[str] = []
        if not self._is_writer:
            return messages
        for name in LOGS:
            path = self.path / f"{name}.jsonl"
            with _folder_errors(self.path):
                content = self._read_log(path)
                kept, message = cut(name, content, step, saved.get(name) if saved else None)
                # also a link is replaced by a file: what it names is not this run's to write
                if kept != content or path.is_symlink():
                    write_bytes_whole(path, kept)
            self._logs[name] = LogState().extended(kept)
            messages += [message] if message else []
        return messages

    @staticmethod
    def _read_log(path: Path) -> bytes:
        if path.exists() and not path.is_file():
            raise FolderError(f"{path} is no file; move it away, then resume: the run goes on without those lines")
        return path.read_bytes() if path.exists() else b""

    def flush_logs(self) -> dict[str, LogState]:
        """Flushes the logs to disk, and returns their states. Raises: OSError if that fails."""
        if self._is_writer:
            for path in [self.path / f"{name}.jsonl" for name in LOGS]:
                if path.exists():  # one that somebody removed is reported on resume
                    flush(path)
        return {name: self._logs.get(name, LogState()) for name in LOGS}


@contextmanager
def _folder_errors(path: Path, kind: type[ExpoError] = FolderError) -> Iterator[None]:
    """Raises an OSError of the block as an error of this package, which the command prints as one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise kind(
            f"the folder {path} cannot be written ({reason}); check its path, its permissions and the free space"
        ) from error


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null in place of NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


# --- opening


def open_folder(config: RunConfig, resume: bool, ranks: Ranks) -> tuple[RunFolder, dict[str, list[Any]]]:
    """Locks the run's folder, which rank 0 chooses for all ranks.

    Returns: the folder, and [before, after] of the settings that have changed since the last start and on which the
        further steps depend.

    Raises: ConfigError if the folder holds a run and `resume` is not set, a run of another configuration, or a run that
        another process is at work on, or cannot be created.
    """
    path, changed = ranks.run_on_rank0(lambda: choose_folder(config, resume))
    folder = ranks.raise_on_all_ranks(lambda: RunFolder(path, is_writer=ranks.is_rank0))
    ranks.raise_on_all_ranks(folder.lock)
    return folder, changed


def write_start(folder: RunFolder, config: RunConfig, num_ranks: int, changed: Mapping[str, Any]) -> list[str]:
    """Records this start and the changed settings in environment.json, then writes config.yaml.

    In this order, a run that dies in between has lost no change.

    Returns: a message if environment.json was damaged.

    Raises: FolderError if they cannot be written.
    """
    messages = folder.record_start(num_ranks, changed)
    folder.write_text("config.yaml", config.to_yaml())
    return messages


def check_folder(config: RunConfig, resume: bool) -> Path:
    """The folder that `open_folder` would open; nothing is written. Raises: ConfigError as `open_folder`."""
    path, _ = choose_folder(config, resume)
    with _folder_errors(path, ConfigError):
        _require_writable(path)
        if (path / ".lock").exists():
            folder = RunFolder(path)
            folder.lock()
            folder.release()
    return path


def _require_writable(path: Path) -> None:
    """Raises: OSError if the folder could not be created, or nothing could be written into it."""
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def choose_folder(config: RunConfig, resume: bool) -> tuple[Path, dict[str, list[Any]]]:
    """The folder of the run, and the settings that have changed, as `open_folder` returns them. Raises: ConfigError."""
    path = config.run.dir or (_newest_run() if resume else None) or _new_run(config.run.seed)
    saved = path / "config.yaml"
    with _folder_errors(path, ConfigError):  # exists() raises an error for names that are too long
        is_run, holds_checkpoints = saved.exists(), any(path.glob("checkpoints/step-*"))
    if not resume and (is_run or holds_checkpoints):
        raise ConfigError(
            f"run.dir = {path} already holds a run; add --resume to continue it, or choose another folder"
        )
    changed = changes(_saved_settings(saved), config.settings) if is_run else {}
    require_allowed(changed, path)
    return path, changed


def _saved_settings(saved: Path) -> dict[str, Any]:
    try:
        return load_config(saved).settings
    except ExpoError as error:
        raise ConfigError(
            f"{first_line(error)}; this file of the run is damaged: remove it, and --resume writes it again if the "
            f"settings are those of the checkpoints"
        ) from error


def _new_run(seed: int) -> Path:
    return RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}"


def _newest_run() -> Path | None:
    runs = sorted(RUNS.glob("*/config.yaml"))
    return runs[-1].parent if runs else None


# --- digests


def fixed_digest(config: RunConfig, also: Sequence[str] = ()) -> str:
    """SHA-256 of the settings that may not change on resume, and of those named in `also`; the checkpoints and cached
    replies of a run carry it.
    """
    kept = {n: v for n, v in config.settings.items() if not (is_free(n) or is_steering(n)) or n in also}
    return _digest(config, kept)


def settings_digest(config: RunConfig, starts: Sequence[Mapping[str, Any]] = ()) -> str:
    """The digest in checkpoints of earlier versions: of the settings with which the run started, but for the free ones.

    Args:
        config: the present one.
        starts: every start of the run, as environment.json records them.
    """
    initial = initial_settings(config.settings, starts)
    return _digest(config, {n: v for n, v in initial.items() if not is_free(n)})


def _digest(config: RunConfig, settings: Mapping[str, Any]) -> str:
    kept = {n: v for n, v in settings.items() if n not in ADDED_LATER or v != _default(config, n)}
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()


def _default(config: RunConfig, name: str) -> Any:
    section, field = name.split(".")
    return type(getattr(config, section)).model_fields[field].get_default(call_default_factory=True)
