"""The machine that a run is planned for: this one, or the GPUs of the command line."""

import os
from dataclasses import dataclass, replace

import torch

from expo.config import RunConfig
from expo.errors import ConfigError
from expo.planning.gpus import GpuKind, kind_named, parse_gpus
from expo.planning.memory import GIB
from expo.runtime.cli import Invocation
from expo.runtime.distributed import use_device
from expo.runtime.host import total_memory

ASSUMED_GPU_GIB = 80.0
GPUS_PER_NODE = 8  # assumed of machines that are not here


@dataclass(frozen=True)
class Machine:
    """The machine that a run is planned for.

    num_ranks: processes of the run; ranks_per_node: of them on one machine; memory_gib: of each GPU, or a rank's share
    of the machine's if is_cpu; source: where memory_gib comes from; vllm_gib: the part that vLLM's engines take beside
    the trainer; server_gpus: GPUs of vLLM's servers, which are not ranks; kind: of the GPU, None if unknown;
    is_here: whether it is this machine.
    """

    num_ranks: int
    ranks_per_node: int
    memory_gib: float
    source: str
    vllm_gib: float = 0.0
    server_gpus: int = 0
    kind: GpuKind | None = None
    is_cpu: bool = False
    is_here: bool = False

    @property
    def trainer_gib(self) -> float:
        """Memory that the trainer may take, unless vLLM sleeps while it trains."""
        return self.memory_gib - self.vllm_gib


def for_config(machine: Machine, config: RunConfig) -> Machine:
    """The machine with the GPUs and the share of memory that the configuration gives to vLLM.

    Raises: ConfigError if the GPUs are too few for vLLM's servers.
    """
    if machine.is_cpu or not config.rollout.engine.startswith("vllm"):
        return machine
    if config.rollout.engine == "vllm":
        return replace(machine, vllm_gib=config.vllm.gpu_memory_utilization * machine.memory_gib)
    if config.vllm.servers or machine.is_here:  # others start them, or the launcher started the ranks beside them
        return machine
    needed = config.vllm.num_servers * config.vllm.tensor_parallel
    if machine.num_ranks <= needed:
        raise ConfigError(
            f"rollout.engine = vllm-server takes {needed} of the {machine.num_ranks} GPUs (vllm.num_servers * "
            f"vllm.tensor_parallel), which leaves none to the policy; take rollout.engine = vllm, or more GPUs"
        )
    ranks = machine.num_ranks - needed
    return replace(machine, num_ranks=ranks, ranks_per_node=min(ranks, machine.ranks_per_node), server_gpus=needed)


def bare_machine(invocation: Invocation[RunConfig]) -> Machine:
    """The machine to plan for: --gpus, or --ranks and --gpu-memory-gib; what is not given is that of this machine.

    Raises: ConfigError if --gpus cannot be understood, run.device cannot be used here and no other GPUs are given, or
        WORLD_SIZE is not a positive integer.
    """
    config, ranks, memory_gib = invocation.config, invocation.ranks, invocation.gpu_memory_gib
    if invocation.gpus is not None:
        if ranks is not None or memory_gib is not None:
            raise ConfigError("--gpus says what --ranks and --gpu-memory-gib do; leave those out")
        _refuse_cpu(config, "--gpus")
        gpus = parse_gpus(invocation.gpus)
        return Machine(
            gpus.count, min(gpus.count, GPUS_PER_NODE), gpus.memory_gib, f"--gpus={invocation.gpus}", kind=gpus.kind
        )
    if ranks is None and memory_gib is None:
        return _this_machine(config)
    if memory_gib is not None:
        _refuse_cpu(config, "--gpu-memory-gib")
    if config.run.device == "cpu":
        return _cpus(ranks or 1)
    num_gpus = torch.cuda.device_count()
    num_ranks = ranks or _world_size() or num_gpus or 1
    kind = kind_named(torch.cuda.get_device_name(0)) if num_gpus else None
    source = "--gpu-memory-gib"
    if memory_gib is None:
        memory_gib, source = _gpu_memory() if num_gpus else (ASSUMED_GPU_GIB, "assumed; --gpus names others")
    return Machine(num_ranks, min(num_ranks, num_gpus or GPUS_PER_NODE), memory_gib, source, kind=kind)


def _refuse_cpu(config: RunConfig, flag: str) -> None:
    if config.run.device == "cpu":
        raise ConfigError(f"{flag} is for a run on GPUs, but run.device = cpu; leave one of the two out")


def _this_machine(config: RunConfig) -> Machine:
    device = use_device(config.run.device)
    num_ranks = _world_size()
    if device.type == "cpu":
        return _cpus(num_ranks or 1, is_here=True)
    memory_gib, source = _gpu_memory()
    num_gpus = torch.cuda.device_count() if device.index is None else 1
    num_ranks = num_ranks or num_gpus
    kind = kind_named(torch.cuda.get_device_name(device))
    return Machine(num_ranks, min(num_ranks, num_gpus), memory_gib, source, kind=kind, is_here=True)


def _cpus(num_ranks: int, *, is_here: bool = False) -> Machine:
    per_node = min(num_ranks, GPUS_PER_NODE)
    memory = total_memory()
    source = "this machine's memory" + (f" over {per_node} ranks" if per_node > 1 else "")
    return Machine(num_ranks, per_node, memory / per_node / GIB, source, is_cpu=True, is_here=is_here)


def _gpu_memory() -> tuple[float, str]:
    properties = torch.cuda.get_device_properties(0)
    return properties.total_memory / GIB, properties.name


def _world_size() -> int | None:
    """The number of ranks that a launcher has started; None without one."""
    given = os.environ.get("WORLD_SIZE", "")
    if given and (not given.isdecimal() or int(given) == 0):
        raise ConfigError(f"WORLD_SIZE is {given!r}; expected the number of ranks, or give --ranks=N")
    return int(given) if given else None
