"""Replies and verdicts as a few flat tensors: what the ranks exchange, and what the reply cache stores.

A step of the paper samples 6.3 million tokens. Python lists would be pickled number by number; a tensor is sent as one
block of memory. Every value is restored bit for bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain, pairwise
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from expo.runtime.distributed import Ranks
from expo.types import Reply, Verdict, VerdictKind

KINDS: tuple[VerdictKind, ...] = get_args(VerdictKind)
ERRORS = "surrogatepass"  # a lone surrogate, which strict UTF-8 refuses, must not end a run


@dataclass(frozen=True)
class PackedReplies:
    """Groups of replies, concatenated.

    Args:
        group_sizes: [groups] int64, replies of each group.
        lengths: [replies] int64, tokens of each reply.
        token_ids: [tokens] int32.
        logps: [tokens] float64, nats: Python's own float, so no bit is lost.
        is_truncated: [replies] bool.
        text_lengths: [replies] int64, bytes of each text.
        texts: [bytes] uint8, in UTF-8.
    """

    group_sizes: Tensor
    lengths: Tensor
    token_ids: Tensor
    logps: Tensor
    is_truncated: Tensor
    text_lengths: Tensor
    texts: Tensor

    def tensors(self) -> list[Tensor]:
        """The fields in order: `PackedReplies(*tensors)` restores the object."""
        return [getattr(self, field.name) for field in fields(self)]

    def unpack(self) -> list[list[Reply]]:
        """The groups that were packed."""
        token_ids, logps = self.token_ids.tolist(), self.logps.tolist()
        texts = _decode(self.texts, self.text_lengths)
        replies = [
            Reply(token_ids[start:end], logps[start:end], is_truncated, text)
            for (start, end), is_truncated, text in zip(
                _spans(self.lengths), self.is_truncated.tolist(), texts, strict=True
            )
        ]
        return [replies[start:end] for start, end in _spans(self.group_sizes)]

    def to_dict(self) -> dict[str, Any]:
        """The contents of a file of the reply cache: the large fields as tensors, the others as lists."""
        return {
            "group_sizes": self.group_sizes.tolist(),
            "lengths": self.lengths.tolist(),
            "token_ids": self.token_ids,
            "logps": self.logps,
            "is_truncated": self.is_truncated.tolist(),
            "texts": _decode(self.texts, self.text_lengths),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PackedReplies":
        """What `to_dict` wrote. Raises: LookupError, TypeError, ValueError or RuntimeError if it did not."""
        texts, text_lengths = _encode(content["texts"])
        packed = cls(
            torch.tensor(content["group_sizes"], dtype=torch.int64),
            torch.tensor(content["lengths"], dtype=torch.int64),
            content["token_ids"],
            content["logps"],
            torch.tensor(content["is_truncated"], dtype=torch.bool),
            text_lengths,
            texts,
        )
        replies, tokens = int(packed.group_sizes.sum()), int(packed.lengths.sum())
        sizes = [len(part) for part in (packed.lengths, packed.is_truncated, text_lengths)]
        if sizes != [replies] * 3 or len(packed.token_ids) != tokens or len(packed.logps) != tokens:
            raise ValueError(f"{replies} replies of {tokens} tokens do not fit the sizes of their parts")
        return packed


def pack_replies(groups: Sequence[Sequence[Reply]]) -> PackedReplies:
    """Groups of replies as tensors."""
    replies = [reply for group in groups for reply in group]
    texts, text_lengths = _encode([reply.text for reply in replies])
    return PackedReplies(
        torch.tensor([len(group) for group in groups], dtype=torch.int64),
        torch.tensor([len(reply.token_ids) for reply in replies], dtype=torch.int64),
        _concatenate((reply.token_ids for reply in replies), np.int32),
        _concatenate((reply.logps for reply in replies), np.float64),
        torch.tensor([reply.is_truncated for reply in replies], dtype=torch.bool),
        text_lengths,
        texts,
    )


def all_gather_replies(groups: list[list[Reply]], ranks: Ranks) -> list[list[list[Reply]]]:
    """The groups of every rank, in their order, on every rank."""
    if ranks.size == 1:
        return [groups]
    gathered = _all_gather(pack_replies(groups).tensors(), ranks)
    # a rank need not unpack its own
    return [groups if rank == ranks.rank else PackedReplies(*tensors).unpack() for rank, tensors in enumerate(gathered)]


def broadcast_replies(packed: PackedReplies | None, ranks: Ranks) -> list[list[Reply]]:
    """Rank 0's groups, on every rank; the other ranks pass None."""
    tensors = [] if packed is None else packed.tensors()
    return PackedReplies(*ranks.broadcast_tensors_from_rank0(tensors)).unpack()


def all_gather_verdicts(verdicts: Sequence[Verdict], ranks: Ranks) -> list[list[Verdict]]:
    """The verdicts of every rank, in their order, on every rank."""
    if ranks.size == 1:
        return [list(verdicts)]
    kinds = torch.tensor([KINDS.index(verdict.kind) for verdict in verdicts], dtype=torch.uint8)
    has_answer = torch.tensor([verdict.answer is not None for verdict in verdicts], dtype=torch.bool)
    is_unevaluated = torch.tensor([verdict.is_unevaluated for verdict in verdicts], dtype=torch.bool)
    texts = _encode([verdict.answer or "" for verdict in verdicts])
    return [
        [
            Verdict(KINDS[code], answer if is_stated else None, is_open)
            for code, is_stated, is_open, answer in zip(
                codes.tolist(), stated.tolist(), unevaluated.tolist(), _decode(*answers), strict=True
            )
        ]
        for codes, stated, unevaluated, *answers in _all_gather([kinds, has_answer, is_unevaluated, *texts], ranks)
    ]


def _all_gather(tensors: Sequence[Tensor], ranks: Ranks) -> list[tuple[Tensor, ...]]:
    """The tensors of every rank, in the order of the ranks."""
    return list(zip(*(ranks.all_gather_tensor(tensor) for tensor in tensors), strict=True))


def _concatenate(parts: Iterable[Sequence[Any]], dtype: type[np.number[Any]]) -> Tensor:
    return torch.from_numpy(np.fromiter(chain.from_iterable(parts), dtype))


def _spans(lengths: Tensor) -> list[tuple[int, int]]:
    """Start and end of each part of a concatenation."""
    return list(pairwise(accumulate(lengths.tolist(), initial=0)))


def _encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """[bytes] uint8 and the [texts] int64 bytes of each."""
    encoded = [text.encode("utf-8", ERRORS) for text in texts]
    data = torch.from_numpy(np.frombuffer(bytearray().join(encoded), np.uint8))
    return data, torch.tensor([len(text) for text in encoded], dtype=torch.int64)


def _decode(data: Tensor, lengths: Tensor) -> list[str]:
    encoded = data.numpy().tobytes()
    return [encoded[start:end].decode("utf-8", ERRORS) for start, end in _spans(lengths)]
