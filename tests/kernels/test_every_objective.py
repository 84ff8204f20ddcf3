"""Every combination of the loss's options is compared with float64 autograd of the reference, or refused by name.

There are three levels: from log-probs, from logits, and from hidden states in chunks. The PyTorch path runs all
combinations; the kernels (see `test_interpreter.py`) run a subset in which every pair of values occurs.
"""

import itertools
import random

import pytest
import torch

from expo_kernels import Objective, _launch, expo_loss, expo_loss_from_logps, linear_expo_loss, reference
from expo_kernels.objective import READ_BY
from tests.numerics import make_batch

pytestmark = pytest.mark.medium

OPTIONS = {
    "surrogate": ["clip", "cispo", "sapo", "gmpo", "vespo", "dppo_tv", "clip_cov", "kl_cov"],
    "ratio": ["token", "sequence", "sequence_token"],
    "dual_clip": [None, 1.3],
    "kl": ["k1", "k2", "k3"],
    "kl_importance_weighted": [False, True],
    "aggregation": ["sequence", "sum", "token", "constant", "none"],
    "rollout_correction": [None, "token", "sequence", "token_mask", "sequence_mask", "geometric_mask"],
    # arguments of a call
    "old_logps": [True, False],
    "ref_logps": [True, False],
    "entropy_bonus": [0.0, 0.3],
}
CALL = ("old_logps", "ref_logps", "entropy_bonus")
LEVELS = ("log-probs", "logits", "hidden")
# these differ from the defaults, so that a default used instead of a setting is found
SETTINGS = {
    "clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.3, "ratio": "sequence", "sapo_tau_pos": 1.3, "sapo_tau_neg": 0.8,
    "vespo_k_pos": 1.5, "vespo_k_neg": 0.9, "vespo_lambda_pos": 1.2, "vespo_lambda_neg": 2.5,
    "cov_ratio": 0.3, "clip_cov_low": 0.01, "clip_cov_high": 3.0, "kl_cov_coef": 0.7,
}  # fmt: skip
B, T, H, V = 3, 4, 3, 5
BETA = 0.2


def cases(surrogate):
    names = [name for name in OPTIONS if name != "surrogate"]
    for values in itertools.product(*(OPTIONS[name] for name in names)):
        case = {"surrogate": surrogate, **dict(zip(names, values, strict=True))}
        # without ref_logps there is no penalty, and beta = 0 is valid with any estimator
        if not case["ref_logps"] and case["kl"] != "k3":
            continue
        # the loss from log-probs has no entropy
        if len(levels_of(case)) > 1 or not case["entropy_bonus"]:
            yield case


def levels_of(case):
    """The levels at which a case is valid."""
    if case["aggregation"] == "none" or case["surrogate"] in ("clip_cov", "kl_cov"):
        return LEVELS[:1]
    return LEVELS[case["entropy_bonus"] > 0 :]


def refusal(case):
    """The part of the error message for invalid combinations; None for valid ones."""
    surrogate, correction = case["surrogate"], case["rollout_correction"]
    if case["dual_clip"] is not None and surrogate != "clip":
        return "dual_clip=1.3 has no effect"
    if case["ratio"] != "token" and surrogate not in READ_BY["ratio"]:
        return f"ratio='{case['ratio']}' has no effect"
    if case["ratio"] == "sequence_token" and surrogate == "cispo":
        return 'ratio="sequence_token" has no effect with surrogate "cispo"'
    if surrogate == "vespo" and correction in ("sequence", "sequence_mask", "geometric_mask"):
        return "rollout_correction"
    if case["kl_importance_weighted"] and not case["ref_logps"]:
        return "kl_importance_weighted has no effect without ref_logps"
    return None


def make_objective(case):
    settings = {name: value for name, value in SETTINGS.items() if name not in ("dual_clip", "ratio")}
    settings = {name: value for name, value in settings.items() if case["surrogate"] in READ_BY[name]}
    if case["rollout_correction"] is not None:
        # the geometric means of the batch's sequences are 0.97, 0.94 and 1.11
        is_geometric = case["rollout_correction"] == "geometric_mask"
        settings |= {"rollout_floor": 0.95 if is_geometric else 0.7, "rollout_cap": 1.1 if is_geometric else 1.4}
    if case["surrogate"] == "dppo_tv":  # bounds of probabilities, not of ratios
        settings |= {"clip_low": 0.01, "clip_high": 0.02}
    if case["aggregation"] == "constant":
        settings["max_completion_length"] = 7
    return Objective(**{name: value for name, value in case.items() if name not in CALL}, **settings)


def inputs_of(case, batch):
    """The arguments of a loss call other than its logits; the loss is summed, so that a wrong denominator is found."""
    advantages = batch.advantages
    if case["ratio"] == "sequence_token":  # the gradient is that of "sequence" unless they differ within a sequence
        advantages = advantages[:, None] * torch.linspace(-0.5, 1.5, T, dtype=advantages.dtype)
    given = {"advantages": advantages, "beta": BETA if case["ref_logps"] else 0.0}
    for name, is_given in (
        ("old_logps", case["old_logps"]),
        ("ref_logps", case["ref_logps"]),
        ("rollout_logps", case["rollout_correction"] is not None),
    ):
        given[name] = getattr(batch, name) if is_given else None
    return given


def truth(case, objective, batch, states):
    """The float64 reference: log-probs, loss, and gradients of hidden, weight, bias, logits and log-probs."""
    hidden, weight, bias = (state.detach().double().requires_grad_() for state in states)
    logits = hidden @ weight.T + bias
    logps = reference.token_logps(logits, batch.completion_ids, 1.0)
    given = {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in inputs_of(case, batch).items()
    }
    given["beta"] = torch.tensor(given["beta"], dtype=torch.float64)
    bonus = {}
    if case["entropy_bonus"]:
        bonus["entropies"] = reference.token_entropies(logits, 1.0)
        bonus["entropy_bonus"] = torch.tensor(case["entropy_bonus"], dtype=torch.float64)
    loss = weighted(reference.expo_loss_from_logps(logps, batch.completion_mask, objective=objective, **given, **bonus))
    return logps.detach(), loss.detach(), torch.autograd.grad(loss, (hidden, weight, bias, logits, logps))


def weighted(loss):
    """The loss; losses [B, T] of tokens are summed with weights that differ from token to token."""
    return loss if loss.dim() == 0 else (loss * torch.linspace(-1.0, 2.0, B * T, dtype=loss.dtype).view(B, T)).sum()


def check(case, levels, batch):
    dtype = batch.hidden.dtype
    objective = make_objective(case)
    given = {"objective": objective, **inputs_of(case, batch)}
    hidden, weight, bias = (tensor.requires_grad_() for tensor in (batch.hidden, batch.weight, batch.bias))
    logps, true_loss, (*linear_grads, logits_grad, logps_grad) = truth(case, objective, batch, (hidden, weight, bias))
    ids, mask, bonus = batch.completion_ids, batch.completion_mask, {"entropy_bonus": case["entropy_bonus"]}

    def compare(loss, leaves, grads):
        loss = weighted(loss)
        made = [loss, *torch.autograd.grad(loss, leaves)]
        bounds = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 3e-6}
        for tensor, true in zip(made, [true_loss, *grads], strict=True):
            torch.testing.assert_close(tensor.detach().double(), true, **bounds, msg=lambda text: f"{case}: {text}")

    if "hidden" in levels:
        budget_mb = 5 * V * dtype.itemsize / 2**20  # slightly more than a sequence
        linear = linear_expo_loss(hidden, weight, ids, mask, bias=bias, logits_budget_mb=budget_mb, **given, **bonus)
        compare(linear.loss, (hidden, weight, bias), linear_grads)
    if "logits" in levels:
        logits = (hidden @ weight.T + bias).detach().requires_grad_()
        compare(expo_loss(logits, ids, mask, **given, **bonus).loss, [logits], [logits_grad])
    if "log-probs" in levels:
        leaf = logps.to(dtype).requires_grad_()
        compare(expo_loss_from_logps(leaf, mask, **given).loss, [leaf], [logps_grad])


def with_every_pair(found):
    """A few of the cases at one level each, which contain every pair of values that any case contains.

    Of 100 cases drawn at random, the one with the most pairs that are new comes next.
    """
    pairs_of = {
        (index, level): set(itertools.combinations([*case.items(), level], 2))
        for index, case in enumerate(found)
        for level in levels_of(case)
    }
    missing, draws, chosen = set().union(*pairs_of.values()), random.Random(0), []
    while missing:
        pairs_of = {candidate: pairs for candidate, pairs in pairs_of.items() if not pairs.isdisjoint(missing)}
        best = max(draws.sample([*pairs_of], min(100, len(pairs_of))), key=lambda drawn: len(pairs_of[drawn] & missing))
        missing -= pairs_of[best]
        chosen.append((found[best[0]], (best[1],)))
    return chosen


@pytest.mark.parametrize("surrogate", OPTIONS["surrogate"])
def test_every_combination_has_the_gradient_of_the_reference_or_is_refused(surrogate):
    runs_kernels = _launch._switch.kernels_on_cpu
    allowed, refused = [], []
    for case in cases(surrogate):
        (allowed if refusal(case) is None else refused).append(case)
    batch = make_batch(B, T, H, V, dtype=torch.float32 if runs_kernels else torch.float64)
    for case, levels in with_every_pair(allowed) if runs_kernels else [(case, levels_of(case)) for case in allowed]:
        check(case, levels, batch)
    for case in refused:
        with pytest.raises(ValueError, match=refusal(case)):  # noqa: PT012 - either of the two may refuse it
            objective = make_objective(case)
            expo_loss_from_logps(batch.old_logps, batch.completion_mask, objective=objective, **inputs_of(case, batch))


@pytest.mark.parametrize("surrogate", OPTIONS["surrogate"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_the_surrogate_does_not_read_is_refused(surrogate, name):
    if surrogate in READ_BY[name]:
        assert getattr(Objective(surrogate=surrogate, **{name: SETTINGS[name]}), name) == SETTINGS[name]
    else:
        with pytest.raises(ValueError, match=f"{name}=.* has no effect with surrogate"):
            Objective(surrogate=surrogate, **{name: SETTINGS[name]})


def test_the_options_are_all_there_are():
    assert set(OPTIONS) - set(CALL) | set(SETTINGS) | {
        "log_ratio_clamp", "max_completion_length", "temperature", "logit_softcap", "rollout_floor", "rollout_cap",
    } == set(Objective.__dataclass_fields__)  # fmt: skip


@pytest.mark.parametrize("name", ["rollout_floor", "rollout_cap"])
def test_bounds_of_a_correction_that_is_off_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0.7 has no effect without rollout_correction"):
        Objective(**{name: 0.7})


def test_the_loss_from_log_probs_takes_no_entropy_bonus():
    logps = torch.zeros(1, 2)
    with pytest.raises(TypeError, match="entropy_bonus"):
        expo_loss_from_logps(logps, torch.ones(1, 2), advantages=torch.ones(1), beta=0.0, entropy_bonus=0.1)
