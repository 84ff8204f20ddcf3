"""The registered ops: equal bits under torch.compile(fullgraph=True), and the checks of torch.library."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from expo_kernels import (
    CurriculumTable,
    ExpoLoss,
    LinearExpoLoss,
    Objective,
    akl_beta,
    expo_loss,
    expo_loss_from_logps,
    group_advantages,
    linear_expo_loss,
    linear_token_logps,
    token_logps,
)
from expo_kernels._inputs import check_inputs
from tests.numerics import make_batch

OPS = torch.ops.expo_kernels
LEAVES = ("hidden", "weight", "bias", "logits", "logps")
SEQUENCE = Objective(ratio="sequence", clip_low=0.05, temperature=0.7)
EACH_TOKEN = Objective(ratio="sequence", aggregation="none")
ROLLOUT = Objective(rollout_correction="sequence", aggregation="token", logit_softcap=3.0)


@pytest.fixture(autouse=True)
def _nothing_compiled_before(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_call(**options):
    """A batch's tensors by name; the differentiable ones are leaves."""
    batch = make_batch(dtype=torch.float32, **options)
    call = {name: tensor.clone() for name, tensor in vars(batch).items()}
    call["logits"], call["logps"] = batch.logits, batch.old_logps + 0.1
    for name in LEAVES:
        call[name] = call[name].detach().requires_grad_()
    return call


def others(call, *names):
    return {name: call[name] for name in ("advantages", "old_logps", "ref_logps", *names)}


def positions(call):
    return call["completion_ids"], call["completion_mask"]


def linear(call, **options):
    loss_inputs = others(call) | options
    return linear_expo_loss(call["hidden"], call["weight"], *positions(call), bias=call["bias"], **loss_inputs)


def packed(call, objective=None):
    mask = call["completion_mask"]
    flat = {name: call[name].flatten(0, 1) for name in ("hidden", "completion_ids", "old_logps", "ref_logps")}
    starts = torch.arange(mask.shape[0] + 1, dtype=torch.int32) * mask.shape[1]
    return linear_expo_loss(
        flat["hidden"], call["weight"], flat["completion_ids"], mask.flatten(), cu_seqlens=starts,
        advantages=call["advantages"], old_logps=flat["old_logps"], ref_logps=flat["ref_logps"], objective=objective,
    )  # fmt: skip


def with_both(pair):
    """A function of log-probs and of entropies or log-sum-exps, and both."""
    logps, others = pair
    return logps.sin() + others.cos(), logps, others


# the first result of each is a loss, or a tensor to differentiate
CALLS = {
    "token_logps": lambda call: token_logps(call["logits"], call["completion_ids"]),
    "token_logps, entropies": lambda call: with_both(
        token_logps(call["logits"], call["completion_ids"], mask=call["completion_mask"], return_entropy=True)
    ),
    "linear_token_logps": lambda call: linear_token_logps(
        call["hidden"], call["weight"], call["completion_ids"], bias=call["bias"], mask=call["completion_mask"],
        temperature=0.7, logits_budget_mb=3 * 13 * 4 / 2**20,
    ),
    "linear_token_logps, entropies": lambda call: with_both(
        linear_token_logps(
            call["hidden"], call["weight"], call["completion_ids"], logit_softcap=3.0, return_entropy=True
        )
    ),
    "linear_token_logps, log-sum-exps": lambda call: with_both(
        linear_token_logps(
            call["hidden"], call["weight"], call["completion_ids"], mask=call["completion_mask"], return_lse=True
        )
    ),
    "expo_loss": lambda call: expo_loss(call["logits"], *positions(call), return_entropy=True, **others(call)),
    "expo_loss, in place": lambda call: expo_loss(call["logits"] * 2.0, *positions(call), inplace=True, **others(call)),
    "linear_expo_loss": linear,
    "linear_expo_loss, scaled": lambda call: linear(call).loss * 3.0,
    "linear_expo_loss, frozen weight": lambda call: linear_expo_loss(
        call["hidden"], call["weight"].detach(), *positions(call), **others(call)
    ),
    "linear_expo_loss, sequence ratio": lambda call: linear(
        call, objective=SEQUENCE, logits_budget_mb=5 * 13 * 4 / 2**20, return_entropy=True
    ),
    "linear_expo_loss, known lengths": lambda call: linear(call, completion_lengths=call["completion_mask"].sum(1)),
    "linear_expo_loss, rollout": lambda call: linear(call, objective=ROLLOUT, rollout_logps=call["rollout_logps"]),
    "linear_expo_loss, entropy bonus": lambda call: linear(
        call, objective=Objective(surrogate="gmpo"), entropy_bonus=0.1, logits_budget_mb=7 * 13 * 4 / 2**20
    ),
    "linear_expo_loss, rewards": lambda call: linear(
        call, advantages=None, rewards=call["advantages"], group_size=2, normalizer=3.0
    ),
    "linear_expo_loss, objective made inside": lambda call: linear(call, objective=Objective(clip_high=0.28, kl="k2")),
    "packed": packed,
    "packed, sequence ratio": lambda call: packed(call, SEQUENCE),
    "expo_loss_from_logps": lambda call: expo_loss_from_logps(call["logps"], call["completion_mask"], **others(call)),
    "expo_loss_from_logps, one loss per token": lambda call: expo_loss_from_logps(
        call["logps"], call["completion_mask"], objective=EACH_TOKEN, **others(call)
    ),
    "ExpoLoss": lambda call: ExpoLoss(SEQUENCE)(call["logits"], *positions(call), **others(call)),
    "LinearExpoLoss": lambda call: LinearExpoLoss()(call["hidden"], call["weight"], *positions(call), **others(call)),
    "group_advantages": lambda call: group_advantages(call["advantages"], 2, scale="batch"),
    "akl_beta": lambda call: akl_beta(call["advantages"].sigmoid(), call["advantages"].std()),
    "akl_beta, own rho": lambda call: akl_beta(
        call["advantages"].sigmoid(), 0.1, rho=lambda mean: 1.0 + mean.sigmoid()
    ),
}  # fmt: skip


def outcome(function, call):
    """All outputs of a call, and all gradients of its first."""
    outputs = torch.utils._pytree.tree_leaves(function(call))
    for name in LEAVES:
        call[name].grad = None
    if outputs[0].requires_grad:
        outputs[0].backward(torch.ones_like(outputs[0]))
    return [tensor.detach() for tensor in outputs] + [call[name].grad for name in LEAVES]


def assert_same_bits(given, expected):
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls_give_equal_bits_forward_and_backward(name):
    call, function = make_call(), CALLS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(outcome(compiled, call), outcome(function, call))


def test_under_no_grad_a_compiled_loss_needs_no_gradient():
    call = make_call()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(call)
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, linear(call).loss)


@pytest.mark.medium
def test_inductor_gives_the_gradients_of_a_model_and_its_head():
    call = make_call()

    def step(call):
        states = call["hidden"].sigmoid() * 2.0
        return linear(call | {"hidden": states}).loss * 3.0

    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    for one, other in zip(outcome(compiled, call), outcome(step, call), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_bit_of_a_compiled_call(dtype):
    call = make_call()
    for name in ("hidden", "weight", "bias"):
        call[name] = call[name].detach().to(dtype).requires_grad_()
    expected = outcome(linear, call)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(outcome(compiled, call), expected)


@pytest.mark.parametrize("name", ["linear_expo_loss", "packed", "linear_token_logps", "expo_loss_from_logps"])
def test_new_sizes_compile_once_more_and_no_further(name):
    function, counter = CALLS[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for B, T in ((2, 3), (4, 6), (5, 7), (8, 9), (3, 11)):
        call = make_call(B=B, T=T)
        assert_same_bits(outcome(compiled, call), outcome(function, call))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_new_beta_and_normalizer_at_each_step_compile_nothing_new(kind):
    counter = CompileCounterWithBackend("aot_eager")

    def step(call, beta, normalizer):
        return linear(call, beta=beta, normalizer=normalizer)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    call = make_call()
    for turn in range(6):
        settings = kind(0.01 + 0.02 * turn), kind(2.5 + turn)
        given, expected = compiled(call, *settings), step(call, *settings)
        assert torch.equal(given.loss, expected.loss)
    # torch.compile treats a float as a constant until it changes
    assert counter.frame_count <= (3 if kind is float else 1)


@pytest.mark.parametrize(
    ("change", "function", "named"),
    [
        ({"completion_ids": torch.full((4, 6), 13)}, linear, "completion_ids holds 13; expected 0 <= id < 13"),
        ({"completion_mask": torch.full((4, 6), 0.5)}, linear, "completion_mask holds values other than 0 and 1"),
        (
            {"advantages": torch.tensor([1.0, float("nan"), 0.0, 1.0])},
            CALLS["linear_expo_loss, rewards"],
            "rewards holds 1 non-finite",
        ),
        ({"beta": torch.tensor(-1.0)}, lambda call: linear(call, beta=call["beta"]), "beta is -1"),
        (
            {"beta": torch.tensor(0.5)},
            lambda call: linear(call, beta=call["beta"], ref_logps=None),
            "ref_logps is None",
        ),
        (
            {"normalizer": torch.tensor(0.0)},
            lambda call: linear(call, normalizer=call["normalizer"]),
            "normalizer is 0",
        ),
        ({"completion_ids": torch.full((4, 6), -1)}, CALLS["linear_token_logps"], "completion_ids holds -1"),
        ({"advantages": torch.full((4,), float("inf"))}, CALLS["group_advantages"], "rewards holds 4 non-finite"),
        ({"advantages": torch.full((4,), float("nan"))}, CALLS["akl_beta"], "accuracies holds 4 non-finite"),
        (
            {"advantages": torch.full((4,), 9.0)},
            lambda call: akl_beta(call["advantages"].abs()),
            "accuracies ranges over",
        ),
        ({"completion_mask": torch.full((4, 6), 2)}, CALLS["expo_loss_from_logps"], "completion_mask holds values"),
    ],
)
def test_values_are_checked_when_the_compiled_graph_runs(change, function, named):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    call = make_call() | {"beta": torch.tensor(0.0), "normalizer": torch.tensor(1.0)}
    compiled(call)
    with pytest.raises(ValueError, match=named):
        compiled(call | change)


def test_wrong_shapes_are_refused_while_compiling():
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="old_logps has shape"):
        compiled(make_call() | {"old_logps": torch.zeros(4, 5)})


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("linear_expo_loss", "policy_loss"),
        ("expo_loss_from_logps", "policy_loss_from_logps"),
        ("linear_token_logps", "token_logps"),
        ("group_advantages", "group_advantages"),
    ],
)
def test_a_graph_holds_one_op_per_call_whatever_the_path(name, op):
    targets = []

    def keep(module, _):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    torch.compile(CALLS[name], fullgraph=True, backend=keep)(make_call())
    assert [target for target in targets if "expo_kernels" in target] == [f"expo_kernels.{op}.default"]


def test_a_compiled_curriculum_updates_and_draws_as_the_eager_one():
    ids, rates = torch.tensor([3, 1, 3]), torch.tensor([0.1, 0.2, 0.7])

    def step(table):
        table.update(ids, rates)
        return table.sample(4), table.sample(6, replacement=True), table.weights.clone(), table.effective_sample_size

    eager, compiled = CurriculumTable(9), CurriculumTable(9)
    torch.manual_seed(3)
    expected = step(eager)
    torch.manual_seed(3)
    given = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    assert_same_bits(given, expected)
    assert torch.equal(compiled.pass_rates, eager.pass_rates)
    assert compiled.visits.tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="question_ids holds 9"):
        torch.compile(CurriculumTable(9).update, fullgraph=True, backend="aot_eager")(ids + 6, rates)


# --- the checks of torch.library


def op_inputs(call, *, objective=None, is_packed=False, **options):
    mask = call["completion_mask"].flatten() if is_packed else call["completion_mask"]
    named = dict.fromkeys(("rewards", "group_size", "rollout_logps", "normalizer", "cu_seqlens"))
    named |= {"beta": 0.1, "objective": objective} | others(call) | options
    if is_packed:
        named |= {name: named[name].flatten() for name in ("old_logps", "ref_logps")}
        named["cu_seqlens"] = 6 * torch.arange(5, dtype=torch.int32)
    inputs = check_inputs(mask, **named)
    return mask, inputs.to_tensors(torch.float32), inputs.objective.text, inputs.group_size


def loss_arguments(
    call, *, with_bias=True, frozen=False, return_entropy=False, is_packed=False, weight_dtype=None, tolerance=0.0,
    **options,
):  # fmt: skip
    hidden, ids = call["hidden"].detach(), call["completion_ids"]
    if is_packed:
        hidden, ids = hidden.flatten(0, 1), ids.flatten()
    weight, bias = call["weight"].detach() if frozen else call["weight"], call["bias"] if with_bias else None
    wants_grad = [True, not frozen, with_bias]
    inputs = op_inputs(call, is_packed=is_packed, **options)
    settings = None, return_entropy, None, weight_dtype, tolerance
    return hidden.requires_grad_(), weight, bias, wants_grad, ids, *inputs, *settings


OPCHECKS = {
    "padded": lambda call: (OPS.policy_loss, loss_arguments(call)),
    "packed": lambda call: (OPS.policy_loss, loss_arguments(call, is_packed=True)),
    "rounded weight": lambda call: (OPS.policy_loss, loss_arguments(call, weight_dtype=torch.bfloat16)),
    "gradient tolerance": lambda call: (OPS.policy_loss, loss_arguments(call, tolerance=1e-2)),
    "frozen weight": lambda call: (OPS.policy_loss, loss_arguments(call, frozen=True, with_bias=False)),
    "sequence ratio": lambda call: (OPS.policy_loss, loss_arguments(call, objective=SEQUENCE)),
    "entropy, on-policy": lambda call: (OPS.policy_loss, loss_arguments(call, return_entropy=True, old_logps=None)),
    "rewards": lambda call: (
        OPS.policy_loss,
        loss_arguments(call, advantages=None, rewards=call["advantages"], group_size=2, normalizer=3.0),
    ),
    "ready logits": lambda call: (
        OPS.policy_loss,
        (
            *(call["logits"], None, None, [True, False, False], call["completion_ids"], *op_inputs(call)),
            *(None, False, None, None, 0.0),
        ),
    ),
    "without gradients": lambda call: (
        OPS.policy_loss,
        (
            *(call["logits"].detach(), None, None, [False] * 3, call["completion_ids"], *op_inputs(call)),
            *(None, False, None, None, 0.0),
        ),
    ),
    "in place": lambda call: (
        OPS.policy_loss_, (call["logits"].detach(), call["completion_ids"], *op_inputs(call), False)
    ),
    "a gradient known already": lambda call: (
        OPS.with_gradient, (torch.ones(()), call["logits"], torch.randn(call["logits"].shape))
    ),
    "ready log-probs": lambda call: (OPS.policy_loss_from_logps, (call["logps"], [True], *op_inputs(call))),
    "one loss per token": lambda call: (
        OPS.token_losses,
        (call["logps"], *op_inputs(call, objective=Objective(aggregation="none"))),
    ),
    "log-probs": lambda call: (
        OPS.token_logps,
        (call["logits"], None, None, *positions(call), None, None, 0.7, None, None, False, True, None, 0.0, False),
    ),
    "log-probs, entropies and log-sum-exps": lambda call: (
        OPS.token_logps,
        (
            *(call["hidden"], call["weight"], call["bias"], call["completion_ids"]),
            *(call["completion_mask"], call["completion_mask"].sum(1), None),
            *(1.0, 3.0, None, True, True, None, 1e-2, True),
        ),
    ),
    "group advantages": lambda call: (OPS.group_advantages, (call["advantages"], 2, "group", 1e-6)),
    "accuracies": lambda call: (OPS.accuracy_sum, (call["advantages"].sigmoid(),)),
    "mean accuracy": lambda call: (OPS.mean_accuracy, (call["advantages"][:2].double().exp(),)),
    "beta": lambda call: (OPS.scaled_beta, (torch.tensor(0.1), torch.tensor(0.7))),
    "curriculum": lambda call: (
        OPS.update_curriculum,
        (
            torch.tensor([3, 1, 3]), torch.rand(3), torch.rand(9), torch.zeros(9, dtype=torch.int64), torch.rand(9),
            torch.tensor([0.9, 0.5, 0.3, 1.0], dtype=torch.float64),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPCHECKS)
def test_torch_library_finds_nothing_wrong(name):
    op, arguments = OPCHECKS[name](make_call())
    assert set(opcheck(op, arguments).values()) == {"SUCCESS"}


def test_a_float32_gradient_is_never_copied():
    call = make_call()
    loss, *_, gradients = OPS.policy_loss(*loss_arguments(call))
    assert all(tensor.grad_fn is None for tensor in gradients)
    places, expected = [tensor.data_ptr() for tensor in gradients], 3.0 * gradients[1]
    del gradients, _
    (3.0 * loss).backward()
    assert torch.equal(call["weight"].grad, expected)
    assert [call["weight"].grad.data_ptr(), call["bias"].grad.data_ptr()] == places[1:]


def test_a_gradient_of_the_gradient_is_refused():
    call = make_call()
    (grad,) = torch.autograd.grad(linear(call).loss ** 2, call["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
