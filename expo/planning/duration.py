"""The FLOPs and the time of a run, from a share of the GPU's peak that is stated: measured, or assumed.

An upper bound in one respect: every reply is taken to have full length.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expo.learner.flops import ModelShape, generation_flops, training_flops
from expo.planning.gpus import GpuKind, kind_named
from expo.planning.machine import Machine
from expo.planning.memory import Footprint
from expo.planning.models import known_config

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"  # of a checkout
TRAINING_SHARE = 0.35  # of peak FLOP/s, assumed: nothing of this trainer has been timed on a GPU
SAMPLING_SHARE = 0.5  # of the memory's bandwidth by vLLM, assumed
TRANSFORMERS_SHARE = 0.15  # the same without CUDA graphs
CPU_TRAINING_SHARE, CPU_SAMPLING_SHARE = 0.5, 0.3  # of the products that are timed here; measured on SmolLM2-135M
CPU_SIZE, CPU_ROUNDS = 768, 8  # of those products


@dataclass(frozen=True)
class Speed:
    """What a rank computes per second: FLOP/s of training; of sampling, FLOP/s and bytes of weights and cache read.

    source: where the numbers come from.
    """

    training: float
    sampling: float
    bytes_read: float
    source: str


@dataclass(frozen=True)
class Step:
    """FLOPs of one step over all ranks; seconds of its sampling and its training, None if the speed is unknown.

    overlaps: whether the next step is sampled while this one is trained on.
    """

    sampling_flops: float
    training_flops: float
    sampling_s: float | None
    training_s: float | None
    overlaps: bool

    @property
    def seconds(self) -> float | None:
        """Of the whole step; weight syncs are not counted."""
        if self.sampling_s is None or self.training_s is None:
            return None
        return max(self.sampling_s, self.training_s) if self.overlaps else self.sampling_s + self.training_s


def find_speed(footprint: Footprint, machine: Machine) -> Speed | None:
    """The speed of a rank, from results of this GPU or else from assumed shares; None if the GPU is unknown."""
    if machine.is_cpu:
        return _cpu_speed(footprint.config.run.threads) if machine.is_here else None
    if machine.kind is None:
        return None
    peak, engine = machine.kind.peak_flops, footprint.config.rollout.engine
    reading = TRANSFORMERS_SHARE if engine == "transformers" else SAMPLING_SHARE
    measured = measured_share(machine.kind)
    share, source = measured or (TRAINING_SHARE, "assumed")
    return Speed(
        share * peak,
        share * peak,
        reading * machine.kind.bandwidth,
        f"{share:.0%} of {machine.kind.name}'s {peak / 1e12:,.0f} TFLOP/s in training ({source}), {reading:.0%} of its "
        f"{machine.kind.bandwidth / 1e12:.1f} TB/s in sampling (assumed)",
    )


def _cpu_speed(threads: int | None) -> Speed:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        rate = _timed_products()
    finally:
        torch.set_num_threads(before)
    return Speed(
        CPU_TRAINING_SHARE * rate,
        CPU_SAMPLING_SHARE * rate,
        float("inf"),
        f"{CPU_TRAINING_SHARE:.0%} of {rate / 1e9:,.0f} GFLOP/s, timed here just now, in training, "
        f"{CPU_SAMPLING_SHARE:.0%} in sampling (as measured with SmolLM2-135M)",
    )


def _timed_products() -> float:
    """FLOP/s of float32 products on this CPU, the best of a few."""
    values = torch.ones(CPU_SIZE, CPU_SIZE)
    seconds = []
    for _ in range(CPU_ROUNDS):
        started = time.perf_counter()
        torch.mm(values, values)
        seconds.append(time.perf_counter() - started)
    return 2 * CPU_SIZE**3 / min(seconds)


def plan_step(footprint: Footprint, machine: Machine, speed: Speed | None) -> Step:
    """FLOPs and seconds of one training step."""
    config, policy = footprint.config, footprint.config.policy
    questions, group = config.rollout.questions_per_step, config.rollout.group_size
    replies, length = questions * group, config.rollout.max_new_tokens
    training = training_flops(
        footprint.shape,
        [footprint.longest] * replies,
        policy.gradient_checkpointing,
        int(config.kl.beta > 0) + (policy.old_logps == "recompute" and policy.updates_per_step > 1),
        num_scored=replies * length,
        trains_base=policy.lora_rank == 0,
    )
    sampling, sampling_s = plan_sampling(footprint, machine, speed, questions, group)
    training_s = None if speed is None else training / (machine.num_ranks * speed.training)
    return Step(sampling, training, sampling_s, training_s, overlaps=config.rollout.ahead > 0)


def plan_sampling(
    footprint: Footprint, machine: Machine, speed: Speed | None, questions: int, replies: int
) -> tuple[float, float | None]:
    """FLOPs and seconds of sampling `replies` replies of full length to each of some questions."""
    config, shape = footprint.config, footprint.shape
    length = config.rollout.max_new_tokens
    prompt = footprint.longest - length
    flops = questions * generation_flops(shape, [prompt], [length] * replies)
    if speed is None:
        return flops, None
    engines = max((machine.server_gpus or machine.num_ranks), 1)
    if not machine.is_cpu and config.rollout.engine.startswith("vllm"):
        engines = max(engines // config.vllm.tensor_parallel, 1)
    at_once = max(min(config.rollout.batch_size, -(-questions * replies // engines)), 1)
    batches = -(-questions * replies // (engines * at_once))
    weights = footprint.itemsize * shape.num_parameters
    # on average a cache is filled to the prompt and half of the reply
    cache = at_once * (prompt + length / 2) * 2 * shape.num_layers * shape.kv_size * footprint.itemsize
    reading = batches * length * (weights + cache) / speed.bytes_read
    return flops, max(reading, flops / (engines * speed.sampling))


# --- results of a GPU

CHECKED = {"training-step-1.5B": "Qwen/Qwen2.5-1.5B", "training-step-0.5B": "Qwen/Qwen2.5-0.5B"}
CHECKED_LENGTHS, CHECKED_TOKENS = [1024] * 8, 8 * 768 - 512  # as benchmarks/gpu/training_step.py has them


def measured_share(kind: GpuKind, results: Path = RESULTS) -> tuple[float, str] | None:
    """The share of its peak that a GPU reached in a training step, and the file that says so; None without one."""
    for file in sorted(results.glob("**/gpu_check.json")) if results.is_dir() else ():
        try:
            found = json.loads(file.read_bytes())
            is_same = not found["rehearsal"] and kind_named(str(found["stamp"]["machine"])) == kind
            rates = {check["name"]: _rate(check["measures"]) for check in found["checks"]} if is_same else {}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for name, model in CHECKED.items():
            if rates.get(name):
                share = rates[name] * _flops_per_token(model) / kind.peak_flops
                return share, f"{name} in {file.name} of benchmarks/results"
    return None


def _rate(measures: Sequence[dict[str, Any]]) -> float:
    values = (float(measure["value"]) for measure in measures if measure["name"] == "tokens per second")
    return next(values, 0.0)


def _flops_per_token(model: str) -> float:
    shape = ModelShape.from_config(known_config(model))
    return training_flops(shape, CHECKED_LENGTHS, False, 2, num_scored=CHECKED_TOKENS) / CHECKED_TOKENS
