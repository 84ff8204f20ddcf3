"""Batches for the kernel tests in the interpreter: the launches on a batch, and its float64 results."""

import dataclasses
import math

import torch

from expo_kernels import reference
from expo_kernels._inputs import METRIC_NAMES, Tokens
from expo_kernels._triton import launch as kernels
from expo_kernels.objective import Objective
from tests.kernels.chunks import make_chunk

CPU = torch.device("cpu")
G = 4
# bounds of dL/dlogits against float64; in bfloat16 the rounding of a few large entries dominates
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
    entropy_bonus: float = 0.0
    temperatures: torch.Tensor | None = None  # [B, T]; None: the objective's

    @property
    def shape(self):
        return self.logits.shape

    def temperature_of(self, objective):
        return objective.temperature if self.temperatures is None else self.temperatures

    def normalizer_of(self, objective):
        if self.normalizer is not None:
            return self.normalizer
        return max(int(self.mask.sum()), 1) if objective.aggregation == "token" else self.shape[0]


def make_batch(B=4, T=3, V=17, dtype=torch.float32, *, seed=0, spread=2.0, objective=None, logits=None, **changes):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    objective = objective or Objective()
    logits = (normal(B, T, V) * spread).to(dtype) if logits is None else logits
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.75
    mask.view(-1)[0] = True
    temperatures = changes.get("temperatures")
    temperature = objective.temperature if temperatures is None else temperatures
    current = reference.token_logps(logits.float(), ids, temperature, objective.logit_softcap)
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
    """Overwrite masked positions by arbitrary values."""
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
        temperatures=spoilt(batch.temperatures, garbage),
    )


def some_temperatures(*shape):
    """Between 0.6 and 1.4, all different."""
    return 0.6 + 0.8 * torch.rand(*shape, generator=torch.Generator().manual_seed(9))


def tokens_of(batch, objective):
    B, T, _ = batch.shape

    def flat(tensor):
        return None if tensor is None else tensor.reshape(-1)

    per_token = batch.advantages is not None
    return Tokens(
        ids=flat(batch.ids),
        mask=flat(batch.mask),
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
        entropy_bonus=torch.tensor(batch.entropy_bonus) if batch.entropy_bonus else None,
        # masked ones are 1, as those of a call
        temperatures=None if batch.temperatures is None else flat(batch.temperatures.masked_fill(~batch.mask, 1.0)),
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
    temperature = batch.temperature_of(objective)
    logps = reference.token_logps(logits, ids, temperature, objective.logit_softcap)
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
    entropies = reference.token_entropies(logits, temperature, objective.logit_softcap)
    losses = terms.losses
    if batch.entropy_bonus:  # else autograd would multiply gradients of entropies, which may be NaN, by 0
        losses = losses - batch.entropy_bonus * entropies[batch.mask]
    loss = (weights * losses).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    count = max(int(batch.mask.sum()), 1)
    metrics = {
        "kl": terms.penalties.sum() / count,
        "ratio_mean": terms.ratios.sum() / count,
        "ratio_max": torch.cat([terms.ratios, torch.zeros(1)]).max(),
        "clip_low_fraction": terms.clipped_low.double().sum() / count,
        "clip_high_fraction": terms.clipped_high.double().sum() / count,
        "tokens": batch.mask.sum(),
        "entropy": entropies[batch.mask].sum() / count,
    }
    size = (weights * losses.abs()).sum().detach()
    return Outcome(loss.detach(), metrics, torch.where(batch.mask, logps, 0).detach(), grad, size)


def outcome(sums, logps, grad, shape):
    metrics = dict(zip(METRIC_NAMES, sums.metrics, strict=True))
    return Outcome(metrics.pop("loss"), metrics, logps.view(shape[:2]), grad)


def nan_like(tensor, **options):
    return torch.full_like(tensor, float("nan"), **options)


def run_token_level(batch, objective, grad=None):
    logps, sums = nan_like(batch.mask, dtype=torch.float32).view(-1), kernels.make_sums(CPU)
    grad = nan_like(batch.logits) if grad is None else grad
    tokens = tokens_of(batch, objective)
    kernels.launch_row_loss(make_chunk(batch.logits, grad), tokens, sums, logps, return_entropy=True)
    assert int(sums.counter) == 0
    return outcome(sums, logps, grad, batch.shape)


def run_sequence_level(batch, objective):
    grad = nan_like(batch.logits)
    chunk, tokens, sums = make_chunk(batch.logits, grad), tokens_of(batch, objective), kernels.make_sums(CPU)
    logps, entropies, row_max, sum_exp, grad_logps = (
        nan_like(batch.mask, dtype=torch.float32).view(-1) for _ in range(5)
    )
    kernels.launch_logps(chunk, tokens, logps, entropies=entropies, row_max=row_max, sum_exp=sum_exp)
    kernels.launch_sequence_loss(tokens, sums, logps, grad_logps, entropies=entropies)
    kernels.launch_grad_logits(chunk, tokens, row_max=row_max, sum_exp=sum_exp, grad_logps=grad_logps)
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
    "k1 beyond the clamp": Objective(kl="k1", log_ratio_clamp=0.1),
    "k2 beyond the clamp": Objective(kl="k2", log_ratio_clamp=0.1, kl_importance_weighted=True),
    "k3 weighted": Objective(kl_importance_weighted=True),
    "token": Objective(aggregation="token"),
    "constant": Objective(aggregation="constant", max_completion_length=7),
    "sum": Objective(aggregation="sum"),
    "rollout": Objective(rollout_correction="token", rollout_cap=1.1, rollout_floor=0.9),
    "icepop": Objective(rollout_correction="token_mask", rollout_cap=1.2, rollout_floor=0.8),
    "narrow clamp": Objective(log_ratio_clamp=0.2),
    "dppo": Objective(surrogate="dppo_tv", clip_low=0.01, clip_high=0.02),
    "dppo clamp": Objective(surrogate="dppo_tv", clip_low=0.02, log_ratio_clamp=0.2, rollout_correction="token"),
    "cispo without a lower bound": Objective(surrogate="cispo", clip_low=10.0, aggregation="token"),
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
    "geometric mask": Objective(rollout_correction="geometric_mask", rollout_cap=1.1, rollout_floor=0.9),
    "gspo, geometric mask": Objective(
        ratio="sequence", rollout_correction="geometric_mask", rollout_cap=1.1, rollout_floor=0.9, aggregation="token"
    ),
    "gspo clamp": Objective(ratio="sequence", log_ratio_clamp=0.05),
    "gradient per token": Objective(ratio="sequence_token", clip_low=0.05, clip_high=0.05, kl_importance_weighted=True),
    "gradient per token, sapo": Objective(ratio="sequence_token", surrogate="sapo", aggregation="token"),
    "gradient per token, clamp": Objective(ratio="sequence_token", log_ratio_clamp=0.05, dual_clip=1.01),
    "luspo": Objective(ratio="sequence", aggregation="sum"),
    "gmpo": Objective(surrogate="gmpo", clip_low=0.1, clip_high=0.15),
    "gmpo rollout": Objective(surrogate="gmpo", clip_low=1.0, rollout_correction="sequence", aggregation="token"),
    "gmpo clamp": Objective(surrogate="gmpo", log_ratio_clamp=0.15),
    "vespo": Objective(surrogate="vespo"),
    "vespo rollout": Objective(surrogate="vespo", rollout_correction="token", rollout_cap=1.1, vespo_k_neg=1.5),
    "vespo mask": Objective(surrogate="vespo", rollout_correction="token_mask", rollout_floor=0.5, log_ratio_clamp=0.4),
}
