"""The processes of a run: joining, sharing work, collectives, and errors that every rank raises.

Under `deepspeed` or `torchrun`, each rank reads its number from the environment; without a launcher, a run is one rank.
Objects and CPU tensors are sent over gloo, tensors of the policy over NCCL where there are GPUs.
"""

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from expo.errors import ConfigError, ExpoError, first_line
from expo.runtime.rendezvous import MOST_NAMED, Meeting, ranks_named, reported_signals

T = TypeVar("T")

REPORT_AFTER_S = 2.0  # an error that waits longer for the other ranks is printed before they have come


class Ranks:
    """The rank of this process, and collectives over all ranks of the run.

    Threads communicate independently of each other, if all but one call `use_group` first.
    """

    def __init__(self, device: torch.device, rank: int, size: int) -> None:
        self.device, self.rank, self.size = device, rank, size
        self._of_thread = threading.local()

    def new_group(self) -> Any:
        """A process group of all ranks for one more thread; all ranks call it together. None for a single rank."""
        return None if self.size == 1 else dist.new_group(backend="gloo")

    def use_group(self, group: Any) -> None:
        """Has all further collectives of this thread use a group from `new_group`."""
        self._of_thread.group = group

    @property
    def _group(self) -> Any:
        """The process group of this thread; None: the default one."""
        return getattr(self._of_thread, "group", None)

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shard(self, items: Sequence[T], width: int = 1) -> list[T]:
        """This rank's share of `items`: every size-th one from its number on; `width` consecutive ranks share it."""
        return list(items[self.rank // width :: self.size // width])

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in order of rank, on every rank; they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def all_gather_tensor(self, values: Tensor) -> list[Tensor]:
        """The tensors of all ranks in order of rank, on every rank.

        Args:
            values: [n] on the CPU; n may differ between ranks, the dtype must not.
        """
        if self.size == 1:
            return [values]
        lengths = torch.empty(self.size, dtype=torch.int64)
        dist.all_gather_into_tensor(lengths, torch.tensor([len(values)]), group=self._group)
        longest = int(lengths.max())
        if longest == 0:
            return [values] * self.size
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        gathered = values.new_empty(self.size * longest)
        dist.all_gather_into_tensor(gathered, padded, group=self._group)
        rows = gathered.view(self.size, longest)
        return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    def unshard(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """The items that `shard` split, in their original order."""
        total = sum(len(share) for share in shares)
        return [shares[index % len(shares)][index // len(shares)] for index in range(total)]

    def broadcast_from_rank0(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        objects = [value]
        dist.broadcast_object_list(objects, src=0, group=self._group)
        return objects[0]

    def broadcast_tensors_from_rank0(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Rank 0's tensors, on the CPU, on every rank; those of the other ranks are ignored."""
        if self.size == 1:
            return list(tensors)
        shapes = self.broadcast_from_rank0([(tensor.shape, tensor.dtype) for tensor in tensors])
        if not self.is_rank0:
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        for tensor in tensors:
            if tensor.numel():
                dist.broadcast(tensor, src=0, group=self._group)
        return list(tensors)

    def run_on_rank0(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 and returns its result on every rank.

        Raises: on every rank, an ExpoError that rank 0 raised; any other error is a RuntimeError on the other ranks.
        """
        outcome: list[Any] = [None, None]  # result, error
        if self.is_rank0:
            try:
                outcome[0] = function()
            except ExpoError as error:
                outcome[1] = error
            except Exception as error:
                self.broadcast_from_rank0([None, RuntimeError(f"rank 0: {error!r}")])
                raise
        result, raised = self.broadcast_from_rank0(outcome)
        if raised is not None:
            raise raised
        value: T = result
        return value

    def raise_on_all_ranks(self, function: Callable[[], T]) -> T:
        """Calls `function` on every rank and returns this rank's result.

        Raises: on every rank, an ExpoError that one rank raised; of several, that of the lowest rank. Any other error
            is raised on its own rank as it is, and on the other ranks as an ExpoError that names rank and error.
        """
        raised: ExpoError | None = None
        other: Exception | None = None
        try:
            result = function()
        except ExpoError as error:
            raised = error if self.is_rank0 else type(error)(f"rank {self.rank}: {error}")
        except Exception as error:
            raised, other = ExpoError(f"rank {self.rank} failed: {type(error).__name__}: {first_line(error)}"), error
        errors = [error for error in self._gather_errors(raised) if error is not None]
        if other is not None:
            raise other
        if errors:
            raise errors[0]
        return result

    def _gather_errors(self, raised: ExpoError | None) -> list[ExpoError | None]:
        """The errors of all ranks; one that has to wait for the other ranks is printed, since they may never come."""
        report = threading.Timer(REPORT_AFTER_S, lambda: sys.stderr.write(f"rank {self.rank} waits to end: {raised}\n"))
        report.daemon = True
        if raised is not None and self.size > 1:
            report.start()
        try:
            return self.gather(raised)
        finally:
            report.cancel()

    def require_equal(self, facts: Mapping[str, str], remedy: str) -> None:
        """Compares what each rank was given.

        Args:
            facts: by what they are called in the error.
            remedy: what to do about a difference, for the error.

        Raises: ConfigError, on every rank, that names what differs, and the ranks, those of the rarest value first.
        """
        digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
        if len(set(self.gather(digest))) == 1:
            return
        gathered = self.gather(dict(facts))
        names = dict.fromkeys(name for given in gathered for name in given)
        values = {name: [given.get(name, "nothing") for given in gathered] for name in names}
        differing = {name: found for name, found in values.items() if len(set(found)) > 1}
        name, found = next(iter(differing.items()))
        ranks_of: dict[str, list[int]] = {}
        for rank, value in enumerate(found):
            ranks_of.setdefault(value, []).append(rank)
        # the rarest first: where one rank differs from all others, it is the one to look at
        groups = sorted(ranks_of.items(), key=lambda group: (len(group[1]), -group[1][0]))
        listed = ", ".join(f"{value} on {ranks_named(ranks)}" for value, ranks in groups[:MOST_NAMED])
        more = f" and in {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ConfigError(f"the ranks differ in {name}{more}: {listed}; {remedy}")

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the ranks."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over the ranks."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        if self.size > 1:
            self.all_reduce_sum([0.0])

    def _all_reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        reduced: Tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, op=operation, group=self._group)
        result: list[float] = reduced.tolist()
        return result


def join_ranks(
    device_name: str, timeout_s: float, on_meeting: Callable[[Mapping[int, int]], None] | None = None
) -> Ranks:
    """Joins the other processes of the run, if there are any; does nothing in a process that has joined already.

    Args:
        device_name: torch device of this rank's policy; "cuda": GPU number LOCAL_RANK; "auto": the same, or the CPU if
            there is no GPU.
        timeout_s: seconds that a collective waits for the other ranks before it fails.
        on_meeting: called with the process ids of the ranks on this machine, by rank, before they connect.

    Raises:
        ConfigError: if the device cannot be used, or the environment does not give this process a rank.
        RankError: if the other ranks do not come.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and device_name != "cpu" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "WORLD_SIZE" in os.environ:
            meeting = Meeting()
            try:
                with reported_signals(lambda: f"rank {os.environ.get('RANK')}, phase start: it waits for {meeting}"):
                    store, rank, size = meeting.attend(timeout_s)
                    if on_meeting is not None:
                        on_meeting(meeting.local_processes)
                    store = dist.PrefixStore("default_pg", store)  # type: ignore[attr-defined]
                    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            except ValueError as error:
                raise ConfigError(
                    f"WORLD_SIZE is set, but the ranks cannot be joined ({first_line(error)}); start with "
                    f"torchrun or deepspeed, or unset it"
                ) from error
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
            store = dist.HashStore()  # type: ignore[attr-defined]  # local to this process: no port is opened
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    ranks = Ranks(torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    ranks.device = ranks.raise_on_all_ranks(lambda: use_device(device_name))
    return ranks


def leave_ranks() -> None:
    """Leaves the process group; no collective may follow."""
    if dist.is_initialized():
        dist.destroy_process_group()


def use_device(name: str) -> torch.device:
    """The device that `run.device` names on this rank. A GPU becomes the current one, on which events, streams and NCCL
    run, and LOCAL_RANK its number, from which DeepSpeed takes it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            _refuse_shared_gpu(device)
            if not torch.cuda.is_available():
                raise RuntimeError("PyTorch finds no GPU, or was built without CUDA")
            index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
            os.environ["LOCAL_RANK"] = str(index)
        return torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"run.device = {name} cannot be used here: {first_line(error)}") from error


def _refuse_shared_gpu(device: torch.device) -> None:
    # torchrun, deepspeed, and others, for which all ranks may be on this machine
    given = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"))
    num_ranks = int(next((number for number in given if number is not None), "1"))
    if device.index is not None and num_ranks > 1:
        raise ConfigError(
            f"run.device = {device} is one GPU for the {num_ranks} ranks of this machine; take run.device = cuda, "
            f"which gives each rank its own"
        )
