"""The row kernels, run by Triton's interpreter, against the float64 reference. Run through `test_row_kernels.py`."""

import dataclasses
import math

import pytest
import torch

from expo_kernels import _launch, reference
from expo_kernels import _row_kernels as row_kernels
from expo_kernels import _row_launchers as kernels
from expo_kernels.objective import Objective

pytestmark = [
    # skipped rows hold numbers that are made and never used
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
CPU = torch.device("cpu")
G = 4
# dL/dlogits against float64: in bfloat16 the rounding of a few large entries decides
GRAD_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2.5e-3}


@dataclasses.dataclass
class Batch:
    logits: torch.Tensor  # [B, T, V]
    ids: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, T]
    rewards: torch.Tensor  # [B]
    old: torch.Tensor | None  # [B, T]
    ref: torch.Tensor | None
    rollout: torch.Tensor | None
    beta: float = 0.04
    normalizer: float | None = None
    advantages: torch.Tensor | None = None  # [B, T]

    @property
    def shape(self):
        return self.logits.shape

    def normalizer_of(self, objective):
        if self.normalizer is not None:
            return self.normalizer
        return max(int(self.mask.sum()), 1) if objective.aggregation == "token" else self.shape[0]


def make_batch(B=4, T=3, V=17, dtype=torch.float32, *, seed=0, spread=2.0, objective=None, **changes):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    objective = objective or Objective()
    logits = (normal(B, T, V) * spread).to(dtype)
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.75
    mask.view(-1)[0] = True
    current = reference.token_logps(logits.float(), ids, objective.temperature, objective.logit_softcap)
    batch = Batch(
        logits,
        ids,
        mask,
        (torch.rand(B, generator=generator) < 0.5).float(),
        old=current + 0.3 * normal(B, T),
        ref=current + 0.3 * normal(B, T),
        rollout=current + 0.3 * normal(B, T) if objective.rollout_correction else None,
    )
    batch.rewards[0] = 1.0
    batch.rewards[1] = 0.0
    return dataclasses.replace(batch, **changes)


def spoil(batch, garbage=float("nan")):
    """Anything at all where the mask is 0."""
    hidden = ~batch.mask

    def spoilt(tensor, value):
        return None if tensor is None else torch.where(hidden, torch.as_tensor(value, dtype=tensor.dtype), tensor)

    return dataclasses.replace(
        batch,
        logits=torch.where(hidden.unsqueeze(-1), torch.as_tensor(garbage, dtype=batch.logits.dtype), batch.logits),
        ids=spoilt(batch.ids, -100 if math.isnan(garbage) else 2**40),
        old=spoilt(batch.old, garbage),
        ref=spoilt(batch.ref, garbage),
        rollout=spoilt(batch.rollout, garbage),
        advantages=spoilt(batch.advantages, garbage),
    )


def tokens_of(batch, objective):
    B, T, _ = batch.shape

    def flat(tensor):
        return None if tensor is None else tensor.reshape(-1)

    per_token = batch.advantages is not None
    return kernels.Tokens(
        ids=flat(batch.ids),
        mask=flat(batch.mask),
        hyper=kernels.hyper_parameters(objective, CPU),
        objective=objective,
        num_sequences=B,
        tokens_per_sequence=T,
        advantages=flat(batch.advantages) if per_token else batch.rewards,
        advantages_are="token" if per_token else "rewards",
        group_size=G,
        old_logps=flat(batch.old),
        ref_logps=flat(batch.ref),
        rollout_logps=flat(batch.rollout),
        lengths=batch.mask.sum(1) if objective.aggregation == "sequence" else None,
        beta=torch.tensor(batch.beta),
        normalizer=torch.tensor(float(batch.normalizer_of(objective))),
    )


@dataclasses.dataclass
class Outcome:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    logps: torch.Tensor
    grad: torch.Tensor
    size: torch.Tensor | None = None  # of the loss's terms, before they cancel


def expected(batch, objective):
    """Loss, metrics, log-probs and dL/dlogits in float64, from the same rounded inputs."""
    B, T, _ = batch.shape
    logits = torch.where(batch.mask.unsqueeze(-1), batch.logits, 0).double().requires_grad_()
    ids = torch.where(batch.mask, batch.ids, 0)
    logps = reference.token_logps(logits, ids, objective.temperature, objective.logit_softcap)
    advantages = batch.advantages
    if advantages is None:
        advantages = reference.group_advantages(batch.rewards.double(), G, "group", 1e-6)[:, None].expand(B, T)
    sequence_index = batch.mask.nonzero()[:, 0]

    def valid(tensor):
        return None if tensor is None else tensor[batch.mask].double()

    terms = reference.token_terms(
        logps[batch.mask],
        old_logps=valid(batch.old),
        ref_logps=valid(batch.ref),
        rollout_logps=valid(batch.rollout),
        advantages=valid(advantages),
        beta=torch.tensor(batch.beta).double(),
        sequence_index=sequence_index,
        num_sequences=B,
        objective=objective,
    )
    normalizer = torch.tensor(float(batch.normalizer_of(objective))).double()
    weights = reference.token_weights(sequence_index, B, normalizer, logps[batch.mask], objective)
    loss = (weights * terms.losses).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    count = max(int(batch.mask.sum()), 1)
    entropies = reference.token_entropies(logits, objective.temperature, objective.logit_softcap)
    metrics = {
        "kl": terms.penalties.sum() / count,
        "ratio_mean": terms.ratios.sum() / count,
        "ratio_max": torch.cat([terms.ratios, torch.zeros(1)]).max(),
        "clip_low_fraction": terms.clipped_low.double().sum() / count,
        "clip_high_fraction": terms.clipped_high.double().sum() / count,
        "tokens": batch.mask.sum(),
        "entropy": entropies[batch.mask].sum() / count,
    }
    size = (weights * terms.losses.abs()).sum().detach()
    return Outcome(loss.detach(), metrics, torch.where(batch.mask, logps, 0).detach(), grad, size)


def outcome(sums, logps, grad, shape):
    metrics = dict(zip(kernels.SUMS, sums.metrics, strict=True))
    return Outcome(metrics.pop("loss"), metrics, logps.view(shape[:2]), grad)


def nan_like(tensor, **options):
    return torch.full_like(tensor, float("nan"), **options)


def run_token_level(batch, objective, grad=None):
    logps, sums = nan_like(batch.mask, dtype=torch.float32).view(-1), kernels.make_sums(CPU)
    grad = nan_like(batch.logits) if grad is None else grad
    tokens = tokens_of(batch, objective)
    kernels.launch_row_loss(kernels.Rows(batch.logits), tokens, sums, logps, kernels.Slopes(grad), return_entropy=True)
    assert int(sums.counter) == 0
    return outcome(sums, logps, grad, batch.shape)


def run_sequence_level(batch, objective):
    rows, tokens, sums = kernels.Rows(batch.logits), tokens_of(batch, objective), kernels.make_sums(CPU)
    logps, entropies, tops, totals, slopes = (nan_like(batch.mask, dtype=torch.float32).view(-1) for _ in range(5))
    kernels.launch_row_logps(rows, tokens, logps, entropies=entropies, tops=tops, sums=totals)
    kernels.launch_sequence_loss(tokens, sums, logps, slopes, entropies=entropies)
    grad = nan_like(batch.logits)
    kernels.launch_row_slopes(rows, tokens, kernels.Slopes(grad), tops=tops, sums=totals, grad_logps=slopes)
    return outcome(sums, logps, grad, batch.shape)


def relative_error(given, truth):
    return float((given.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_same_loss(given, truth):
    assert abs(float(given) - float(truth.loss)) <= 1e-6 * float(truth.size)


def assert_matches(given, truth, *, grad_error=1e-5):
    assert_same_loss(given.loss, truth)
    for name, value in truth.metrics.items():
        assert torch.allclose(given.metrics[name].double(), value.double(), rtol=2e-6, atol=1e-6), name
    assert float((given.logps.double() - truth.logps).abs().max()) <= 2e-6
    assert relative_error(given.grad, truth.grad) <= grad_error
    assert not given.grad[truth.logps == 0].any()


def assert_same_bits(one, other):
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.logps, other.logps)
    assert torch.equal(one.grad, other.grad)
    for name in one.metrics:
        assert torch.equal(one.metrics[name], other.metrics[name]), name


TOKEN_LEVEL = {
    "default": Objective(),
    "temperature": Objective(temperature=0.6, clip_high=0.28),
    "softcap": Objective(logit_softcap=3.0, temperature=1.3),
    "dual clip": Objective(dual_clip=1.05, clip_low=0.1),
    "cispo": Objective(surrogate="cispo"),
    "sapo": Objective(surrogate="sapo"),
    "k1": Objective(kl="k1"),
    "k2": Objective(kl="k2", kl_importance_weighted=True),
    "k3 weighted": Objective(kl_importance_weighted=True),
    "token": Objective(aggregation="token"),
    "constant": Objective(aggregation="constant", max_completion_length=7),
    "sum": Objective(aggregation="sum"),
    "rollout": Objective(rollout_correction="token", rollout_cap=1.1, rollout_floor=0.9),
    "icepop": Objective(rollout_correction="token_mask", rollout_cap=1.2, rollout_floor=0.8),
    "narrow clamp": Objective(log_ratio_clamp=0.2),
}
SEQUENCE_LEVEL = {
    "gspo": Objective(ratio="sequence", clip_low=0.05, clip_high=0.05),
    "gspo token": Objective(ratio="sequence", aggregation="token", temperature=0.8),
    "gspo weighted": Objective(ratio="sequence", kl_importance_weighted=True, dual_clip=1.01),
    "gspo cispo": Objective(ratio="sequence", surrogate="cispo", clip_low=0.05),
    "gspo sapo": Objective(ratio="sequence", surrogate="sapo", logit_softcap=5.0),
    "gspo rollout": Objective(ratio="sequence", rollout_correction="token"),
    "sequence rollout": Objective(rollout_correction="sequence", rollout_cap=1.2),
    "sequence mask": Objective(rollout_correction="sequence_mask", rollout_cap=1.5, rollout_floor=0.8),
    "gspo clamp": Objective(ratio="sequence", log_ratio_clamp=0.05),
    "luspo": Objective(ratio="sequence", aggregation="sum"),
    "gmpo": Objective(surrogate="gmpo", clip_low=0.1, clip_high=0.15),
    "gmpo rollout": Objective(surrogate="gmpo", clip_low=1.0, rollout_correction="sequence", aggregation="token"),
    "gmpo clamp": Objective(surrogate="gmpo", log_ratio_clamp=0.15),
    "vespo": Objective(surrogate="vespo"),
    "vespo rollout": Objective(surrogate="vespo", rollout_correction="token", rollout_cap=1.1, vespo_k_neg=1.5),
    "vespo mask": Objective(surrogate="vespo", rollout_correction="token_mask", rollout_floor=0.5, log_ratio_clamp=0.4),
}


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_one_launch_gives_loss_metrics_and_gradient(name):
    objective = TOKEN_LEVEL[name]
    batch = make_batch(objective=objective)
    assert_matches(run_token_level(spoil(batch), objective), expected(batch, objective))


@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_sequence_level_objectives_give_loss_metrics_and_gradient(name):
    objective = SEQUENCE_LEVEL[name]
    batch = make_batch(objective=objective, T=5)
    assert_matches(run_sequence_level(spoil(batch), objective), expected(batch, objective))


@pytest.mark.parametrize("name", ["default", "dual clip", "k2", "rollout", "constant"])
def test_the_loss_from_logps_agrees_with_the_loss_from_logits(name):
    objective = TOKEN_LEVEL[name]
    batch = make_batch(objective=objective)
    assert_matches(run_sequence_level(spoil(batch), objective), expected(batch, objective))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [2, 17, 1003, 4099, 4112])
def test_any_vocabulary_and_dtype(V, dtype):
    batch = make_batch(T=2, V=V, dtype=dtype)
    given = run_token_level(spoil(batch), Objective())
    assert_matches(given, expected(batch, Objective()), grad_error=GRAD_ERROR[dtype])


@pytest.mark.parametrize("T", [1, 30])
def test_one_token_and_many_rows_per_program(T):
    batch = make_batch(T=T, V=5)
    assert_matches(run_token_level(spoil(batch), Objective()), expected(batch, Objective()))


def test_sequences_longer_than_a_block():
    length = _launch.sequence_tile().block + 77
    objective = Objective(ratio="sequence")
    batch = make_batch(T=length, V=3)
    tokens, sums = tokens_of(spoil(batch), objective), kernels.make_sums(CPU)
    truth = expected(batch, objective)
    slopes = nan_like(truth.logps, dtype=torch.float32).view(-1)
    kernels.launch_sequence_loss(tokens, sums, truth.logps.float().view(-1), slopes)
    assert_same_loss(sums.metrics[0], truth)
    # a row's dL/dlogits in its chosen column is dL/dlogp * (1 - p)
    chosen = truth.grad.gather(-1, batch.ids.unsqueeze(-1)).squeeze(-1) / (1 - truth.logps.exp())
    valid = batch.mask.view(-1)
    assert relative_error(slopes[valid], chosen.view(-1)[valid]) < 1e-5
    assert not slopes[~valid].any()


@pytest.mark.parametrize("runs", [run_token_level, run_sequence_level])
def test_all_masked_is_zero_everywhere(runs):
    batch = make_batch()
    batch.mask[:] = False
    given = runs(spoil(batch), Objective(aggregation="token"))
    assert float(given.loss) == 0.0
    assert not given.grad.any()
    assert not given.logps.any()
    assert all(float(value) == 0.0 for value in given.metrics.values())


@pytest.mark.parametrize("runs", [run_token_level, run_sequence_level])
def test_masked_contents_never_matter_and_two_runs_give_equal_bits(runs):
    batch = make_batch(T=7)
    first = runs(spoil(batch), Objective())
    assert_same_bits(first, runs(spoil(batch), Objective()))
    assert_same_bits(first, runs(spoil(batch, garbage=float("inf")), Objective()))
    assert_same_bits(first, runs(batch, Objective()))


def test_ids_out_of_range_are_skipped():
    batch = make_batch()
    batch.ids[0, 0] = 17
    given = run_token_level(batch, Objective())
    assert bool(torch.isfinite(given.grad).all())
    assert not given.grad[0, 0].any()
    assert float(given.logps[0, 0]) == 0.0


def test_on_policy_ratios_are_exactly_one_and_equal_policies_have_no_kl():
    batch = make_batch(V=1003, spread=6.0)
    tokens, logps = tokens_of(batch, Objective()), nan_like(batch.mask, dtype=torch.float32).view(-1)
    kernels.launch_row_logps(kernels.Rows(batch.logits), tokens, logps)
    for old in (None, logps.view(batch.mask.shape)):
        given = run_token_level(dataclasses.replace(batch, old=old, ref=logps.view(batch.mask.shape)), Objective())
        assert torch.equal(given.logps.view(-1), logps)
        assert float(given.metrics["ratio_mean"]) == 1.0
        assert float(given.metrics["ratio_max"]) == 1.0
        assert float(given.metrics["kl"]) == 0.0


def test_without_old_logps_the_gradient_is_that_of_ratio_one():
    batch = make_batch(old=None, ref=None, beta=0.0)
    assert_matches(run_token_level(spoil(batch), Objective()), expected(batch, Objective()))


def test_advantages_by_token():
    batch = make_batch(advantages=torch.randn(4, 3, generator=torch.Generator().manual_seed(5)))
    for runs in (run_token_level, run_sequence_level):
        assert_matches(runs(spoil(batch), Objective()), expected(batch, Objective()))


@pytest.mark.parametrize("group_size", [1, 2, 3, 66])
def test_group_advantages_are_made_in_the_kernel(group_size):
    B = 2 * group_size
    rewards = torch.cat([torch.full((group_size,), 0.1), torch.rand(group_size)])
    # on-policy and without a penalty, dL/dlogp = -A / B; two columns with logits 0 halve it
    ids, mask = torch.zeros(B, dtype=torch.long), torch.ones(B, dtype=torch.bool)
    tokens = kernels.Tokens(
        ids=ids,
        mask=mask,
        hyper=kernels.hyper_parameters(Objective(), CPU),
        objective=Objective(),
        num_sequences=B,
        advantages=rewards,
        advantages_are="rewards",
        group_size=group_size,
        beta=torch.zeros(()),
        normalizer=torch.tensor(float(B)),
    )
    logits = torch.zeros(B, 2)
    grad = nan_like(logits)
    kernels.launch_row_loss(
        kernels.Rows(logits), tokens, kernels.make_sums(CPU), torch.empty(B), kernels.Slopes(grad), return_entropy=False
    )
    advantages = reference.group_advantages(rewards.double(), group_size, "group", 1e-6)
    assert not grad[:group_size].any()
    assert torch.allclose(grad[:, 0].double() * -2 * B, advantages, rtol=2e-6, atol=1e-9)


def test_rows_of_a_chunk_are_found_by_order_and_launches_add_up():
    batch = make_batch(B=4, T=5, V=33)
    whole = run_token_level(spoil(batch), Objective())
    spoilt = spoil(batch)
    order = torch.sort((~batch.mask).view(-1).to(torch.int8), stable=True).indices
    flat = spoilt.logits.view(-1, 33)
    tokens, sums = tokens_of(spoilt, Objective()), kernels.make_sums(CPU)
    logps, grad = nan_like(batch.mask, dtype=torch.float32).view(-1), nan_like(flat)
    for first in range(0, 20, 7):
        chunk = flat[order[first : first + 7]]
        kernels.launch_row_loss(
            kernels.Rows(chunk, order, first), tokens, sums, logps, kernels.Slopes(chunk), return_entropy=True
        )
        grad[order[first : first + 7]] = chunk
    given = outcome(sums, logps, grad.view(batch.shape), batch.shape)
    assert torch.equal(given.grad, whole.grad)
    assert torch.equal(given.logps, whole.logps)
    assert torch.allclose(given.loss, whole.loss, rtol=1e-6)
    assert torch.equal(given.metrics["tokens"], whole.metrics["tokens"])


@pytest.mark.parametrize("objective", [Objective(ratio="sequence"), Objective()], ids=["sequence", "token"])
def test_launches_over_some_sequences_each_add_up_to_one_over_all(objective):
    batch = make_batch(B=8, T=5)
    tokens = tokens_of(spoil(batch), objective)
    logps = reference.token_logps(batch.logits, batch.ids, 1.0).view(-1)
    outcomes = []
    for parts in ([None], [range(3), range(3, 4), range(4, 8)]):
        sums, slopes = kernels.make_sums(CPU), torch.full((40,), float("nan"))
        for sequences in parts:
            kernels.launch_sequence_loss(tokens, sums, logps, slopes, sequences=sequences)
        outcomes.append((sums.metrics, slopes))
    (metrics, slopes), (metrics_of_parts, slopes_of_parts) = outcomes
    assert torch.equal(slopes, slopes_of_parts)
    assert torch.allclose(metrics, metrics_of_parts, rtol=1e-6)


@pytest.mark.parametrize("V", [48, 4099])
def test_bfloat16_gradients_over_the_front_of_their_own_rows(V):
    batch = make_batch(V=V)
    truth = expected(batch, Objective())
    padded = torch.full((12, V + 13), float("nan"))[:, :V]
    padded.copy_(spoil(batch).logits.view(-1, V))
    rows_of_bfloat16 = padded.untyped_storage()
    grad = torch.empty(0, dtype=torch.bfloat16).set_(rows_of_bfloat16, 0, (12, V), (2 * padded.stride(0), 1))
    residuals = torch.full((12,), float("nan"))
    kernels.launch_row_loss(
        kernels.Rows(padded),
        tokens_of(spoil(batch), Objective()),
        kernels.make_sums(CPU),
        torch.empty(12),
        kernels.Slopes(grad, residuals),
        return_entropy=False,
    )
    assert relative_error(grad.view(batch.shape), truth.grad) <= GRAD_ERROR[torch.bfloat16]
    # what rounding took from the chosen column is given back exactly
    rows = torch.arange(12)[batch.mask.view(-1)]
    chosen = grad[rows, batch.ids.view(-1)[rows]].double() + residuals[rows].double()
    exact = truth.grad.view(-1, V)[rows, batch.ids.view(-1)[rows]]
    assert torch.allclose(chosen, exact, rtol=1e-5, atol=1e-9)


def test_strided_logits_are_read_where_they_lie_and_may_be_overwritten():
    batch = make_batch(T=4, V=32)
    truth = expected(batch, Objective())
    memory = torch.full((4, 6, 48), float("nan"))
    view = memory[:, 1:5, :32]
    view.copy_(spoil(batch).logits)
    given = run_token_level(dataclasses.replace(spoil(batch), logits=view), Objective(), grad=view)
    assert_matches(given, truth)
    assert bool(torch.isnan(memory[:, [0, 5]]).all())


def test_rows_beyond_2_to_the_31_elements_are_found(tmp_path):
    batch = make_batch(B=4, T=5, V=32)
    truth = expected(batch, Objective())
    stride = 2**27 + 16  # the last of 20 rows begins at 2.55e9; the file has holes where nothing is written
    memory = torch.from_file(str(tmp_path / "logits"), shared=True, size=20 * stride, dtype=torch.float32)
    view = memory.as_strided((4, 5, 32), (5 * stride, stride, 1))
    assert view[-1, -1].storage_offset() > 2**31
    view.copy_(spoil(batch).logits)
    given = run_token_level(dataclasses.replace(spoil(batch), logits=view), Objective(), grad=view)
    assert_matches(given, truth)


def test_packed_sequences():
    batch = make_batch(B=4, T=6)
    lengths = [2, 0, 6, 3]
    kept = torch.zeros(4, 6, dtype=torch.bool)
    for sequence, length in enumerate(lengths):
        kept[sequence, :length] = True
    batch.mask &= kept
    starts = torch.tensor([0, 2, 2, 8, 11], dtype=torch.int32)
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    for objective in (Objective(), Objective(ratio="sequence")):
        truth = expected(batch, objective)
        spoilt = spoil(batch)
        tokens = tokens_of(spoilt, objective)
        packed = dataclasses.replace(
            tokens,
            **{name: getattr(tokens, name)[kept.view(-1)] for name in ("ids", "mask", "old_logps", "ref_logps")},
            starts=starts,
            sequence_index=index,
        )
        rows, sums = kernels.Rows(spoilt.logits[kept]), kernels.make_sums(CPU)
        logps, grad = torch.full((11,), float("nan")), torch.full((11, 17), float("nan"))
        if objective.ratio == "token":
            kernels.launch_row_loss(rows, packed, sums, logps, kernels.Slopes(grad), return_entropy=False)
        else:
            tops, totals, slopes = torch.empty(11), torch.empty(11), torch.empty(11)
            kernels.launch_row_logps(rows, packed, logps, tops=tops, sums=totals)
            kernels.launch_sequence_loss(packed, sums, logps, slopes)
            kernels.launch_row_slopes(rows, packed, kernels.Slopes(grad), tops=tops, sums=totals, grad_logps=slopes)
        assert_same_loss(sums.metrics[0], truth)
        assert relative_error(grad, truth.grad[kept]) < 1e-5


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logps_and_entropies_have_their_gradients(dtype, softcap):
    objective = Objective(temperature=0.7, logit_softcap=softcap)
    batch = make_batch(V=1003, dtype=dtype, objective=objective)
    batch.logits[0, 0, 5:9] = float("-inf")
    spoilt = spoil(batch)
    B, T, V = batch.shape
    generator = torch.Generator().manual_seed(1)
    grad_logps, grad_entropies = (torch.randn(B, T, generator=generator) for _ in range(2))
    tokens, rows = tokens_of(spoilt, objective), kernels.Rows(spoilt.logits)
    logps, entropies, tops, totals = (nan_like(batch.mask, dtype=torch.float32).view(-1) for _ in range(4))
    kernels.launch_row_logps(rows, tokens, logps, entropies=entropies, tops=tops, sums=totals)
    grad = nan_like(batch.logits)
    kernels.launch_row_slopes(
        rows,
        tokens,
        kernels.Slopes(grad),
        tops=tops,
        sums=totals,
        grad_logps=grad_logps.view(-1),
        entropies=entropies,
        grad_entropies=grad_entropies.view(-1),
    )
    logits = torch.where(batch.mask.unsqueeze(-1), batch.logits, 0).double()
    scaled = reference.scaled_logits(logits, 0.7, softcap)
    probs = torch.softmax(scaled, -1)
    entropy = torch.special.entr(probs).sum(-1)
    onehot = torch.nn.functional.one_hot(torch.where(batch.mask, batch.ids, 0), V)
    # by hand: autograd has no gradient of p log p at the columns of probability 0
    slopes = grad_logps[..., None] * (onehot - probs) + grad_entropies[..., None] * (
        torch.special.entr(probs) - probs * entropy[..., None]
    )
    cap_slope = 1.0 if softcap is None else 1 - torch.tanh(logits / softcap) ** 2
    truth = torch.where(batch.mask[..., None], slopes * cap_slope / 0.7, 0)
    truth_logps = reference.token_logps(logits, torch.where(batch.mask, batch.ids, 0), 0.7, softcap)
    assert float((logps.view(B, T) - truth_logps)[batch.mask].abs().max()) < 5e-6
    assert float((entropies.view(B, T) - entropy)[batch.mask].abs().max()) < 5e-6
    assert not logps.view(B, T)[~batch.mask].any()
    assert not entropies.view(B, T)[~batch.mask].any()
    assert relative_error(grad, truth) <= GRAD_ERROR[dtype]


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_logits_of_ten_thousand_stay_exact(shift):
    batch = make_batch(V=257)
    # whole numbers: float32 holds them and their differences exactly
    batch.logits = (batch.logits * 4).round() + shift
    batch.logits[0, 1, 7] = -shift
    assert_matches(run_token_level(batch, Objective(clip_high=1e6)), expected(batch, Objective(clip_high=1e6)))


def test_log_probs_thousands_of_nats_apart_stay_finite():
    batch = make_batch()
    batch.old[:] = -5000.0
    batch.ref[:] = -9000.0
    batch.ref[0] = 3000.0
    for runs in (run_token_level, run_sequence_level):
        given = runs(batch, Objective(kl_importance_weighted=True))
        assert bool(torch.isfinite(given.grad).all())
        assert math.isfinite(float(given.loss))


def test_a_nan_that_counts_is_seen():
    batch = make_batch()
    batch.logits[0, 0, 3] = float("nan")
    given = run_token_level(batch, Objective())
    assert math.isnan(float(given.loss))
    assert math.isnan(float(given.logps[0, 0]))


def test_forward_alone_writes_no_gradient():
    batch = make_batch()
    sums, logps = kernels.make_sums(CPU), torch.empty(12)
    before = batch.logits.clone()
    kernels.launch_row_loss(
        kernels.Rows(batch.logits), tokens_of(batch, Objective()), sums, logps, None, return_entropy=False
    )
    assert torch.equal(batch.logits, before)
    assert_same_loss(sums.metrics[0], expected(batch, Objective()))


def test_splitting_a_batch_keeps_the_gradient():
    batch = make_batch(B=8, T=3, normalizer=8)
    whole = run_token_level(spoil(batch), Objective())
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        values = {
            field.name: getattr(batch, field.name)[part]
            for field in dataclasses.fields(batch)
            if isinstance(getattr(batch, field.name), torch.Tensor)
        }
        halves.append(run_token_level(spoil(dataclasses.replace(batch, **values)), Objective()))
    assert torch.equal(torch.cat([half.grad for half in halves]), whole.grad)
    assert torch.allclose(halves[0].loss + halves[1].loss, whole.loss, rtol=1e-6)


def test_values_beyond_2_to_the_31_are_scaled():
    # one program of many: it touches the first values alone, whatever their number is said to be
    tile = _launch.flat_tile()
    values, num_values = torch.ones(tile.block), 2**31 + 16
    row_kernels.scale_kernel[(1,)](values, torch.tensor(3.0), num_values // 16, ALIGNMENT=16, BLOCK=tile.block)
    assert values.eq(3.0).all()
