"""A vocabulary-parallel output head: each rank of a process group holds some of its rows.

Tensor parallelism as in Megatron-LM (arXiv 1909.08053, section 3): every rank has all hidden states and ids and
computes the logits of its own columns. With PyTorch the maximum of each row, and then its sums, are reduced over the
ranks; with kernels one all-gather exchanges both.

Letters: V_r rows of the head on this rank, n rows of a chunk of logits, R ranks.
"""

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from expo_kernels import _compat


@dataclass(frozen=True)
class VocabShard:
    """The columns of the logits that this rank holds, and the reductions over all ranks."""

    group: dist.ProcessGroup
    start: int  # number of columns on the ranks before this one
    size: int  # V_r
    vocab_size: int  # on all ranks
    most_rows: int  # of a chunk; equal on every rank, because every rank takes part in every reduction

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The column of each id [n] on this rank, and whether this rank holds it."""
        local = ids - self.start
        return local.clamp(0, self.size - 1), (local >= 0) & (local < self.size)

    def columns_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The column of each id on this rank, outside [0, V_r) if another rank holds it, and whether any rank does."""
        ids = ids.long()
        return ids - self.start, (ids >= 0) & (ids < self.vocab_size)

    def all_gather(self, values: Tensor) -> Tensor:
        """`values` of every rank, [R, ...], in rank order."""
        gathered = values.new_empty(self.group.size(), *values.shape)
        if values.numel() > 0:
            _compat.all_gather(gathered.view(-1), values.reshape(-1), self.group)
        return gathered

    def all_reduce_max(self, values: Tensor) -> None:
        """Replace `values` by the maximum over all ranks."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)

    def all_reduce_sum(self, values: Tensor) -> None:
        """Replace `values` by the sum over all ranks."""
        dist.all_reduce(values, group=self.group)


class _Exchanged(NamedTuple):
    """What the ranks of a group told each other about their shards."""

    sizes: list[int]  # V_r of each rank
    most_rows: int  # of a chunk, on the rank with the fewest


# by the group, and by what its ranks know of the call: they must all find an entry, or none
_EXCHANGED: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Hashable, _Exchanged]] = weakref.WeakKeyDictionary()


def join(name: str, weight: Tensor, valid_ids: Tensor | None, most_rows: int, *, settings: Hashable) -> VocabShard:
    """The shard of this rank in the group of that name.

    Args:
        name: of the process group.
        weight: [V_r, H], this rank's rows of the head.
        valid_ids: the chosen ids of the valid tokens; an all-gather compares them, and the sizes of the shards, with
            those of the other ranks, and the host waits for it. None: only the sizes are exchanged, and only once for
            each shape of `weight`, so that later calls do not synchronise.
        most_rows: of a chunk on this rank; the shard has the minimum over the ranks.
        settings: what `most_rows` depends on besides `weight`, the same on every rank.

    Raises:
        ValueError: a rank has no rows, or the ranks have different tokens; raised on every rank.
    """
    group = _compat.process_group(name)
    entries = _EXCHANGED.setdefault(group, {})
    key = weight.shape, weight.device, settings
    if valid_ids is not None or key not in entries:
        entries[key] = _exchange(group, weight, valid_ids, most_rows)
    sizes, most_rows = entries[key]
    start = sum(sizes[: group.rank()])
    return VocabShard(group, start, weight.shape[0], sum(sizes), most_rows)


def _exchange(group: dist.ProcessGroup, weight: Tensor, valid_ids: Tensor | None, most_rows: int) -> _Exchanged:
    facts = torch.tensor([weight.shape[0], most_rows], device=weight.device)
    if valid_ids is not None:
        places = torch.arange(1, valid_ids.numel() + 1, device=valid_ids.device)
        facts = torch.cat([facts, places.sum().view(1), (valid_ids.long() * places).sum().view(1)])
    gathered = [torch.empty_like(facts) for _ in range(group.size())]
    dist.all_gather(gathered, facts, group=group)
    sizes, most, *tokens = torch.stack(gathered).T.tolist()
    if min(sizes) == 0:
        raise ValueError(f"weight has {sizes} rows on the ranks of its group; give each rank at least one")
    if any(len(set(said)) > 1 for said in tokens):
        raise ValueError(
            "the ranks that share weight were given different tokens; give all the same hidden, completion_ids and "
            "completion_mask (where ranks have their own data, gather weight instead)"
        )
    return _Exchanged(sizes, min(most))


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_group: Any
) -> tuple[Tensor, Tensor | None, str | None]:
    """This rank's rows of weight and bias, and the name of the group that shards them (None: they are not sharded).

    Raises:
        TypeError: `vocab_group` is not a process group.
        ValueError: a DTensor that is not sharded by rows over one group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if vocab_group is None:
            return weight, bias, None
        raise TypeError(f"vocab_group is a {type(vocab_group).__name__}, but torch.distributed is not initialized")
    from torch.distributed.tensor import DTensor, Shard

    if isinstance(weight, DTensor):
        if vocab_group is not None:
            raise ValueError("weight is a DTensor, which names its group itself; leave vocab_group out")
        mesh = weight.device_mesh
        parts = [tensor for tensor in (weight, bias) if tensor is not None]
        for tensor in parts:
            if not isinstance(tensor, DTensor) or tensor.placements != (Shard(0),) or tensor.device_mesh != mesh:
                raise ValueError(
                    f"the head is a DTensor on {mesh} with placements {weight.placements}; expected weight and bias "
                    "with placements (Shard(0),) on one one-dimensional mesh, or call .full_tensor() on both"
                )
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()  # type: ignore[attr-defined]
        vocab_group = mesh.get_group()
    if isinstance(hidden, DTensor) or isinstance(bias, DTensor):
        raise ValueError("hidden or bias is a DTensor, but weight is not; call .to_local() or .full_tensor() on it")
    if vocab_group is None:
        return weight, bias, None
    if not isinstance(vocab_group, dist.ProcessGroup):
        kind = type(vocab_group).__name__
        raise TypeError(f"vocab_group is a {kind}; expected a torch.distributed.ProcessGroup (mesh.get_group())")
    return weight, bias, vocab_group.group_name
