"""Every public call on CUDA tensors, without a GPU: the host reads no value of the device, tensors are of one device,
and the number of ATen calls and of Triton launches stays within a budget."""

import functools

import pytest
import torch

from expo_kernels import (
    CurriculumTable,
    LossOutput,
    Objective,
    akl_beta,
    debug_checks,
    expo_loss,
    expo_loss_from_logps,
    group_advantages,
    linear_expo_loss,
    linear_token_logps,
    token_logps,
)
from tests.kernels.fake_cuda import HostWaitError, MixedDevicesError, backward, fake_cuda

B, T, H, V, G = 4, 16, 32, 1024, 2
ONE_ROW_MB = V * 4 / 2**20
SEQUENCES = Objective(ratio="sequence")


def on_device(*shape, dtype=torch.float32, device="cuda"):
    return torch.zeros(shape, dtype=dtype, device=device)


def loss_options(shape, **options):
    """The arguments that all losses share; `shape` is that of the mask."""
    old, ref = on_device(*shape), on_device(*shape)
    beta, rewards = on_device(), on_device(B)
    return {"rewards": rewards, "group_size": G, "old_logps": old, "ref_logps": ref, "beta": beta, **options}


def ids_and_mask(shape):
    return on_device(*shape, dtype=torch.int64), on_device(*shape, dtype=torch.bool)


def head(dtype, shape=(B, T), bias=False):
    hidden, weight = on_device(*shape, H, dtype=dtype), on_device(V, H, dtype=dtype)
    made = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    return made | ({"bias": on_device(V, dtype=dtype).requires_grad_()} if bias else {})


def packed():
    return {"cu_seqlens": torch.zeros(B + 1, dtype=torch.int32, device="cuda")}


def lengths(*values):
    return {"completion_lengths": torch.tensor(values)}


LENGTHS = lengths(T, T, T, T)

# --- the calls, each a function that prepares arguments and returns what to run


def ready_logits(dtype=torch.bfloat16, **options):
    leaf = on_device(B, T, V, dtype=dtype).requires_grad_()
    arguments = (*ids_and_mask((B, T)),), loss_options((B, T), **options)
    return lambda: expo_loss(leaf * 1, *arguments[0], **arguments[1])


def hidden_states(dtype=torch.bfloat16, *, rows=None, is_packed=False, bias=False, frozen=False, **options):
    shape = (B * T,) if is_packed else (B, T)
    tensors = head(dtype, shape, bias)
    tensors["weight"].requires_grad_(not frozen)
    ids, mask = ids_and_mask(shape)
    options = loss_options(shape, **(packed() if is_packed else {}), **options)
    budget = None if rows is None else rows * ONE_ROW_MB
    return lambda: linear_expo_loss(
        **tensors, completion_ids=ids, completion_mask=mask, logits_budget_mb=budget, **options
    )


def given_logps(**options):
    logps, (_, mask) = on_device(B, T).requires_grad_(), ids_and_mask((B, T))
    options = loss_options((B, T), **options)
    return lambda: expo_loss_from_logps(logps, mask, **options)


def logps_of_logits(**options):
    leaf, (ids, mask) = on_device(B, T, V).requires_grad_(), ids_and_mask((B, T))
    return lambda: token_logps(leaf, ids, mask=mask, return_entropy=True, **options)


def logps_of_hidden(rows=None, **options):
    tensors, (ids, mask) = head(torch.bfloat16), ids_and_mask((B, T))
    budget = None if rows is None else rows * ONE_ROW_MB
    return lambda: linear_token_logps(
        **tensors, completion_ids=ids, mask=mask, return_entropy=True, logits_budget_mb=budget, **options
    )


def advantages(scale):
    rewards = on_device(B)
    return lambda: group_advantages(rewards, G, scale=scale)


def beta():
    accuracies, weight = on_device(B), on_device()
    return lambda: akl_beta(accuracies, weight)


def curriculum(run):
    table = CurriculumTable(1000, device="cuda", estimate="counted")
    ids, rates = on_device(8, dtype=torch.int64), on_device(8)
    return functools.partial(run, table, ids, rates)


# most ATen calls, and Triton launches, of one call with its backward pass, by PyTorch 2.13; a call costs the host a few
# microseconds
BUDGETS = {
    "logits": (ready_logits, 34, 2),
    "logits, in place": (functools.partial(ready_logits, inplace=True), 35, 2),
    "logits, by sequence": (functools.partial(ready_logits, objective=SEQUENCES, return_entropy=True), 38, 4),
    "hidden, bfloat16": (hidden_states, 107, 1),
    "hidden, float32": (functools.partial(hidden_states, torch.float32), 131, 3),
    "hidden, bias, entropy bonus": (functools.partial(hidden_states, bias=True, entropy_bonus=0.01), 120, 1),
    "hidden, frozen head": (functools.partial(hidden_states, frozen=True), 64, 1),
    "hidden, packed": (functools.partial(hidden_states, is_packed=True), 117, 1),
    "hidden, temperatures of replies": (lambda: hidden_states(temperature=on_device(B)), 116, 1),
    "hidden, temperatures of tokens": (lambda: hidden_states(temperature=on_device(B, T)), 113, 1),
    "hidden, 4 chunks": (functools.partial(hidden_states, rows=16, **LENGTHS), 257, 4),
    "hidden, packed, 4 chunks": (
        functools.partial(hidden_states, rows=16, is_packed=True, **LENGTHS), 264, 4,
    ),
    "hidden, half of it masked, 2 chunks": (
        functools.partial(hidden_states, rows=16, **lengths(16, 0, 9, 7)), 159, 2,
    ),
    "hidden, by sequence, 2 chunks": (
        functools.partial(hidden_states, rows=32, objective=SEQUENCES, **LENGTHS), 162, 6,
    ),
    "hidden, packed, by sequence, 2 chunks": (
        functools.partial(hidden_states, rows=32, is_packed=True, objective=SEQUENCES, **LENGTHS), 171, 6,
    ),
    "logps": (given_logps, 32, 2),
    "logps, by sequence": (functools.partial(given_logps, objective=SEQUENCES), 32, 2),
    "token_logps": (logps_of_logits, 28, 2),
    "linear_token_logps": (logps_of_hidden, 120, 2),
    "linear_token_logps, temperatures of tokens": (
        lambda: logps_of_hidden(temperature=on_device(B, T)), 131, 2,
    ),
    "linear_token_logps, 4 chunks": (functools.partial(logps_of_hidden, rows=16, **LENGTHS), 303, 8),
    "group_advantages": (functools.partial(advantages, "group"), 13, 0),
    "group_advantages, batch": (functools.partial(advantages, "batch"), 13, 0),
    "akl_beta": (beta, 13, 0),
    "CurriculumTable.update": (functools.partial(curriculum, CurriculumTable.update), 8, 1),
    "CurriculumTable.sample": (functools.partial(curriculum, lambda table, *_: table.sample(8)), 3, 1),
    "CurriculumTable.sample, replacement": (
        functools.partial(curriculum, lambda table, *_: table.sample(8, replacement=True)), 14, 0,
    ),
    "CurriculumTable.weights": (functools.partial(curriculum, lambda table, *_: table.weights), 1, 0),
    "CurriculumTable.effective_sample_size": (
        functools.partial(curriculum, lambda table, *_: table.effective_sample_size), 8, 0,
    ),
}  # fmt: skip


def calls_of(prepare, arriving=T):
    """What one call does, and its backward pass if it has one."""
    with fake_cuda(arriving) as device:
        run = prepare()
        with device.strict() as calls:
            made = run()
            made = made.loss if isinstance(made, LossOutput) else made
            made = made[0] + made[1] if isinstance(made, tuple) else made
            if made is not None and made.requires_grad:
                backward(made, None if made.dim() == 0 else torch.ones_like(made))
    return calls


@pytest.mark.parametrize("name", BUDGETS)
def test_a_call_never_waits_and_stays_within_its_budget(name):
    prepare, most_aten, num_launches = BUDGETS[name]
    calls = calls_of(prepare)
    assert calls.waits == []
    assert calls.num_launches == num_launches, dict(calls.launches)
    assert calls.num_aten <= most_aten, dict(calls.aten)


# --- several chunks

FOUR_CHUNKS = functools.partial(hidden_states, rows=16)


def test_without_lengths_the_host_waits_once_and_only_for_several_chunks():
    assert calls_of(FOUR_CHUNKS).waits == ["Event.synchronize"]
    by_sequence = functools.partial(hidden_states, rows=32, objective=SEQUENCES)
    assert calls_of(by_sequence).waits == ["Event.synchronize"]
    assert calls_of(hidden_states).event_devices == []


def test_chunks_without_a_valid_token_are_not_launched():
    assert calls_of(FOUR_CHUNKS, arriving=T).num_launches == 4
    assert calls_of(FOUR_CHUNKS, arriving=T // 2).num_launches == 2
    assert calls_of(functools.partial(FOUR_CHUNKS, **lengths(3, 0, 0, 7))).num_launches == 1
    assert calls_of(functools.partial(FOUR_CHUNKS, **lengths(0, 0, 0, 0))).num_launches == 0


@pytest.mark.parametrize("known", [{}, lengths(3, 0, 0, 7)])
@pytest.mark.parametrize("objective", [Objective(), SEQUENCES])
def test_under_capture_the_host_neither_waits_nor_allocates_and_every_row_is_processed(known, objective):
    with fake_cuda() as device:
        run = hidden_states(rows=16, objective=objective, **known)
        device.is_capturing = True
        with device.strict() as calls:
            run()
    assert calls.waits == calls.event_devices == []
    first_rows = {arguments["first_row"] for arguments in calls.launch_arguments if "first_row" in arguments}
    assert first_rows == {0, 16, 32, 48}


@pytest.mark.parametrize("objective", [Objective(), SEQUENCES])
def test_events_and_launches_are_those_of_the_tensors_device(objective):
    with fake_cuda(arriving=T) as device, torch.no_grad():
        arguments = {
            name: tensor.to("cuda:1")
            for name, tensor in (
                head(torch.bfloat16)
                | dict(zip(("completion_ids", "completion_mask"), ids_and_mask((B, T)), strict=True))
            ).items()
        }
        options = {
            name: value.to("cuda:1") if isinstance(value, torch.Tensor) else value
            for name, value in loss_options((B, T), objective=objective).items()
        }
        with device.strict() as calls:
            linear_expo_loss(**arguments, **options, logits_budget_mb=32 * ONE_ROW_MB)
    assert calls.event_devices == [1]
    assert calls.num_launches > 1


def test_the_numbers_of_an_objective_are_written_by_each_call_on_its_own_stream():
    with fake_cuda() as device:
        run = hidden_states(rows=16, **LENGTHS)
        with device.strict() as calls:
            run()
            run()
    blocks = [arguments["hyper_ptr"] for arguments in calls.launch_arguments]
    assert len({id(block) for block in blocks[:4]}) == 1
    assert len({id(block) for block in blocks}) == 2


def test_the_sum_of_given_lengths_is_checked_on_the_device():
    calls = calls_of(functools.partial(hidden_states, rows=16, **LENGTHS))
    assert calls.aten["aten._assert_async.msg"] == 1


# --- a gradient tolerance: an asynchronous copy says how many columns were kept

TOLERANT = functools.partial(hidden_states, gradient_tolerance=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"objective": SEQUENCES}, {"frozen": True}, {"bias": True}])
def test_with_a_tolerance_the_host_waits_for_columns_and_for_the_answer_that_the_bound_holds(dtype, options):
    calls = calls_of(functools.partial(TOLERANT, dtype, rows=16, **LENGTHS, **options), arriving=1)
    assert calls.waits == ["Event.synchronize"] * 5
    assert calls.launches["column_squares_kernel"] == 4


def test_columns_of_a_chunk_are_awaited_after_the_next_chunk_is_launched(monkeypatch):
    from expo_kernels import _plans

    launched = []
    with fake_cuda(arriving=1) as device:
        run = TOLERANT(rows=16, **LENGTHS)
        original = _plans.HostCopy.read

        def read(copy):
            launched.append(device.calls.launches["row_loss_kernel"])
            return original(copy)

        monkeypatch.setattr(_plans.HostCopy, "read", read)
        with device.strict():
            run()
    assert launched == [2, 3, 4, 4, 4]  # the last is for the bound


def test_if_all_columns_are_kept_no_bound_is_awaited():
    assert calls_of(functools.partial(TOLERANT, rows=16, **LENGTHS), arriving=V).waits == ["Event.synchronize"] * 4


def test_if_the_bound_does_not_hold_the_call_is_exact():
    calls = calls_of(functools.partial(TOLERANT, rows=16, **LENGTHS), arriving=2)
    assert calls.launches["row_loss_kernel"] == 8


@pytest.mark.parametrize("reason", ["capture", "entropy bonus", "exponentials", "no gradient"])
def test_where_columns_cannot_be_left_out_the_host_does_not_wait(reason, monkeypatch):
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", str(int(reason == "exponentials")))
    options = {"entropy_bonus": 0.01} if reason == "entropy bonus" else {}
    with fake_cuda(arriving=1) as device, torch.set_grad_enabled(reason != "no gradient"):
        run = TOLERANT(rows=16, **LENGTHS, **options)
        device.is_capturing = reason == "capture"
        with device.strict() as calls:
            run()
    assert calls.waits == []
    assert calls.launches["column_squares_kernel"] == 0


# --- the checks can fail


PLANTED_READS = {
    "item": lambda mask: mask.sum().item(),
    "bool": lambda mask: bool(mask.any()),
    "int": lambda mask: int(mask.sum()),
    "tolist": lambda mask: mask.sum(0).tolist(),
    "nonzero": lambda mask: mask.nonzero(),
    "index by a mask": lambda mask: mask[mask],
    "write by a mask": lambda mask: mask.float().__setitem__(mask, 0.0),
    "cpu": lambda mask: mask.cpu(),
    "copy to the device": lambda mask: torch.ones(3).to(mask.device),
    "copy of pageable memory": lambda mask: torch.ones(3).to(mask.device, non_blocking=True),
    "tensor of numbers": lambda mask: torch.tensor([1.0, 2.0], device=mask.device),
    "synchronize": lambda mask: torch.cuda.synchronize(),
    "equal": lambda mask: torch.equal(mask, mask),
}


@pytest.mark.parametrize("name", PLANTED_READS)
def test_a_read_planted_in_an_op_is_reported(name, monkeypatch):
    from expo_kernels._triton import backend

    def make_tokens(inputs, ids, original=backend.make_tokens):
        PLANTED_READS[name](inputs.completion_mask)
        return original(inputs, ids)

    monkeypatch.setattr(backend, "make_tokens", make_tokens)
    with pytest.raises(HostWaitError):
        calls_of(hidden_states)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("of_a_launch", [False, True])
def test_a_tensor_planted_on_another_device_is_reported(device, of_a_launch, monkeypatch):
    from expo_kernels._triton import backend

    def make_sums(where, original=backend.make_sums):
        sums = original(where)
        planted = torch.zeros(8, device=device)
        return sums._replace(metrics=planted if of_a_launch else sums.metrics + planted)

    monkeypatch.setattr(backend, "make_sums", make_sums)
    with pytest.raises(MixedDevicesError):
        calls_of(hidden_states)


def test_a_read_planted_in_backward_is_reported(monkeypatch):
    from expo_kernels import _ops

    monkeypatch.setattr(_ops, "_scaled", lambda gradient, grad_loss, dtype: gradient * grad_loss.item())
    with pytest.raises(HostWaitError):
        calls_of(hidden_states)


def test_a_check_of_values_is_a_read():
    with debug_checks(True), pytest.raises(HostWaitError):
        calls_of(hidden_states)


def test_one_call_more_exceeds_a_budget(monkeypatch):
    from expo_kernels._triton import backend

    def make_sums(where, original=backend.make_sums):
        return original(where)._replace(counter=torch.zeros(1, dtype=torch.int32, device=where))

    monkeypatch.setattr(backend, "make_sums", make_sums)
    with pytest.raises(AssertionError):
        test_a_call_never_waits_and_stays_within_its_budget("hidden, bfloat16")
