"""Faults that only a GPU can show: races between warps, offsets beyond 2^31 elements, and tensors on another device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.check import Check, Measure, Measures, NotHereError, Place
from benchmarks.gpu.numerics import GRADIENT_BOUND, gradients, make_inputs, relative, to_float64
from expo_kernels import expo_loss, linear_expo_loss

REPETITIONS = 300
BEYOND_INT32 = 2**31  # elements
LOSS_BOUND = 1e-5  # absolute: advantages have a standard deviation of about 1, and may cancel
# a bfloat16 has 8 significant bits: the error of a gradient whose norm is that of one rounded column
IN_PLACE_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


@contextmanager
def other_work(place: Place) -> Iterator[Callable[[], None]]:
    """A function that starts products on a second stream, so that warps of the kernels beside them are delayed."""
    if place.device.type != "cuda":
        yield lambda: None
        return
    stream = torch.cuda.Stream(place.device)
    square = torch.randn(2048, 2048, device=place.device, dtype=torch.bfloat16)
    stream.wait_stream(torch.cuda.current_stream(place.device))

    def start() -> None:
        with torch.cuda.stream(stream):
            square @ square

    yield start
    stream.synchronize()


def _repeated(
    place: Place, label: str, run: Callable[[], tuple[Tensor, ...]], truth: tuple[Tensor, ...], bound: float
) -> Measures:
    """The errors of the first result, a loss and gradients, and how many repetitions give other bits."""
    first = run()
    loss_error = float((first[0] - truth[0]).detach().abs())
    yield Measure(f"{label}: error of the loss", loss_error, LOSS_BOUND)
    pairs = zip(first[1:], truth[1:], strict=True)
    yield Measure(f"{label}: error of gradients", max(relative(*pair) for pair in pairs), bound)
    differ = torch.zeros((), dtype=torch.int64, device=place.device)
    with other_work(place) as start:
        for repetition in range(place.size(REPETITIONS, 2)):
            if repetition % 2:
                start()
            result = run()
            same = torch.stack([(one == other).all() for one, other in zip(result, first, strict=True)]).all()
            differ += ~same
    yield Measure(f"{label}: repetitions with other bits", float(differ), 0.0)


def check_race(place: Place) -> Measures:
    """Gradients that overwrite their logits: every warp must read the chosen logit before one overwrites it."""
    B, T, V = place.size((16, 64, 8192), (2, 3, 1024))
    inputs = make_inputs((B, T, 64, V), torch.float32, place.device)
    hidden, weight = inputs.pop("hidden"), inputs.pop("weight")
    del inputs["rewards"], inputs["group_size"]
    logits = (hidden.detach().nan_to_num() @ weight.detach().T).contiguous()
    torch.manual_seed(0)
    advantages = torch.randn(B, T, device=place.device)
    for level, given in (("sequence", advantages[:, 0].contiguous()), ("token", advantages)):
        for dtype in (torch.float32, torch.bfloat16):
            original = logits.to(dtype)

            def run(original: Tensor = original, given: Tensor = given) -> tuple[Tensor, ...]:
                leaf = original.clone().requires_grad_()
                loss = expo_loss(leaf.view_as(leaf), **inputs, advantages=given, inplace=True).loss
                return loss.detach(), *torch.autograd.grad(loss, leaf)

            wide = original.double().requires_grad_()
            others = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
            loss = expo_loss(wide, **others, advantages=given.double()).loss
            truth = (loss.detach(), *torch.autograd.grad(loss, wide))
            label = f"expo_loss in place, {str(dtype).removeprefix('torch.')}, an advantage per {level}"
            yield from _repeated(place, label, run, truth, IN_PLACE_BOUND[dtype])
    for dtype in (torch.float32, torch.float16):
        yield from _linear_race(place, (B, T, 64, V), dtype)


def _linear_race(place: Place, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Measures:
    """Heads whose gradients of logits are float32, like their logits."""
    inputs = make_inputs(shape, dtype, place.device)

    def run() -> tuple[Tensor, ...]:
        loss = linear_expo_loss(**inputs).loss
        return loss.detach(), *gradients(loss, inputs)

    wide = to_float64(inputs)
    loss = linear_expo_loss(**wide).loss
    truth = (loss.detach(), *gradients(loss, wide))
    bound = GRADIENT_BOUND.get(dtype, GRADIENT_BOUND[torch.bfloat16])
    yield from _repeated(place, f"linear_expo_loss, {str(dtype).removeprefix('torch.')}", run, truth, bound)


def check_large(place: Place) -> Measures:
    """Scaled gradients of more than 2^31 logits, in place: the last sequence equals a call of its own."""
    vocab_size = place.size(151_936, 512)
    length = place.size(1024, 4)
    num_sequences = place.size(BEYOND_INT32 // (1024 * 151_936) + 2, 3)
    if place.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place.device)
        if free < 3 * 2 * num_sequences * length * vocab_size:
            raise NotHereError(f"{free / 2**30:.0f} GiB of free memory are too few for 2^31 elements")
    logits = torch.empty(num_sequences, length, vocab_size, dtype=torch.bfloat16, device=place.device).normal_()
    ids = torch.randint(vocab_size, (num_sequences, length), device=place.device)
    advantages = torch.linspace(-1, 1, num_sequences, device=place.device)
    last = logits[-1:].clone()

    def grad(rows: Tensor, which: slice) -> Tensor:
        mask = torch.ones_like(ids[which], dtype=torch.bool)
        leaf = rows.requires_grad_()
        given: dict[str, Any] = {"advantages": advantages[which], "beta": 0.0, "normalizer": 7.0}
        loss = expo_loss(leaf.view_as(leaf), ids[which], mask, **given, inplace=True).loss
        (found,) = torch.autograd.grad(3.0 * loss, leaf)
        return found

    expected = grad(last, slice(-1, None))
    found = grad(logits, slice(None))
    yield Measure("elements", float(found.numel()), place.size(float(BEYOND_INT32), 0.0), is_minimum=True)
    differing = (found[-1:] != expected).sum()
    yield Measure("elements of the last sequence with other bits than in a call of its own", float(differing), 0.0)


def check_devices(place: Place) -> Measures:
    """Tensors on a device that is not the current one, with several chunks."""
    place.require_gpu("two devices")
    if torch.cuda.device_count() < 2:
        raise NotHereError("this machine has one device")
    results = []
    for index in (0, 1):
        device = torch.device("cuda", index)
        inputs = make_inputs((8, 64, 64, 32_000), torch.bfloat16, torch.device("cpu"))
        inputs = {name: v.detach().to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        for name in ("hidden", "weight"):
            inputs[name].requires_grad_()
        for _ in range(20):  # the current device stays 0
            # delays the mask's sum, which the host must not read before it has arrived
            with torch.cuda.device(device):
                torch.cuda._sleep(10_000_000)
            output = linear_expo_loss(**inputs, logits_budget_mb=8.0)
            result = (output.logps, output.loss.detach(), *gradients(output.loss, inputs))
            results.append(tuple(tensor.cpu() for tensor in result))
    differing = sum(not all(map(torch.equal, result, results[0])) for result in results)
    yield Measure("calls with other bits than the first on cuda:0", float(differing), 0.0)


CHECKS = {
    "in-place-race": Check("gradients in place are right, and equal in every repetition", check_race, seconds=90),
    "large-tensors": Check("gradients of 2^31 elements and more are scaled", check_large),
    "two-devices": Check("tensors on cuda:1 give the bits of cuda:0 while cuda:0 is current", check_devices),
}
