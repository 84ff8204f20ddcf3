"""What repeated steps cost the host: compilations, waits for the device, and whether a graph can replay them."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.events import counted
from benchmarks.gpu.check import Check, Measure, Measures, Place
from benchmarks.gpu.numerics import gradients, make_inputs
from expo_kernels import (
    CurriculumTable,
    Objective,
    akl_beta,
    expo_loss,
    expo_loss_from_logps,
    group_advantages,
    linear_expo_loss,
    linear_token_logps,
    token_logps,
)

WARM_UP_STEPS = 10
HELD_MS = 300.0  # the device is kept busy for about this long before a call that must not wait for it
CYCLES_PER_MS = 2_000_000  # a clock of 2 GHz; a slower one keeps the device busy for longer


def check_compilations(place: Place) -> Measures:
    """New binaries over 1,000 steps in which shapes, hyper-parameters, beta and normalizer change."""

    def step(index: int) -> None:
        B, T = 2 * (1 + index % 8), 1 + index % place.size(37, 4)
        objective = Objective(temperature=0.5 + index % 9 / 8, clip_low=0.1 + index % 3 / 10)
        inputs = make_inputs((B, T, 64, 1024), torch.bfloat16, place.device, seed=index)
        beta = torch.full((), index / 1000, device=place.device)
        output = linear_expo_loss(**inputs, objective=objective, beta=beta, normalizer=float(B + index))
        output.loss.backward()

    for index in range(place.size(WARM_UP_STEPS, 1)):
        step(index)
    num_steps = place.size(1000, 4)
    with counted(place.device) as counts:
        for index in range(num_steps):
            step(index)
    place.require_gpu("compilation: the interpreter compiles nothing")
    yield Measure(f"binaries compiled over {num_steps:,} changing steps", float(counts.binaries), 0.0)


def _calls(place: Place) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every public function, forward and backward, with several chunks, whose lengths the host knows."""
    B, T, H, V = place.size((8, 256, 256, 32_000), (2, 5, 64, 512))
    inputs = make_inputs((B, T, H, V), torch.bfloat16, place.device)
    budget = place.size(64.0, 0.01)  # MiB: four chunks on a GPU
    beta = torch.full((), 0.03, device=place.device)
    inputs["completion_lengths"] = inputs["completion_mask"].sum(-1).cpu()

    def loss(**options: Any) -> Callable[[], None]:
        def run() -> None:
            output = linear_expo_loss(**inputs, beta=beta, logits_budget_mb=budget, **options)
            gradients(output.loss, inputs)

        return run

    yield "linear_expo_loss, several chunks", loss()
    yield "linear_expo_loss, a float normalizer", loss(normalizer=7.0)
    yield "linear_expo_loss, a ratio per sequence", loss(objective=Objective(ratio="sequence"))
    yield "linear_expo_loss, entropy", loss(return_entropy=True)
    yield "linear_expo_loss, packed", _packed(inputs, budget)
    yield from _other_calls(inputs, budget)


def _packed(inputs: dict[str, Any], budget: float) -> Callable[[], None]:
    B, T = inputs["completion_mask"].shape
    hidden = inputs["hidden"].detach().flatten(0, 1).requires_grad_()
    flat = {n: inputs[n].flatten() for n in ("completion_ids", "completion_mask", "old_logps", "ref_logps")}
    rewards, group_size = inputs["rewards"], inputs["group_size"]
    cu_seqlens = torch.arange(0, B * T + 1, T, device=hidden.device, dtype=torch.int32)
    packed = {"weight": inputs["weight"], "cu_seqlens": cu_seqlens, "rewards": rewards, "group_size": group_size}
    packed["completion_lengths"] = inputs["completion_lengths"]

    def run() -> None:
        output = linear_expo_loss(hidden, **flat, **packed, logits_budget_mb=budget)
        torch.autograd.grad(output.loss, (hidden, inputs["weight"]))

    return run


def _other_calls(inputs: dict[str, Any], budget: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    mask, ids, device = inputs["completion_mask"], inputs["completion_ids"], inputs["completion_mask"].device
    given = {name: inputs[name] for name in ("old_logps", "ref_logps", "rewards", "group_size")}

    def logps() -> None:
        head = inputs["hidden"], inputs["weight"]
        values, entropies = linear_token_logps(
            *head,
            ids,
            mask=mask,
            return_entropy=True,
            logits_budget_mb=budget,
            completion_lengths=inputs["completion_lengths"],
        )
        torch.autograd.grad((values + entropies).sum(), head)

    logits = torch.randn(*mask.shape, inputs["weight"].shape[0], device=device).requires_grad_()
    own_logps = inputs["old_logps"].clone().requires_grad_()
    table = CurriculumTable(1000, device=device)
    question_ids, rates = torch.arange(8, device=device), torch.full((8,), 0.25, device=device)
    yield "linear_token_logps, entropies", logps
    yield "token_logps", lambda: torch.autograd.grad(token_logps(logits, ids, mask=mask).sum(), logits)
    yield "expo_loss", lambda: torch.autograd.grad(expo_loss(logits, ids, mask, **given).loss, logits)
    yield (
        "expo_loss_from_logps",
        lambda: torch.autograd.grad(expo_loss_from_logps(own_logps, mask, **given).loss, own_logps),
    )
    yield "group_advantages", lambda: group_advantages(inputs["rewards"], 2)
    yield "akl_beta", lambda: akl_beta(inputs["rewards"])
    yield "CurriculumTable.update", lambda: table.update(question_ids, rates)
    yield "CurriculumTable.sample", lambda: table.sample(8)
    yield "CurriculumTable.weights", lambda: table.weights


def host_ms_while_busy(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of the host in `run` while the device is busy for HELD_MS: about HELD_MS if `run` waits for it."""
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(CYCLES_PER_MS * HELD_MS))
    started = time.perf_counter()
    run()
    took = 1e3 * (time.perf_counter() - started)
    torch.cuda.synchronize(device)
    return took


def check_waits(place: Place) -> Measures:
    """Waits of the host: counted, and felt as time while the device is busy. A planted wait must be seen by both."""
    on_device = torch.ones((), device=place.device)
    for name, run in _calls(place):
        for _ in range(place.size(3, 1)):
            run()
        with counted(place.device) as counts:
            run()
        for reason in sorted(set(counts.wait_names)):
            print(f"  {name} waits: {reason}", flush=True)
        yield Measure(f"{name}: waits", float(counts.waits), 0.0)
        if not place.is_rehearsal:
            took = min(host_ms_while_busy(run, place.device) for _ in range(2))
            yield Measure(f"{name}: host time while the device is busy for {HELD_MS:.0f} ms", took, HELD_MS / 2, "ms")
    place.require_gpu("waits that PyTorch reports, and a device that is busy")
    with counted(place.device) as counts:
        on_device.item()
        torch.cuda.current_stream(place.device).synchronize()
    yield Measure("planted waits that are counted", float(counts.waits), 2.0, is_minimum=True)
    took = host_ms_while_busy(on_device.item, place.device)
    yield Measure("host time of a planted wait", took, HELD_MS / 2, "ms", is_minimum=True)


def check_graph(place: Place) -> Measures:
    """A captured step, replayed with another beta and another mask, against an eager step."""
    inputs = make_inputs(place.size((4, 33, 64, 1024), (2, 5, 64, 512)), torch.bfloat16, place.device)
    beta = torch.full((), 0.02, device=place.device)
    budget = place.size(0.2, 0.02)  # MiB: several chunks

    def run() -> tuple[Tensor, ...]:
        loss = linear_expo_loss(**inputs, beta=beta, logits_budget_mb=budget).loss
        return loss.detach(), *gradients(loss, inputs)

    if place.is_rehearsal:
        run()
    place.require_gpu("graph capture")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    # an objective that was never used before the capture
    fresh = Objective(clip_low=0.123)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        linear_expo_loss(**inputs, objective=fresh, beta=beta)
    mask = inputs["completion_mask"]
    for label in ("another beta", "another mask"):
        if label == "another beta":
            beta.fill_(0.5)
        else:
            mask[:, 10:] = False
            with torch.no_grad():
                inputs["hidden"].masked_fill_(~mask.unsqueeze(-1), math.nan)
        graph.replay()
        difference = max(float((one - other).abs().max()) for one, other in zip(captured, run(), strict=True))
        yield Measure(f"replayed with {label} differs by", difference, 0.0)


CHECKS = {
    "waits": Check("no call waits for the device", check_waits, seconds=90),
    "compilations": Check("1,000 changing steps compile nothing", check_compilations, seconds=90),
    "graph": Check("a captured graph replays with a new beta and a new mask", check_graph),
}
