"""Temperatures per reply and per token: values and gradients against float64, and against those of one number."""

import dataclasses

import pytest
import torch

from expo_kernels import (
    LinearExpoLoss,
    Objective,
    _launch,
    _products,
    expo_loss,
    linear_expo_loss,
    linear_token_logps,
    reference,
    token_logps,
)
from tests.numerics import make_batch, relative_error

B, T, H, V = 3, 4, 3, 5
OBJECTIVES = {
    "clip": Objective(clip_low=0.1, clip_high=0.15),
    "dual clip": Objective(dual_clip=1.3, kl="k1"),
    "gspo": Objective(ratio="sequence", clip_low=0.05, clip_high=0.05),
    "gspo token": Objective(ratio="sequence_token", kl_importance_weighted=True),
    "cispo": Objective(surrogate="cispo", aggregation="token"),
    "cispo of sequences": Objective(surrogate="cispo", ratio="sequence", logit_softcap=1.5),
    "sapo": Objective(surrogate="sapo", kl="k2", aggregation="constant", max_completion_length=7),
    "gmpo": Objective(surrogate="gmpo", clip_low=0.1, clip_high=0.15),
    "vespo": Objective(surrogate="vespo", aggregation="token", rollout_correction="token", rollout_cap=1.4),
    "dppo": Objective(surrogate="dppo_tv", clip_low=0.01, clip_high=0.02, logit_softcap=1.5),
    "luspo": Objective(ratio="sequence", aggregation="sum"),
    "rollout of sequences": Objective(rollout_correction="sequence_mask", rollout_cap=1.4, rollout_floor=0.7),
}
SHAPES = {"per reply": (B,), "per token": (B, T)}


def exact_dtype():
    """The kernels do not support float64."""
    return torch.float32 if _launch._switch.kernels_on_cpu else torch.float64


def bounds(dtype):
    return {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 3e-6}


def drawn(*shape, seed=0):
    """Temperatures between 0.5 and 1.5, all different."""
    return 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def of_tokens(temperature, shape):
    return temperature.double().view(len(temperature), -1).expand(shape)


def budget_of(rows, vocab_size, dtype):
    return rows * vocab_size * dtype.itemsize / 2**20


def true_outputs(batch, temperature, softcap):
    """Leaves in float64, their logits, and log-probs, entropies and log-sum-exps."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (batch.hidden, batch.weight, batch.bias)]
    logits, each = leaves[0] @ leaves[1].T + leaves[2], of_tokens(temperature, batch.completion_ids.shape)
    outputs = (
        reference.token_logps(logits, batch.completion_ids, each, softcap),
        reference.token_entropies(logits, each, softcap),
        reference.log_sum_exps(logits, each, softcap),
    )
    return leaves, logits, outputs


def true_loss(batch, objective, temperature, entropy_bonus, beta):
    """The loss, and its gradients in hidden states, weight, bias and logits."""
    leaves, logits, (logps, entropies, _) = true_outputs(batch, temperature, objective.logit_softcap)
    given = dict.fromkeys(("advantages", "old_logps", "ref_logps", "rollout_logps"))
    given |= {name: tensor.double() for name, tensor in batch.loss_inputs(objective).items()}
    loss = reference.expo_loss_from_logps(
        logps, batch.completion_mask, objective=objective, entropies=entropies, **given,
        entropy_bonus=torch.tensor(entropy_bonus, dtype=torch.float64), beta=torch.tensor(beta, dtype=torch.float64),
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, (*leaves, logits))


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_has_the_value_and_the_gradients_of_the_formula(name, shape, entropy_bonus):
    dtype, objective, temperature = exact_dtype(), OBJECTIVES[name], drawn(*shape)
    batch = make_batch(B, T, H, V, dtype=dtype)
    ids, mask, inputs = batch.completion_ids, batch.completion_mask, batch.loss_inputs(objective)
    inputs |= {"objective": objective, "temperature": temperature, "beta": 0.1, "entropy_bonus": entropy_bonus}
    truth, (*linear_grads, logits_grad) = true_loss(batch, objective, temperature, entropy_bonus, 0.1)

    def compare(loss, leaves, grads):
        made = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        for one, other in zip(made, [truth, *grads], strict=True):
            torch.testing.assert_close(one.double(), other, **bounds(dtype))

    logits = batch.logits.detach().requires_grad_()
    compare(expo_loss(logits, ids, mask, **inputs).loss, [logits], [logits_grad])
    leaves = [tensor.requires_grad_() for tensor in (batch.hidden, batch.weight, batch.bias)]
    for rows in (3, 5):  # less than a sequence, and more
        out = linear_expo_loss(
            *leaves[:2], ids, mask, bias=leaves[2], logits_budget_mb=budget_of(rows, V, dtype), **inputs
        )
        compare(out.loss, leaves, linear_grads)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_log_probs_entropies_and_log_sum_exps_are_those_of_the_formula(shape, softcap):
    dtype, temperature = exact_dtype(), drawn(*shape)
    batch = make_batch(B, T, H, V, dtype=dtype)
    true_leaves, true_logits, truth = true_outputs(batch, temperature, softcap)
    leaves = [tensor.requires_grad_() for tensor in (batch.hidden, batch.weight, batch.bias)]
    logits = batch.logits.detach().requires_grad_()
    options = {"temperature": temperature, "logit_softcap": softcap, "return_entropy": True, "return_lse": True}
    budget = budget_of(5, V, dtype)
    for made, of, true_of in (
        (token_logps(logits, batch.completion_ids, **options), [logits], [true_logits]),
        (
            linear_token_logps(*leaves[:2], batch.completion_ids, bias=leaves[2], logits_budget_mb=budget, **options),
            leaves,
            true_leaves,
        ),
    ):
        for one, other in zip(made, truth, strict=True):
            torch.testing.assert_close(one.double(), other, **bounds(dtype))
        for weights in ((1.0, 0.0, 0.0), (1.0, 0.3, 0.0), (0.5, 0.3, -0.2)):
            sums = [
                sum(weight * output.sin().sum() for weight, output in zip(weights, outputs, strict=True) if weight)
                for outputs in (made, truth)
            ]
            grads = torch.autograd.grad(sums[0], of, retain_graph=True)
            for one, other in zip(grads, torch.autograd.grad(sums[1], true_of, retain_graph=True), strict=True):
                torch.testing.assert_close(one.double(), other, **bounds(dtype))


@pytest.mark.parametrize("name", ["clip", "gspo", "dppo"])
def test_equal_temperatures_are_one_number(name):
    objective, batch = OBJECTIVES[name], make_batch(4, 16, 8, 300, dtype=torch.float32)
    ids, mask, inputs = batch.completion_ids, batch.completion_mask, batch.loss_inputs(objective)
    outcomes = []
    for given in (
        {"objective": dataclasses.replace(objective, temperature=0.75)},
        *({"objective": objective, "temperature": value} for value in (0.75, torch.full((4, 16), 0.75))),
    ):
        logits = batch.logits.requires_grad_()
        leaves = [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight)]
        losses = (
            expo_loss(logits, ids, mask, **given, **inputs),
            linear_expo_loss(*leaves, ids, mask, **given, **inputs),
        )
        grads = [torch.autograd.grad(losses[0].loss, logits), torch.autograd.grad(losses[1].loss, leaves)]
        outcomes.append([[out.loss.detach(), out.logps, *some] for out, some in zip(losses, grads, strict=True)])
    number, as_argument, tensor = outcomes
    for of_number, of_argument in zip(number, as_argument, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(of_number, of_argument, strict=True))
    # the products of a head multiply by the number while they add up
    assert all(torch.equal(one, other) for one, other in zip(number[0], tensor[0], strict=True))
    for one, other in zip(number[1], tensor[1], strict=True):
        assert relative_error(other, one) <= 1e-6


@pytest.mark.parametrize("name", ["clip", "gspo"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_packed_sequences_have_the_results_of_padded_ones(name, shape):
    batch, temperature = make_batch(B, T, H, V, dtype=torch.float32), drawn(*shape)
    mask, objective = batch.completion_mask, OBJECTIVES[name]
    inputs, lengths = batch.loss_inputs(objective), mask.sum(1)
    padded = expo_loss(batch.logits, batch.completion_ids, mask, temperature=temperature, objective=objective, **inputs)
    packed = {value: tensor[mask] if tensor.dim() == 2 else tensor for value, tensor in inputs.items()}
    out = expo_loss(
        batch.logits[mask], batch.completion_ids[mask], mask[mask], objective=objective,
        temperature=temperature if temperature.dim() == 1 else temperature[mask],
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), **packed,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, padded.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.logps, padded.logps[mask], rtol=1e-6, atol=1e-6)
    if temperature.dim() == 2:
        logps = token_logps(batch.logits[mask], batch.completion_ids[mask], temperature=temperature[mask])
        torch.testing.assert_close(logps, out.logps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("garbage", [float("nan"), 0.0, -1.0, float("inf")])
def test_temperatures_of_masked_positions_never_matter(garbage):
    batch, clean = make_batch(B, T, H, V, dtype=torch.float32), drawn(B, T)
    batch.completion_mask[1] = False
    ids, mask = batch.completion_ids, batch.completion_mask
    outcomes = []
    for temperature in (clean, clean.masked_fill(~mask, garbage)):
        leaves = [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight)]
        out = linear_expo_loss(
            *leaves, ids, mask, temperature=temperature, entropy_bonus=0.1, **batch.loss_inputs(Objective())
        )
        outputs = linear_token_logps(*leaves, ids, mask=mask, temperature=temperature, return_entropy=True)
        (out.loss + outputs[0].sum() + outputs[1].sum()).backward()
        outcomes.append([out.loss, out.logps, *out.metrics.values(), *outputs, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    of_replies = torch.tensor([0.7, garbage, 1.2])
    assert torch.isfinite(token_logps(batch.logits, ids, mask=mask, temperature=of_replies)).all()


def test_no_gradient_flows_to_a_temperature():
    batch, temperature = make_batch(B, T, H, V, dtype=torch.float32), drawn(B, T).requires_grad_()
    ids, mask, logits = batch.completion_ids, batch.completion_mask, batch.logits.requires_grad_()
    out = expo_loss(logits, ids, mask, temperature=temperature, **batch.loss_inputs(Objective()))
    (out.loss + token_logps(logits, ids, temperature=temperature).sum()).backward()
    assert temperature.grad is None
    assert not token_logps(logits.detach(), ids, temperature=temperature).requires_grad


@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence", logit_softcap=2.0)])
def test_a_gradient_in_place_of_the_logits_is_the_same(objective):
    batch, temperature = make_batch(B, T, H, 17, dtype=torch.float32), drawn(B, T)
    inputs = batch.loss_inputs(objective) | {"objective": objective, "temperature": temperature}
    grads = []
    for inplace in (False, True):
        logits = batch.logits.requires_grad_()
        out = expo_loss(logits * 1.0, batch.completion_ids, batch.completion_mask, inplace=inplace, **inputs)
        grads.append(torch.autograd.grad(out.loss, logits)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_temperatures_of_any_float_dtype_and_stride(dtype):
    batch, temperature = make_batch(B, T, H, V, dtype=torch.float32), drawn(T, B).to(dtype).T
    made = token_logps(batch.logits, batch.completion_ids, temperature=temperature)
    truth = reference.token_logps(batch.logits.double(), batch.completion_ids, temperature.double())
    torch.testing.assert_close(made.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence")])
def test_a_gradient_tolerance_holds(objective):
    batch, temperature = make_batch(4, 16, 16, 2000, dtype=torch.float32), drawn(4, 16)
    batch.weight *= 6.0  # most probability lies on few columns
    inputs = {"advantages": batch.advantages, "temperature": 0.5 * temperature, "beta": 0.0}
    grads = []
    for tolerance in (0.0, 0.1):
        leaves = [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight)]
        loss = LinearExpoLoss(objective, gradient_tolerance=tolerance)
        out = loss(*leaves, batch.completion_ids, batch.completion_mask, **inputs)
        grads.append(torch.autograd.grad(out.loss, leaves))
    assert 0 < out.metrics["gradient_error_bound"] <= 0.1
    assert out.metrics["kept_columns"] < 0.9
    for exact, approximate in zip(*grads, strict=True):
        assert relative_error(approximate, exact) <= float(out.metrics["gradient_error_bound"]) + 1e-5


def test_rows_without_a_gradient_join_no_product(monkeypatch):
    monkeypatch.setattr(_products, "LEAST_MOVED", 1)
    batch, temperature = make_batch(4, 16, 8, 50, dtype=torch.float32), drawn(4, 16)
    batch.advantages[:3] = 0.0
    counts, add_to_weight = [], _products.add_to_weight
    monkeypatch.setattr(
        _products, "add_to_weight", lambda total, grad, *args, **options: (
            counts.append(len(grad)), add_to_weight(total, grad, *args, **options)
        ),
    )  # fmt: skip
    leaves = [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight)]
    given = {"advantages": batch.advantages, "temperature": temperature, "beta": 0.0}
    out = linear_expo_loss(*leaves, batch.completion_ids, batch.completion_mask, **given)
    grads = torch.autograd.grad(out.loss, leaves)
    if not _launch._switch.kernels_on_cpu:  # the kernels do not read slopes on the host
        assert sum(counts) == int(batch.completion_mask[3].sum())
    monkeypatch.setattr(_products, "LEAST_MOVED", 2**60)
    out = linear_expo_loss(*leaves, batch.completion_ids, batch.completion_mask, **given)
    for one, other in zip(grads, torch.autograd.grad(out.loss, leaves), strict=True):
        assert relative_error(one, other) <= 1e-6


BAD = {
    "integers": (torch.ones(B, T, dtype=torch.int64), TypeError, "temperature has dtype torch.int64; expected a float"),
    "text": ("0.7", TypeError, "temperature is '0.7'; expected a number"),
    "a number of 0": (0.0, ValueError, "temperature is 0.0; expected a finite number > 0"),
    "NaN": (float("nan"), ValueError, "temperature is nan; expected a finite number > 0"),
    "0-dim": (torch.tensor(0.7), ValueError, r"has shape \[\]; expected a number, one per sequence, \[3\], or one"),
    "another length": (torch.ones(T), ValueError, r"has shape \[4\]; expected .* one per position, \[3, 4\]"),
    "a column": (torch.ones(B, 1), ValueError, r"has shape \[3, 1\]; .*; use temperature.flatten\(\)"),
    "another device": (torch.ones(B, T, device="meta"), ValueError, "temperature is on meta, but completion_.* on cpu"),
    "zeros": (torch.zeros(B), ValueError, r"temperature ranges over \[0, 0\]; expected finite numbers > 0"),
    "negative": (torch.tensor([1.0, -0.5, 2.0]), ValueError, r"temperature ranges over \[-0.5, 2\]"),
    "infinite": (torch.tensor([1.0, float("inf"), 2.0]), ValueError, r"temperature ranges over \[1, inf\]"),
    "not a number": (torch.tensor([1.0, float("nan"), 2.0]), ValueError, r"temperature ranges over \[nan, nan\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_temperature_is_refused(name):
    temperature, error, text = BAD[name]
    batch = make_batch(B, T, H, V, dtype=torch.float32)
    head, ids = (batch.hidden, batch.weight), batch.completion_ids
    inputs = batch.loss_inputs(Objective()) | {"temperature": temperature}
    for call in (
        lambda: token_logps(batch.logits, ids, temperature=temperature),
        lambda: linear_token_logps(*head, ids, temperature=temperature),
        lambda: expo_loss(batch.logits, ids, batch.completion_mask, **inputs),
        lambda: linear_expo_loss(*head, ids, batch.completion_mask, **inputs),
    ):
        with pytest.raises(error, match=text):
            call()


def test_a_temperature_beside_the_objectives_is_refused():
    batch, objective = make_batch(dtype=torch.float32), Objective(temperature=0.7)
    inputs = batch.loss_inputs(objective) | {"objective": objective, "temperature": torch.ones(4)}
    with pytest.raises(ValueError, match=r"temperature is given together with objective.temperature=0.7; give one or"):
        expo_loss(batch.logits, batch.completion_ids, batch.completion_mask, **inputs)


def test_packed_log_probs_have_no_temperature_per_reply():
    with pytest.raises(ValueError, match=r"has shape \[2\]; expected a number, one per position, \[6\]"):
        token_logps(torch.zeros(6, V), torch.zeros(6, dtype=torch.int64), temperature=torch.ones(2))
