"""Prints the memory, steps and disk space of a run before it starts: `python -m expo.train CONFIG.yaml --dry-run`.

The plan needs only the shape of the model: no weights, GPU or question files. `memory.py` estimates memory and
`expo/learner/flops.py` counts parameters; this file finds the shape, prints the plan and refuses runs that cannot work.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from expo.config import RECIPES, ModelSection, RunConfig
from expo.data import ReadOptions, count_questions
from expo.errors import ConfigError, first_line
from expo.learner.flops import ModelShape
from expo.learner.model_files import check_model_path, hub_options, load_model_config
from expo.planning.memory import GIB, RUNTIME_BYTES, Footprint, Part
from expo.rollout.vllm.common import check_ranks
from expo.runtime.cli import Invocation
from expo.runtime.console import write_stdout

SHIPPED_SHAPES = RECIPES / "models"  # <organisation>--<name>.json, as in the models' own config.json
ASSUMED_GPU_GIB = 80.0
ASSUMED_GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    """The machine that a run is planned for; memory_gib: of a GPU in GiB, None without a GPU or limit."""

    num_ranks: int
    ranks_per_node: int
    memory_gib: float | None
    source: str
    """Where memory_gib comes from."""
    vllm_gib: float = 0.0
    """vLLM's share of a GPU in GiB; it is subtracted from memory_gib, unless vLLM sleeps during the policy update."""


def print_plan(invocation: Invocation[RunConfig]) -> int:
    """Prints the plan of a run and returns the exit code, 0.

    Raises: ConfigError if the run cannot work; if it does not fit the GPU, the plan is printed first.
    """
    config = invocation.config
    machine = plan_machine(config, invocation.ranks, invocation.gpu_memory_gib)
    check_batches(config, machine.num_ranks)
    if config.rollout.engine == "vllm":
        check_ranks(config.vllm, machine.num_ranks)
    shape, source = find_shape(config.model)
    footprint = Footprint(config, shape, machine.num_ranks)
    if os.environ.get("RANK", "0") == "0":
        write_stdout(describe(footprint, machine, source))
    check_memory(footprint, machine)
    return 0


def plan_machine(config: RunConfig, ranks: int | None, memory_gib: float | None) -> Machine:
    """The machine to plan for, without the memory of a vLLM that runs beside the trainer.

    Args:
        ranks: number of GPUs; None: WORLD_SIZE, or the GPUs of this machine, or 1.
        memory_gib: memory of each GPU; None: that of the GPU of this machine, or ASSUMED_GPU_GIB.

    Raises: ConfigError if WORLD_SIZE is not a positive integer.
    """
    machine = _whole_machine(config, ranks, memory_gib)
    if config.rollout.engine != "vllm" or machine.memory_gib is None:
        return machine
    share = config.vllm.gpu_memory_utilization
    vllm_gib, remaining_gib = share * machine.memory_gib, (1 - share) * machine.memory_gib
    if config.vllm.sleep:
        return replace(machine, vllm_gib=vllm_gib)
    source = f"{machine.source}, less {share:.0%} for vLLM"
    return replace(machine, vllm_gib=vllm_gib, memory_gib=remaining_gib, source=source)


def _whole_machine(config: RunConfig, ranks: int | None, memory_gib: float | None) -> Machine:
    num_gpus = 0 if config.run.device == "cpu" else torch.cuda.device_count()
    world_size = os.environ.get("WORLD_SIZE", "")
    if ranks is None and world_size and (not world_size.isdecimal() or int(world_size) == 0):
        raise ConfigError(f"WORLD_SIZE is {world_size!r}; expected the number of ranks, or give --ranks=N")
    num_ranks = ranks or int(world_size or 0) or num_gpus or 1
    ranks_per_node = min(num_ranks, num_gpus or ASSUMED_GPUS_PER_NODE)
    if memory_gib is not None:
        return Machine(num_ranks, ranks_per_node, memory_gib, "given")
    if num_gpus:
        properties = torch.cuda.get_device_properties(0)
        return Machine(num_ranks, ranks_per_node, properties.total_memory / GIB, properties.name)
    if config.run.device == "cpu":
        return Machine(num_ranks, ranks_per_node, None, "run.device = cpu")
    return Machine(num_ranks, ranks_per_node, ASSUMED_GPU_GIB, "assumed, since there is no GPU here")


def find_shape(config: ModelSection) -> tuple[ModelShape, str]:
    """The model's shape and its source: a local folder, a file in expo/recipes/models, or the hub and its cache.

    Raises: ConfigError if it is in none of them, or if the parameters of its model type cannot be counted.
    """
    path = check_model_path(config)
    shipped = SHIPPED_SHAPES / f"{path.replace('/', '--')}.json"
    if shipped.is_file() and not Path(path).exists():
        values = json.loads(shipped.read_text(encoding="utf-8"))
        return ModelShape.from_config(AutoConfig.for_model(**values)), f"expo/recipes/models/{shipped.name}"
    try:
        if Path(path).exists():
            return ModelShape.from_config(load_model_config(config)), f"{path}/config.json"
        return ModelShape.from_config(_from_hub(config)), "the hub's config.json"
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the shape of model.path = {config.path} cannot be read ({first_line(error)}); "
            f"give a folder with its config.json"
        ) from error


def _from_hub(config: ModelSection) -> Any:
    """The configuration from the hub's local cache, which needs no network, or else from the hub."""
    try:
        return AutoConfig.from_pretrained(config.path, local_files_only=True, **hub_options(config))
    except OSError:
        return AutoConfig.from_pretrained(config.path, **hub_options(config))


def check_batches(config: RunConfig, num_ranks: int) -> None:
    """Raises: ConfigError if a rank would have no reply in an optimizer step."""
    replies = config.rollout.questions_per_step * config.rollout.group_size
    per_update = replies // config.policy.updates_per_step
    if per_update < num_ranks:
        raise ConfigError(
            f"{replies} replies a step in policy.updates_per_step = {config.policy.updates_per_step} updates are "
            f"{per_update} an update, fewer than the {num_ranks} ranks; lower updates_per_step, raise "
            f"rollout.questions_per_step, or take {per_update} ranks or fewer"
        )


def check_memory(footprint: Footprint, machine: Machine) -> None:
    """Raises: ConfigError if the largest phase does not fit a GPU; it names the largest part and how to lower it."""
    if machine.memory_gib is not None and machine.vllm_gib:
        _check_vllm(footprint, machine.vllm_gib, machine.memory_gib)
    phase, num_bytes = footprint.peak()
    if machine.memory_gib is None or num_bytes <= machine.memory_gib * GIB:
        return
    largest = max([*footprint.resident(), *footprint.phases()[phase]], key=lambda part: part.num_bytes)
    raise ConfigError(
        f"{phase} takes {num_bytes / GIB:.1f} GiB of the GPU's {machine.memory_gib:.1f} ({machine.source}); the "
        f"largest part is {largest.name} with {largest.num_bytes / GIB:.1f} GiB: try {largest.advice}"
    )


def _check_vllm(footprint: Footprint, vllm_gib: float, memory_gib: float) -> None:
    """Raises: ConfigError if vLLM's share cannot hold its weights, or does not fit beside the trainer's memory."""
    weights = footprint.engine_weight_bytes() / GIB
    if weights >= vllm_gib:
        raise ConfigError(
            f"vLLM's weights take {weights:.1f} GiB of each GPU, but its share is {vllm_gib:.1f}; raise "
            f"vllm.gpu_memory_utilization or vllm.tensor_parallel"
        )
    resident = (RUNTIME_BYTES + sum(part.num_bytes for part in footprint.resident())) / GIB
    if footprint.config.vllm.sleep and resident + vllm_gib > memory_gib:
        raise ConfigError(
            f"while vLLM is awake, its {vllm_gib:.1f} GiB and the trainer's {resident:.1f} exceed the GPU's "
            f"{memory_gib:.1f}; lower vllm.gpu_memory_utilization, or raise policy.zero_stage"
        )


def describe(footprint: Footprint, machine: Machine, shape_source: str) -> str:
    """The plan as text: model, memory, CPU memory, steps and disk space."""
    config = footprint.config
    nodes = -(-machine.num_ranks // machine.ranks_per_node)
    title = (
        f"{config.model.path} on {_count(machine.num_ranks, 'rank')}, {machine.ranks_per_node} a node, "
        f"{_count(nodes, 'node')}; nothing has been loaded"
    )
    limit = "no limit known" if machine.memory_gib is None else f"{machine.memory_gib:.1f} GiB"
    blocks = [
        (f"model: shape from {shape_source}", _model_rows(footprint)),
        (
            f"memory of each GPU, upper bounds in GiB: ZeRO {config.policy.zero_stage}, {limit} ({machine.source})",
            _memory_rows(footprint),
        ),
        (f"CPU memory of each node, {_count(machine.ranks_per_node, 'rank')}, GiB", _cpu_rows(footprint, machine)),
        ("steps", _step_rows(footprint)),
        ("disk, GiB", _disk_rows(footprint)),
    ]
    return "\n".join([title, *(line for heading, rows in blocks for line in ("", heading, *_table(rows)))]) + "\n"


_Rows = list[tuple[str, str, str]]  # name, number, note


def _model_rows(footprint: Footprint) -> _Rows:
    shape, rank = footprint.shape, footprint.config.policy.lora_rank
    rows = [
        ("embeddings", f"{shape.embedding_parameters:,}", f"{shape.vocab_size:,} x {shape.hidden_size:,}"),
        (
            f"{shape.num_layers} layers",
            f"{shape.num_layers * shape.layer_parameters:,}",
            f"{shape.layer_parameters:,} each",
        ),
        ("last norm", f"{shape.hidden_size:,}", ""),
        ("head", f"{shape.head_parameters:,}", "tied to the embeddings" if shape.is_tied else "its own"),
        ("parameters", f"{shape.num_parameters:,}", "" if rank else "all trained"),
    ]
    if rank:
        share = footprint.trained_parameters / shape.num_parameters
        rows.append(("LoRA, trained", f"{footprint.trained_parameters:,}", f"rank {rank}, {share:.2%} as many"))
    return rows


def _memory_rows(footprint: Footprint) -> _Rows:
    policy = footprint.config.policy
    notes = {
        "weights": "on the CPU between uses" if policy.offload_parameters else "",
        "gradients": "on the CPU" if policy.offload_optimizer else "",
        "optimizer states": "on the CPU" if policy.offload_optimizer else "float32",
        "frozen reference": _reference_note(footprint),
        "activations": f"{footprint.micro_batch_tokens():,} tokens, "
        + ("recomputed" if policy.gradient_checkpointing else "all kept"),
        "key-value cache": f"{footprint.sampled_at_once():,} sequences of {footprint.longest:,} tokens",
    }

    def rows_of(parts: Iterable[Part], include_zero: bool) -> _Rows:
        return [
            (part.name, _gib(part.num_bytes), notes.get(part.name, ""))
            for part in parts
            if include_zero or part.num_bytes > 0
        ]

    rows = [*rows_of(footprint.resident(), True), ("CUDA, NCCL, fragments", _gib(RUNTIME_BYTES), "assumed")]
    for phase, parts in footprint.phases().items():
        if any(part.num_bytes > 0 for part in parts):
            rows.append((f"+ {phase}", _gib(sum(part.num_bytes for part in parts)), ""))
            rows += [(f"    {name}", number, note) for name, number, note in rows_of(parts, False)]
    phase, num_bytes = footprint.peak()
    return [*rows, ("peak", _gib(num_bytes), f"in the phase: {phase}")]


def _reference_note(footprint: Footprint) -> str:
    config = footprint.config
    if config.kl.beta == 0:
        return "none: kl.beta = 0"
    if config.policy.lora_rank:
        return "none: LoRA's base is the reference"
    return "on the CPU between uses" if config.policy.offload_reference else ""


def _cpu_rows(footprint: Footprint, machine: Machine) -> _Rows:
    parts = [part for part in footprint.cpu_parts(machine.ranks_per_node) if part.num_bytes > 0]
    rows = [(part.name, _gib(part.num_bytes), "offloaded") for part in parts]
    loading = footprint.loading_bytes(machine.ranks_per_node)
    return [*rows, ("while loading", _gib(loading), "float32 weights of every rank, freed after loading")]


def _step_rows(footprint: Footprint) -> _Rows:
    config, ranks = footprint.config, footprint.num_ranks
    questions, updates = config.rollout.questions_per_step, config.policy.updates_per_step
    replies, per_update = questions * config.rollout.group_size, footprint.replies_per_update()
    micro_batches = -(-(-(-per_update // ranks) * footprint.longest) // config.policy.micro_batch_tokens)
    budget = f"; ends earlier at {config.run.reply_tokens:,} reply tokens" if config.run.reply_tokens else ""
    return [
        ("steps", f"{config.run.steps:,}", f"{config.optimizer.warmup_steps:,} of them warm-up{budget}"),
        ("replies a step", f"{replies:,}", f"{questions:,} questions x {config.rollout.group_size}"),
        ("tokens a step", f"{replies * footprint.longest:,}", "at most, prompts and replies"),
        ("optimizer steps", f"{config.run.steps * updates:,}", f"{updates} a step"),
        ("replies an optimizer step", f"{per_update:,}", f"at most {-(-per_update // ranks):,} a rank"),
        ("micro-batches", f"{micro_batches:,}", "a rank and optimizer step, if all replies are longest"),
        ("epochs", *_epochs(config)),
    ]


def _epochs(config: RunConfig) -> tuple[str, str]:
    source, drawn = config.data.train, config.run.steps * config.rollout.questions_per_step
    num_questions = count_questions(source, ReadOptions.of(config.data))
    if num_questions is None:
        return "?", f"{drawn:,} questions drawn; {source} cannot be counted without a download"
    return f"{drawn / num_questions:.1f}", f"{drawn:,} questions drawn from {num_questions:,}"


def _disk_rows(footprint: Footprint) -> _Rows:
    run, evaluation = footprint.config.run, footprint.config.evaluation
    keeps_best = run.keep_best and bool(evaluation.sets) and evaluation.every > 0
    num_checkpoints = run.keep_checkpoints + keeps_best + 2
    checkpoint, export, replies = footprint.checkpoint_bytes(), footprint.export_bytes(), footprint.replies_bytes()
    best = ", the best" if keeps_best else ""
    note = f"at most: the newest {run.keep_checkpoints}{best}, the last good one and one being written"
    return [
        ("one checkpoint", _gib(checkpoint), "of all ranks"),
        (f"{num_checkpoints} checkpoints", _gib(num_checkpoints * checkpoint), note),
        ("export", _gib(export), "safetensors"),
        ("replies", _gib(replies), "at most, between two checkpoints"),
        ("in all", _gib(num_checkpoints * checkpoint + export + replies), "without logs"),
    ]


def _gib(num_bytes: float) -> str:
    """A number with two decimals, or five if it is small."""
    return f"{num_bytes / GIB:,.{2 if num_bytes >= 0.1 * GIB or num_bytes == 0 else 5}f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    names, numbers = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"  {name:<{names}}  {number:>{numbers}}  {note}".rstrip() for name, number, note in rows]
