import functools
import threading
from types import SimpleNamespace

import pytest
import torch

from expo_kernels import Objective, _precision, _products, linear_expo_loss, linear_token_logps
from tests.numerics import make_batch

BACKENDS = torch.backends


def set_option(owner, name, value):
    return lambda: setattr(owner, name, value)


LOWERED = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "tf32": set_option(BACKENDS.cuda.matmul, "allow_tf32", True),
    "new tf32": set_option(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "new bfloat16": set_option(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "new, everywhere": set_option(BACKENDS, "fp32_precision", "bf16"),
    "float16 sums": set_option(BACKENDS.cuda.matmul, "allow_fp16_accumulation", True),
}


def switches():
    return {
        "cuda": BACKENDS.cuda.matmul.fp32_precision,
        "onednn": BACKENDS.mkldnn.matmul.fp32_precision,
        "everywhere": BACKENDS.fp32_precision,
        "fp16": BACKENDS.cuda.matmul.allow_fp16_accumulation,
    }


def is_full(state):
    return {state["cuda"], state["onednn"]} <= {"none", "ieee"} and not state["fp16"]


@pytest.fixture(autouse=True)
def _restored():
    before = switches()
    yield
    BACKENDS.cuda.matmul.allow_fp16_accumulation = False
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cuda.matmul.fp32_precision = BACKENDS.mkldnn.matmul.fp32_precision = "none"
    assert switches() == before


@pytest.fixture
def seen(monkeypatch):
    """The switches at every product of logits and of dWeight."""
    states = []

    def spied(original, *arguments, **options):
        states.append(switches())
        return original(*arguments, **options)

    for name in ("write_logits", "add_to_weight"):
        monkeypatch.setattr(_products, name, functools.partial(spied, getattr(_products, name)))
    return states


def run(batch):
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight))
    logps = linear_token_logps(hidden, weight, batch.completion_ids, mask=batch.completion_mask)
    logps.sum().backward()
    out = linear_expo_loss(
        hidden, weight, batch.completion_ids, batch.completion_mask, **batch.loss_inputs(Objective())
    )
    out.loss.backward()
    return out.loss, logps, hidden.grad, weight.grad


@pytest.mark.parametrize("lowered", LOWERED)
def test_no_switch_of_the_process_lowers_the_precision(lowered, seen):
    batch = make_batch(2, 40, 256, 1003, dtype=torch.float32)
    truth = run(batch)
    LOWERED[lowered]()
    before = switches()
    assert not is_full(before)
    made = run(batch)
    assert all(is_full(state) for state in seen)
    assert len(seen) >= 10
    assert all(torch.equal(a, b) for a, b in zip(made, truth, strict=True))
    assert switches() == before


@pytest.mark.parametrize("legacy", ["medium", "high", "highest"])
def test_the_old_switch_is_restored(legacy):
    torch.set_float32_matmul_precision(legacy)
    with _precision.full_precision():
        assert is_full(switches())
    assert torch.get_float32_matmul_precision() == legacy


def test_a_backend_that_followed_the_common_switch_follows_it_again():
    BACKENDS.fp32_precision = "bf16"
    with _precision.full_precision():
        assert is_full(switches())
    BACKENDS.fp32_precision = "tf32"
    assert switches()["onednn"] == "tf32"


def test_without_lowered_switches_none_is_touched(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: pytest.fail("a switch was set"))
    with _precision.full_precision():
        assert is_full(switches())


def test_an_error_restores_the_switches():
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(KeyError), _precision.full_precision():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "medium"


def test_the_last_of_several_threads_restores_the_switches():
    torch.set_float32_matmul_precision("high")
    entered, first_left, state = threading.Event(), threading.Event(), SimpleNamespace(after_first=None)

    def second():
        with _precision.full_precision():
            entered.set()
            assert first_left.wait(10)
            state.after_first = switches()

    thread = threading.Thread(target=second)
    with _precision.full_precision():
        thread.start()
        assert entered.wait(10)
    first_left.set()
    thread.join()
    assert is_full(state.after_first)
    assert torch.get_float32_matmul_precision() == "high"


def test_compiled_calls_are_guarded_too(seen):
    batch = make_batch(2, 40, 256, 1003, dtype=torch.float32)

    def logps():
        return linear_token_logps(batch.hidden, batch.weight, batch.completion_ids, mask=batch.completion_mask)

    truth = logps()
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(torch.compile(logps, fullgraph=True, backend="aot_eager")(), truth)
    assert all(is_full(state) for state in seen)
