"""Sampled replies, on disk until a checkpoint lies behind them: a run that died after sampling need not pay again.

One file for each round of a step, written whole. It is taken up only where the same would be sampled: by the same
settings, for the same step and questions, from the same weights, which the policy's log-probs of the probe tell.
"""

import gzip
import io
import pickle
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo.runtime.atomic_io import remove_leftovers, write_bytes_whole
from expo.runtime.distributed import Ranks
from expo.types import Reply

# nats, on the probe, in bfloat16 too: both sides are the policy's own, through one path, so that the same weights are
# at 0 on the same machine; where other ranks or kernels round otherwise by more, replies are sampled again
SAME_WEIGHTS = 1e-4
# what a file that was cut, changed or written by something else raises
UNREADABLE = (
    OSError, EOFError, zlib.error, pickle.UnpicklingError, RuntimeError, LookupError, TypeError, ValueError,
)  # fmt: skip


class ReplyCache:
    """Asks for replies only where they are not at hand.

    Args:
        folder: where they lie; rank 0 alone reads and writes it.
        ranks: the processes of the run; every method is called by all of them.
        settings: digest of the settings that make the run what it is.
        probe_logps: the policy's log-probs of the probe, nats; called on every rank.
        tell: what is shown to the person watching.
        is_on: whether replies are kept and taken up at all.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        settings: str,
        probe_logps: Callable[[], Tensor],
        tell: Callable[[str], None],
        *,
        is_on: bool,
    ) -> None:
        self._folder, self._ranks, self._settings = folder, ranks, settings
        self._probe_logps, self._tell, self._is_on = probe_logps, tell, is_on

    def replies(
        self, step: int, round_index: int, question_ids: Sequence[str], sample: Callable[[], list[list[Reply]]]
    ) -> list[list[Reply]]:
        """What a round of a step sampled, for each question in order: out of its file, or by `sample`."""
        if not self._is_on:
            return sample()
        path = self._folder / f"step-{step:06d}-round-{round_index}.gz"
        facts = {"settings": self._settings, "step": step, "round": round_index, "questions": list(question_ids)}
        probe = self._probe_logps()
        found = self._ranks.run_on_rank0(lambda: self._read(path, facts, probe))
        if found is None:
            found = sample()
            if self._ranks.is_rank0:
                self._write(path, {**facts, "probe": probe, **_packed(found)})
        return found

    def drop(self, step: int) -> None:
        """Deletes what was sampled up to `step`, and what a process that died has half written."""
        if not self._ranks.is_rank0 or not self._folder.is_dir():
            return
        remove_leftovers(self._folder)
        for path in self._folder.glob("step-*-round-*.gz"):
            if int(path.name.split("-")[1]) <= step:
                with suppress(OSError):  # the next checkpoint tries again
                    path.unlink()

    def _read(self, path: Path, facts: Mapping[str, Any], probe: Tensor) -> list[list[Reply]] | None:
        if not path.exists():
            return None
        try:
            # gzip, though hardly compressed, for its checksum and its end mark
            held = torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)
            differing = [name for name, value in facts.items() if held[name] != value]
            if not differing and not _is_near(held["probe"], probe):
                differing = ["weights"]
            if not differing:
                replies = _unpacked(held)
                self._tell(f"step {facts['step']}: replies taken from {path}")
                return replies
            problem = f"it was sampled with other {', '.join(differing)}"
        except UNREADABLE as error:
            problem = f"it cannot be read ({type(error).__name__})"
        self._tell(f"step {facts['step']}: {path} is ignored, since {problem}; sampling again")
        return None

    def _write(self, path: Path, held: Mapping[str, Any]) -> None:
        content = io.BytesIO()
        torch.save(dict(held), content)
        try:
            path.parent.mkdir(exist_ok=True)
            write_bytes_whole(path, gzip.compress(content.getvalue(), compresslevel=0, mtime=0))
        except OSError as error:
            self._tell(f"warning: replies could not be kept in {path} ({error}); free some space")


def _is_near(held: Tensor, probe: Tensor) -> bool:
    return held.shape == probe.shape and bool((held - probe).abs().max() <= SAME_WEIGHTS)


def _packed(replies: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """Few large tensors in place of many small lists; log-probs as float64, which is what Python's numbers are."""
    flat = [reply for group in replies for reply in group]
    return {
        "group_sizes": [len(group) for group in replies],
        "lengths": [len(reply.token_ids) for reply in flat],
        "token_ids": torch.tensor([token for reply in flat for token in reply.token_ids], dtype=torch.int32),
        "logps": torch.tensor([logp for reply in flat for logp in reply.logps], dtype=torch.float64),
        "is_truncated": [reply.is_truncated for reply in flat],
        "texts": [reply.text for reply in flat],
    }


def _unpacked(held: Mapping[str, Any]) -> list[list[Reply]]:
    token_ids, logps = held["token_ids"].tolist(), held["logps"].tolist()
    flat = [
        Reply(token_ids[start:end], logps[start:end], is_truncated, text)
        for (start, end), is_truncated, text in zip(
            pairwise(accumulate(held["lengths"], initial=0)), held["is_truncated"], held["texts"], strict=True
        )
    ]
    return [flat[start:end] for start, end in pairwise(accumulate(held["group_sizes"], initial=0))]
