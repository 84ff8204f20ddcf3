"""A cache of sampled replies on disk, kept until the next checkpoint: a run killed after sampling resumes with them.

There is one file for each resampling round of a step. It is used only if the same replies would be sampled again: under
the same settings, for the same step and questions, from the same weights, which the policy's log-probs of the probe
identify; and only if its checksum is that of its content.
"""

import gzip
import hashlib
import io
import pickle
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo.rollout.packing import PackedReplies, broadcast_replies, pack_replies
from expo.runtime.atomic_io import remove_leftovers, write_bytes_whole
from expo.runtime.distributed import Ranks
from expo.types import Reply

# nats, on the probe. Both sides are the policy's own log-probs by one code path, also in bfloat16, so equal weights
# differ by 0 on one machine. Where other ranks or kernels round differently by more, replies are sampled again.
SAME_WEIGHTS = 1e-4
# errors that a truncated, damaged or foreign file raises
UNREADABLE = (
    OSError, EOFError, zlib.error, pickle.UnpicklingError, RuntimeError, LookupError, TypeError, ValueError,
    AttributeError, AssertionError, OverflowError,
)  # fmt: skip


class ReplyCache:
    """Samples replies only if they are not in the cache.

    Args:
        folder: folder of the files; only rank 0 reads and writes it.
        ranks: the processes of the run; all of them call every method together.
        settings: digest of the settings that determine the run's results.
        report: shows a line to the user.
        is_on: whether the cache is used at all.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        settings: str,
        report: Callable[[str], None],
        *,
        is_on: bool,
    ) -> None:
        self._folder, self._ranks, self._settings = folder, ranks, settings
        self._report, self._is_on = report, is_on

    def replies(
        self,
        step: int,
        round_index: int,
        question_ids: Sequence[str],
        probe_logps: Callable[[], Tensor],
        sample: Callable[[], list[list[Reply]]],
    ) -> list[list[Reply]]:
        """The replies of one round of a step, for each question in order: from the cache, or else from `sample`.

        `probe_logps` gives the log-probs of the probe, in nats, under the weights that sample; called on every rank.
        """
        if not self._is_on:
            return sample()
        path = self._folder / f"step-{step:06d}-round-{round_index}.gz"
        facts = {"settings": self._settings, "step": step, "round": round_index, "questions": list(question_ids)}
        probe = probe_logps()
        cached: PackedReplies | None = None

        def read() -> bool:
            nonlocal cached
            cached = self._read(path, facts, probe)
            return cached is not None

        if self._ranks.run_on_rank0(read):
            return broadcast_replies(cached, self._ranks)
        sampled = sample()
        if self._ranks.is_rank0:
            packed = pack_replies(sampled)
            self._write(path, {**facts, "probe": probe, **packed.to_dict(), "checksum": _checksum(facts, packed)})
        return sampled

    def drop(self, step: int) -> None:
        """Deletes the files of all steps up to `step`, and half-written files of a killed process."""
        if not self._ranks.is_rank0 or not self._folder.is_dir():
            return
        remove_leftovers(self._folder)
        for path in self._folder.iterdir():
            named = re.fullmatch(r"step-(\d+)-round-\d+\.gz", path.name)
            if named and int(named[1]) <= step:
                with suppress(OSError):  # the next checkpoint tries again
                    path.unlink()

    def _read(self, path: Path, facts: Mapping[str, Any], probe: Tensor) -> PackedReplies | None:
        if not path.exists():
            return None
        try:
            content = torch.load(io.BytesIO(_unzip(path.read_bytes())), weights_only=True)
            problem = _difference(content, facts, probe)
            if problem is None:
                replies = PackedReplies.from_dict(content)
                if content["checksum"] == _checksum(facts, replies):
                    self._report(f"step {facts['step']}: replies taken from {path}")
                    return replies
                problem = "its replies were changed"
        except UNREADABLE as error:
            problem = f"it cannot be read ({type(error).__name__})"
        self._report(f"step {facts['step']}: {path} is ignored, since {problem}; sampling again")
        return None

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(dict(content), buffer)
        try:
            path.parent.mkdir(exist_ok=True)
            write_bytes_whole(path, gzip.compress(buffer.getvalue(), compresslevel=0, mtime=0))
        except OSError as error:
            self._report(f"warning: replies could not be kept in {path} ({error}); free some space")


def _unzip(data: bytes) -> bytes:
    """The content of a file that `_write` wrote. gzip barely compresses there; it adds a checksum and an end marker.

    Raises: EOFError if the file is truncated, or unpacks to more than its own size, which could fill the memory.
    """
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    content = unpacker.decompress(data, max_length=max(len(data), 1))
    if not unpacker.eof:
        raise EOFError("the end is missing")
    return content


def _difference(content: Mapping[str, Any], facts: Mapping[str, Any], probe: Tensor) -> str | None:
    """Why the facts in a file are not those of the replies that would be sampled again; None if they are."""
    differing = [name for name, value in facts.items() if content[name] != value]
    if not differing and not _is_near(content["probe"], probe):
        differing = ["weights"]
    if differing:
        return f"it was sampled with other {', '.join(differing)}"
    if "checksum" not in content:
        return "an earlier version wrote it without a checksum"
    return None


def _checksum(facts: Mapping[str, Any], replies: PackedReplies) -> str:
    """SHA-256 of what a file says, of every bit that training reads."""
    digest = hashlib.sha256(repr(sorted(facts.items())).encode("utf-8", "surrogatepass"))
    for tensor in replies.tensors():
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _is_near(cached: Tensor, probe: Tensor) -> bool:
    return cached.shape == probe.shape and bool((cached - probe).abs().max() <= SAME_WEIGHTS)
