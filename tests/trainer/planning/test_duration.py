"""FLOPs and times: the formulas of expo/learner/flops.py at a stated share of a peak, or at a measured one."""

import json

import pytest

from benchmarks.gpu import training_step
from expo.config import RECIPES, load_config
from expo.learner.flops import ModelShape, training_flops
from expo.planning import duration
from expo.planning.duration import Speed, find_speed, measured_share, plan_sampling, plan_step
from expo.planning.gpus import KINDS
from expo.planning.machine import Machine
from expo.planning.memory import Footprint
from expo.planning.models import known_config

H100 = KINDS["h100"]
SHAPE = ModelShape.from_config(known_config("Qwen/Qwen2.5-1.5B"))


def machine(num_ranks=8, kind=H100, **fields):
    return Machine(num_ranks, min(num_ranks, 8), 80.0, "given", kind=kind, **fields)


def footprint(*overrides, num_ranks=8, shape=SHAPE):
    return Footprint(load_config(RECIPES / "single-h100.yaml", overrides), shape, num_ranks, longest_prompt=100)


def test_a_step_has_the_flops_of_its_passes_and_the_time_of_its_share():
    run = footprint(("policy.gradient_checkpointing", False), ("kl.beta", 0))
    step = plan_step(run, machine(), Speed(1e12, 1e12, 1e15, ""))
    replies = 64 * 8
    assert step.training_flops == training_flops(SHAPE, [2148] * replies, False, 0, num_scored=replies * 2048)
    assert step.training_s == pytest.approx(step.training_flops / 8e12)
    assert step.sampling_s == pytest.approx(step.sampling_flops / 8e12)
    assert step.seconds == step.training_s + step.sampling_s
    # the reference policy, and with several updates the old log-probs, are a pass each
    passes = [
        plan_step(footprint(("policy.gradient_checkpointing", False), *more), machine(), None).training_flops
        for more in ([("kl.beta", 0)], [], [("policy.updates_per_step", 4)])
    ]
    assert passes[1] - passes[0] == pytest.approx(passes[2] - passes[1]) == pytest.approx(passes[0] / 3)


def test_sampling_takes_at_least_the_reads_of_weights_and_cache():
    run = footprint(("rollout.engine", "transformers"), ("rollout.batch_size", 32), num_ranks=1)
    speed = Speed(1e30, 1e30, 1e12, "")
    _, seconds = plan_sampling(run, machine(1), speed, questions=8, replies=8)
    weights, cache = 2 * SHAPE.num_parameters, 32 * (100 + 1024) * 2 * 28 * 256 * 2
    assert seconds == pytest.approx(2 * 2048 * (weights + cache) / 1e12)


def test_more_gpus_take_less_time_and_an_unknown_gpu_has_none():
    speed = find_speed(footprint(), machine())
    assert plan_step(footprint(), machine(16), speed).seconds < plan_step(footprint(), machine(8), speed).seconds
    assert find_speed(footprint(), machine(kind=None)) is None
    assert plan_step(footprint(), machine(kind=None), None).seconds is None


def test_the_share_is_named_as_assumed_without_results(monkeypatch, tmp_path):
    monkeypatch.setattr(duration, "RESULTS", tmp_path)
    speed = find_speed(footprint(), machine())
    assert "35% of H100's 989 TFLOP/s in training (assumed)" in speed.source
    assert speed.training == pytest.approx(0.35 * 989e12)


def results(folder, rate, machine_name="NVIDIA H100 80GB HBM3", rehearsal=False):
    measures = [{"name": "a step", "value": 1.0}, {"name": "tokens per second", "value": rate}]
    checks = [{"name": "training-step-1.5B", "measures": measures}]
    folder.mkdir(exist_ok=True)
    content = {"stamp": {"machine": machine_name}, "rehearsal": rehearsal, "checks": checks}
    (folder / "gpu_check.json").write_text(json.dumps(content))


def test_results_of_the_same_gpu_give_the_share(tmp_path):
    results(tmp_path / "a", 20_000.0, "NVIDIA A100-SXM4-80GB")
    results(tmp_path / "b", 1.0, rehearsal=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "gpu_check.json").write_text("[]")
    assert measured_share(H100, tmp_path) is None
    results(tmp_path / "d", 20_000.0)
    share, source = measured_share(H100, tmp_path)
    assert source == "training-step-1.5B in gpu_check.json of benchmarks/results"
    replies = training_step.REPLIES
    per_step = training_flops(SHAPE, [1024] * replies, False, 2, num_scored=5632)
    assert share == pytest.approx(20_000 * per_step / 5632 / 989e12)
    assert [1024] * replies == duration.CHECKED_LENGTHS
    assert replies * (1023 - 255) - 512 == duration.CHECKED_TOKENS


def test_a_cpu_is_timed_here_and_another_one_is_unknown():
    here = find_speed(footprint(), Machine(1, 1, 8.0, "here", is_cpu=True, is_here=True))
    assert here.training > 1e8
    assert "timed here" in here.source
    assert find_speed(footprint(), Machine(1, 1, 8.0, "there", is_cpu=True)) is None
