"""The plan of a run as text: one table for each thing that it needs."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from expo.config import RunConfig
from expo.data.record import TRAINING
from expo.planning.checks import Facts
from expo.planning.duration import find_speed, plan_sampling, plan_step
from expo.planning.machine import Machine
from expo.planning.memory import GIB, Footprint, Part


def describe(footprint: Footprint, machine: Machine, facts: Facts) -> str:
    """The plan as text: model, memory, questions, steps, time and disk space."""
    config = footprint.config
    nodes = -(-machine.num_ranks // machine.ranks_per_node)
    beside = f", {count(machine.server_gpus, 'GPU')} for vLLM's servers" if machine.server_gpus else ""
    title = (
        f"{config.model.path} on {count(machine.num_ranks, 'rank')}, {machine.ranks_per_node} a node, "
        f"{count(nodes, 'node')}{beside}; nothing is written or trained"
    )
    limit = f"ZeRO {config.policy.zero_stage}, {machine.memory_gib:.1f} GiB ({machine.source})"
    if machine.is_cpu:
        memory = f"memory of each process, GiB: {limit}"
    else:
        memory = f"memory of each GPU, upper bounds in GiB: {limit}"
    blocks = [
        (f"model: shape from {facts.shape_source}", _table(_model_rows(footprint))),
        (memory, _table(_memory_rows(footprint, machine))),
        *_cpu_block(footprint, machine),
        ("questions", _question_lines(config, facts)),
        ("steps", _table(_step_rows(footprint, facts))),
        ("FLOPs and time", _time_lines(footprint, machine, facts)),
        ("disk, GiB", _table(_disk_rows(footprint, facts.folder))),
    ]
    if facts.unchecked:
        blocks.append(("not checked here", [f"  {line}" for line in facts.unchecked]))
    return "\n".join([title, *(line for heading, lines in blocks for line in ("", heading, *lines))]) + "\n"


def _cpu_block(footprint: Footprint, machine: Machine) -> list[tuple[str, list[str]]]:
    if machine.is_cpu:
        return []
    heading = f"CPU memory of each node, {count(machine.ranks_per_node, 'rank')}, GiB"
    return [(heading, _table(_cpu_rows(footprint, machine)))]


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


def _memory_rows(footprint: Footprint, machine: Machine) -> _Rows:
    policy = footprint.config.policy
    moves = not machine.is_cpu
    notes = {
        "weights": "on the CPU between uses" if policy.offload_parameters and moves else "float32",
        "gradients": "on the CPU" if policy.offload_optimizer and moves else "float32",
        "optimizer states": "on the CPU" if policy.offload_optimizer and moves else "float32",
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

    runtime = ("Python and libraries", "measured") if machine.is_cpu else ("CUDA, NCCL, fragments", "assumed")
    rows = [*rows_of(footprint.resident(), True), (runtime[0], _gib(footprint.runtime_bytes), runtime[1])]
    for phase, parts in footprint.phases().items():
        if any(part.num_bytes > 0 for part in parts):
            rows.append((f"+ {phase}", _gib(sum(part.num_bytes for part in parts)), ""))
            rows += [(f"    {name}", number, note) for name, number, note in rows_of(parts, False)]
    if machine.vllm_gib:
        awake = "only while it is awake" if footprint.config.vllm.sleep else "all the time"
        rows.append(("vLLM's share", f"{machine.vllm_gib:,.2f}", f"{awake}; not part of the peak"))
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


def _step_rows(footprint: Footprint, facts: Facts) -> _Rows:
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
        ("epochs", *_epochs(config, facts)),
    ]


def _epochs(config: RunConfig, facts: Facts) -> tuple[str, str]:
    drawn, num_questions = config.run.steps * config.rollout.questions_per_step, facts.num_questions.get(TRAINING)
    if num_questions is None:
        return "?", f"{drawn:,} questions drawn; {config.data.train} cannot be counted without a download"
    return f"{drawn / num_questions:.1f}", f"{drawn:,} questions drawn from {num_questions:,}"


def _question_lines(config: RunConfig, facts: Facts) -> list[str]:
    lines = [f"  {line}" for line in facts.lines]
    lengths = sorted(facts.prompt_lengths)
    if lengths:
        middle = lengths[len(lengths) // 2]
        lines.append(f"  prompts: {middle:,} tokens in the middle, {lengths[-1]:,} at most")
    unread = [f"  {name}: {number:,} questions" for name, number in facts.num_questions.items() if not facts.lines]
    return [*lines, *unread] or [f"  {config.data.train}: unknown"]


def _time_lines(footprint: Footprint, machine: Machine, facts: Facts) -> list[str]:
    config, speed = footprint.config, find_speed(footprint, machine)
    step = plan_step(footprint, machine, speed)
    evaluation_s, num_evaluations = _evaluations(footprint, machine, facts)
    steps_s = None if step.seconds is None else config.run.steps * step.seconds
    in_all = None if steps_s is None else steps_s + num_evaluations * (evaluation_s or 0)
    source = "an unknown speed: name the GPU, as in --gpus=8xH100" if speed is None else speed.source
    rows = [
        ("sampling of a step", _hours(step.sampling_s), f"{step.sampling_flops:.2e} FLOPs, if all replies are longest"),
        ("training of a step", _hours(step.training_s), f"{step.training_flops:.2e} FLOPs"),
        *([("an evaluation", _hours(evaluation_s), f"of {num_evaluations:,}")] if config.evaluation.sets else []),
        (
            "in all",
            _hours(in_all),
            f"{config.run.steps * (step.sampling_flops + step.training_flops):.2e} FLOPs of steps",
        ),
    ]
    return [*_table(rows), f"  at {source}"]


def _evaluations(footprint: Footprint, machine: Machine, facts: Facts) -> tuple[float | None, int]:
    """Seconds of one evaluation of the sets that could be counted, and the number of evaluations."""
    section, steps = footprint.config.evaluation, footprint.config.run.steps
    if not section.sets:
        return None, 0
    questions = sum(number for name, number in facts.num_questions.items() if name != TRAINING)
    _, seconds = plan_sampling(footprint, machine, find_speed(footprint, machine), questions, section.num_samples)
    return seconds, 2 + ((steps - 1) // section.every if section.every else 0)


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.{0 if seconds >= 10 else 2}f} s"


def _disk_rows(footprint: Footprint, folder: Path) -> _Rows:
    run, evaluation = footprint.config.run, footprint.config.evaluation
    keeps_best = run.keep_best and bool(evaluation.sets) and evaluation.every > 0
    num_checkpoints = run.keep_checkpoints + keeps_best + 2
    checkpoint, export, replies = footprint.checkpoint_bytes(), footprint.export_bytes(), footprint.replies_bytes()
    needed, free = num_checkpoints * checkpoint + export + replies, _free_bytes(folder)
    best = ", the best" if keeps_best else ""
    note = f"at most: the newest {run.keep_checkpoints}{best}, the last good one and one being written"
    return [
        ("one checkpoint", _gib(checkpoint), "of all ranks"),
        (f"{num_checkpoints} checkpoints", _gib(num_checkpoints * checkpoint), note),
        ("export", _gib(export), "safetensors"),
        ("replies", _gib(replies), "at most, between two checkpoints"),
        ("in all", _gib(needed), "without logs"),
        ("free here", _gib(free), f"for {folder.parent}{'; LESS THAN THE RUN NEEDS' if free < needed else ''}"),
    ]


def _free_bytes(folder: Path) -> int:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(nearest).free


def _gib(num_bytes: float) -> str:
    """A number with two decimals, or five if it is small."""
    return f"{num_bytes / GIB:,.{2 if num_bytes >= 0.1 * GIB or num_bytes == 0 else 5}f}"


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    names, numbers = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"  {name:<{names}}  {number:>{numbers}}  {note}".rstrip() for name, number, note in rows]
