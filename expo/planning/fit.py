"""Finds settings with which a run fits its GPUs: one whole configuration, the cheapest of those that are tried.

Each change has a price, in rough steps of a doubled time; they order the search and are not measured. A change of what
is trained (LoRA, bfloat16, shorter replies) costs more than any change of how. The prices of micro-batch and batch
grow with every halving.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from expo.config import RunConfig
from expo.errors import ConfigError
from expo.learner.flops import ModelShape
from expo.planning.machine import Machine, for_config
from expo.planning.memory import GIB, Footprint
from expo.run.inputs import check_batches, check_width

Changes = Mapping[str, Any]  # settings by their dotted name

STAGE_PRICES = (0.0, 0.02, 0.04, 0.25)  # of ZeRO 0 to 3, without a fast network between the GPUs
SMALLER_MICRO_BATCH = 0.06  # for each halving
SMALLER_BATCH = 0.1
BUDGETS_MB = ((256.0, 0.03), (64.0, 0.06))  # of the logits
LORA_RANK, LORA_PRICE = 16, 5.0
SHORTER_PRICE = 10.0  # for each halving of the replies
CACHE_SEQUENCES = 8  # full sequences that vLLM's cache should hold at least


@dataclass(frozen=True)
class Fit:
    """A configuration that fits, its machine, and the settings that differ from the given one."""

    config: RunConfig
    machine: Machine
    footprint: Footprint
    changes: Changes

    @property
    def flags(self) -> str:
        """The changes as a command line."""
        return " ".join(f"--{name}={_flag_value(value)}" for name, value in self.changes.items())


def _flag_value(value: Any) -> str:
    """The value as YAML without blanks, so that a shell takes it as one word."""
    return (
        value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    )  # of switches, numbers, names and lists of numbers


def problem_of(footprint: Footprint, machine: Machine) -> str | None:
    """Why the run cannot work on these GPUs: vLLM's engines do not divide them, or the memory; None if it can."""
    try:
        check_width(footprint.config, machine.num_ranks)
    except ConfigError as error:
        return str(error)
    return memory_problem(footprint, machine)


def memory_problem(footprint: Footprint, machine: Machine) -> str | None:
    """Why the run does not fit the memory of a GPU, or of the CPUs' machine; None if it does."""
    where = f"{machine.memory_gib:.1f} GiB ({machine.source})"
    trainer_gib = machine.memory_gib if footprint.config.vllm.sleep else machine.trainer_gib
    if footprint.config.rollout.engine.startswith("vllm") and not machine.is_cpu:
        share = footprint.config.vllm.gpu_memory_utilization * machine.memory_gib
        weights = footprint.engine_weight_bytes() / GIB
        if weights >= share:
            return f"vLLM's weights take {weights:.1f} GiB of each GPU, but its share is {share:.1f} of {where}"
        resident = (footprint.runtime_bytes + footprint.resident_bytes()) / GIB
        if footprint.config.vllm.sleep and resident + share > machine.memory_gib:
            return f"while vLLM is awake, its {share:.1f} GiB and the trainer's {resident:.1f} exceed {where}"
    phase, num_bytes = footprint.peak()
    if num_bytes <= trainer_gib * GIB:
        return None
    left = "" if trainer_gib == machine.memory_gib else f", of which vLLM leaves {trainer_gib:.1f}"
    return f"{phase} takes {num_bytes / GIB:.1f} GiB of {where}{left}"


def find_fit(footprint: Footprint, machine: Machine) -> Fit | None:
    """The cheapest configuration that was found to fit; None if there is none, even with short replies.

    Args:
        footprint: of the run as it is given.
        machine: without the share of vLLM.
    """
    search = _Search(footprint.config, footprint.shape, machine, footprint.longest_prompt)
    length = footprint.config.rollout.max_new_tokens
    for halvings in itertools.count():
        shorter = {} if halvings == 0 else {"rollout.max_new_tokens": length >> halvings}
        found = search.cheapest(shorter)
        if found is not None or length >> (halvings + 1) < min(length, 256):
            return found
    return None


class _Search:
    def __init__(self, config: RunConfig, shape: ModelShape, machine: Machine, longest_prompt: int | None) -> None:
        self._config, self._shape, self._machine, self._longest_prompt = config, shape, machine, longest_prompt

    def cheapest(self, given: Changes) -> Fit | None:
        best: Fit | None = None
        best_price = math.inf
        for price, changes in sorted(self._structures(), key=lambda found: found[0]):
            if price >= best_price:
                break
            sized = self._with_sizes({**given, **changes})
            if sized is not None and price + sized[0] < best_price and _is_valid(_changed(self._config, sized[1])):
                best_price, best = price + sized[0], self._fit(sized[1])
        return best

    def _structures(self) -> Iterator[tuple[float, Changes]]:
        """Every combination of the settings that are not sizes, with its price."""
        for parts in itertools.product(self._policy_choices(), self._engine_choices()):
            changes = {name: value for part in parts for name, value in part[1].items()}
            yield sum(part[0] for part in parts), changes

    def _policy_choices(self) -> Iterator[tuple[float, Changes]]:
        policy, is_cpu = self._config.policy, self._machine.is_cpu
        has_reference = self._config.kl.beta > 0 and policy.lora_rank == 0
        switches: list[list[tuple[float, Changes]]] = [
            _switch("policy.gradient_checkpointing", policy.gradient_checkpointing, 0.3),
            _switch("policy.offload_reference", policy.offload_reference or is_cpu or not has_reference, 0.1),
            _switch("policy.offload_optimizer", policy.offload_optimizer or is_cpu, 0.6),
            _switch("policy.offload_parameters", policy.offload_parameters or is_cpu, 1.2),
            [(0.0, {}), *([] if policy.lora_rank else [(LORA_PRICE, {"policy.lora_rank": LORA_RANK})])],
        ]
        stages = [policy.zero_stage] if is_cpu else range(policy.zero_stage, 4)
        for stage, chosen in itertools.product(stages, itertools.product(*switches)):
            changes = {name: value for _, part in chosen for name, value in part.items()}
            price = STAGE_PRICES[stage] - STAGE_PRICES[policy.zero_stage] + sum(part[0] for part in chosen)
            if stage != policy.zero_stage:
                changes = {"policy.zero_stage": stage, **changes}
            offloads_optimizer = changes.get("policy.offload_optimizer", policy.offload_optimizer)
            offloads_parameters = changes.get("policy.offload_parameters", policy.offload_parameters)
            if (offloads_optimizer and stage == 0) or (offloads_parameters and stage != 3):
                continue
            if changes.get("policy.lora_rank"):
                changes.pop("policy.offload_reference", None)
            yield price, changes

    def _engine_choices(self) -> Iterator[tuple[float, Changes]]:
        """The engine as it is; vLLM with another share of the GPU, over more GPUs, asleep, or on GPUs of its own."""
        yield 0.0, {}
        config, machine = self._config, self._machine
        if config.rollout.engine != "vllm" or machine.is_cpu:
            return
        footprint = self._footprint(config, machine)
        width = 1
        while width <= machine.ranks_per_node:
            price = 0.1 * abs(math.log2(width / config.vllm.tensor_parallel))
            wider = {"vllm.tensor_parallel": width} if width != config.vllm.tensor_parallel else {}
            needed = footprint.itemsize * self._shape.num_parameters / width + (
                CACHE_SEQUENCES * footprint.cache_bytes() / max(footprint.sampled_at_once(), 1) / width
            )
            share = math.ceil(20 * 1.05 * needed / (machine.memory_gib * GIB)) / 20
            for utilization in {config.vllm.gpu_memory_utilization, share}:
                if utilization > 0.95:
                    continue
                changed = utilization != config.vllm.gpu_memory_utilization
                own = {**wider, **({"vllm.gpu_memory_utilization": utilization} if changed else {})}
                if machine.num_ranks % width == 0:
                    yield price + 0.05 * changed, own
                    if not config.vllm.sleep:
                        yield price + 0.05 * changed + 0.15, {**own, "vllm.sleep": True}
            if width < machine.num_ranks <= machine.ranks_per_node and 0 < share <= 0.9:
                gpus = list(range(machine.num_ranks - width, machine.num_ranks))
                asleep = {"vllm.sleep": False} if config.vllm.sleep else {}
                apart = {"rollout.engine": "vllm-server", "vllm.gpus": gpus, "vllm.gpu_memory_utilization": 0.9}
                yield price + 0.5, {**wider, **apart, **asleep}
            width *= 2

    def _with_sizes(self, changes: Changes) -> tuple[float, Changes] | None:
        """The changes with the largest micro-batch and batch that fit, and the price of these; None if none fits."""
        config = self._config
        longest = config.data.max_prompt_tokens + changes.get("rollout.max_new_tokens", config.rollout.max_new_tokens)
        micro_batches = _halvings("policy.micro_batch_tokens", config.policy.micro_batch_tokens, longest)
        batches = _halvings("rollout.batch_size", config.rollout.batch_size, 1)
        if config.rollout.engine != "transformers":
            batches = batches[:1]
        budgets: list[tuple[float, Changes]] = [(0.0, {})]
        budgets += [
            (price, {"policy.logits_budget_mb": size})
            for size, price in BUDGETS_MB
            if size < (config.policy.logits_budget_mb or math.inf)
        ]
        updates = [
            (number * SMALLER_MICRO_BATCH + price, {**micro, **budget})
            for number, micro in micro_batches
            for price, budget in budgets
        ]
        updates.sort(key=lambda found: found[0])
        if not self._fits({**changes, **batches[-1][1], **micro_batches[-1][1], **budgets[-1][1]}):
            return None
        update = next(found for found in updates if self._fits({**changes, **batches[-1][1], **found[1]}))
        batch = next(found for found in batches if self._fits({**changes, **update[1], **found[1]}))
        return update[0] + SMALLER_BATCH * batch[0], {**changes, **update[1], **batch[1]}

    def _fits(self, changes: Changes) -> bool:
        fit = self._fit(changes)
        return fit is not None and problem_of(fit.footprint, fit.machine) is None

    def _fit(self, changes: Changes) -> Fit | None:
        config = _changed(self._config, changes)
        try:
            machine = for_config(self._machine, config)
            check_batches(config, machine.num_ranks)
        except ConfigError:
            return None
        return Fit(config, machine, self._footprint(config, machine), changes)

    def _footprint(self, config: RunConfig, machine: Machine) -> Footprint:
        return Footprint(config, self._shape, machine.num_ranks, self._longest_prompt, on_cpu=machine.is_cpu)


def _switch(name: str, is_on: bool, price: float) -> list[tuple[float, Changes]]:
    return [(0.0, {}), *([] if is_on else [(price, {name: True})])]


def _halvings(name: str, value: int, least: int) -> list[tuple[int, Changes]]:
    """The value and its halves down to `least`, each with the number of halvings; the value itself is no change."""
    found: list[tuple[int, Changes]] = [(0, {})]
    while value > least:
        value = max(value // 2, least)
        found.append((len(found), {name: value}))
    return found


def _changed(config: RunConfig, changes: Changes) -> RunConfig:
    """The configuration with other settings, not validated."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    updated = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=updated)


def _is_valid(config: RunConfig) -> bool:
    try:
        RunConfig.model_validate(config.model_dump())
    except ValidationError:
        return False
    return True
