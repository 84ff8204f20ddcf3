"""The PyTorch path of the policy loss: the valid tokens of a call, and the loop over chunks of their logits.

The gradient of a token depends on the other tokens only through constants known beforehand (masks, lengths, the
normalizer), so each chunk of logits is read once: log-probs, then dL/dlogp by differentiating the formula of
`reference.py` on those few numbers, then dL/dlogits in the chunk's own memory. For a ratio of whole sequences chunks
hold whole sequences; where one exceeds a chunk, a pass for the log-probs comes first. `_fused.py` is the same for
Triton.

Letters: N valid tokens.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from expo_kernels import _rows, reference
from expo_kernels._request import SUMS, Request
from expo_kernels.advantages import advantages_of_rewards
from expo_kernels.logps import valid_index
from expo_kernels.objective import Objective


@dataclass(frozen=True)
class TokenBatch:
    """The N valid tokens of a call and all that the objective needs of each, with no gradient through any of it."""

    index: Tensor  # [N] int64: flat positions
    sequence_index: Tensor  # [N] int64: the sequence of each
    num_sequences: int
    advantages: Tensor  # [N]
    old_logps: Tensor | None  # [N]
    ref_logps: Tensor | None  # [N]
    rollout_logps: Tensor | None  # [N], only where the correction depends on the current log-probs
    corrections: Tensor | None  # [N], where it does not
    weights: Tensor  # [N]: share of each token's loss in the whole
    beta: Tensor  # 0-dim
    entropy_bonus: Tensor | None  # 0-dim
    objective: Objective

    def rows(self, rows: slice) -> Self:
        """The tokens of one chunk."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return type(self)(
            self.index[rows],
            self.sequence_index[rows],
            self.num_sequences,
            self.advantages[rows],
            part(self.old_logps),
            part(self.ref_logps),
            part(self.rollout_logps),
            part(self.corrections),
            self.weights[rows],
            self.beta,
            self.entropy_bonus,
            self.objective,
        )

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether a token's gradient depends on the log-probs of its whole sequence."""
        corrects_sequences = self.objective.corrects_sequences and self.corrections is None
        return self.objective.spans_sequences or corrects_sequences

    def terms(self, logps: Tensor) -> reference.TokenTerms:
        """The objective's terms of each token, given its log-prob."""
        return reference.token_terms(
            logps,
            old_logps=self.old_logps,
            ref_logps=self.ref_logps,
            rollout_logps=self.rollout_logps,
            corrections=self.corrections,
            advantages=self.advantages,
            beta=self.beta,
            sequence_index=self.sequence_index,
            num_sequences=self.num_sequences,
            objective=self.objective,
        )

    def loss(self, logps: Tensor) -> Tensor:
        """The whole loss without the entropy bonus, 0-dim."""
        return (self.terms(logps).losses * self.weights).sum()

    def logp_slopes(self, logps: Tensor) -> Tensor:
        """dL/dlogp of each token, [N]."""
        # inside an op autograd is out of force; `torch.func.grad`, which is not, fails there under a dispatch mode
        with (
            torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False),
            torch.enable_grad(),
        ):
            leaf = logps.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(self.loss(leaf), leaf)
        return slopes

    def entropy_slopes(self) -> Tensor | None:
        """dL/dentropy of each token, [N]; None without a bonus."""
        return None if self.entropy_bonus is None else -self.entropy_bonus * self.weights

    def summary(self, logps: Tensor, entropies: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The whole loss 0-dim, the metrics [len(SUMS)] in that order, and the number of tokens."""
        terms = self.terms(logps)
        loss, total = (terms.losses * self.weights).sum(), logps.numel()
        entropy_slopes = self.entropy_slopes()
        if entropy_slopes is not None:
            assert entropies is not None
            loss = loss + (entropy_slopes * entropies).sum()
        num_tokens = torch.full((), total, dtype=torch.int64, device=logps.device)
        # a ratio is > 0, so the 0 shows only where there is no token
        ratios = torch.cat([terms.ratios, terms.ratios.new_zeros(1)])
        sums = {
            "kl": terms.penalties.sum(),
            "ratio_mean": terms.ratios.sum(),
            "clip_low_fraction": terms.clipped_low.to(logps.dtype).sum(),
            "clip_high_fraction": terms.clipped_high.to(logps.dtype).sum(),
            "entropy": logps.new_zeros(()) if entropies is None else entropies.sum(),
        }
        means = {name: value / max(total, 1) for name, value in sums.items()}
        others = {"loss": loss, "ratio_max": ratios.max(), "tokens": num_tokens.to(logps.dtype)}
        return loss, torch.stack([(means | others)[name] for name in SUMS]), num_tokens


@dataclass(frozen=True)
class Loop:
    """What a loss says beside its rows of logits."""

    chosen_ids: Tensor  # [N] int64
    tokens: TokenBatch
    budget_mb: float | None
    return_entropy: bool

    def read(self, source: _rows.RowSource, rows: slice, buffers: _rows.ChunkBuffers) -> _rows.ChunkRead:
        """Log-probs of one chunk, and its entropies where they are returned or earn a bonus."""
        objective, wants_entropy = self.tokens.objective, self.return_entropy or self.tokens.entropy_bonus is not None
        return _rows.read_chunk(
            source,
            rows,
            self.chosen_ids[rows],
            buffers,
            objective.temperature,
            objective.logit_softcap,
            wants_entropy=wants_entropy,
        )

    def absorb(self, source: _rows.RowSource, rows: slice, read: _rows.ChunkRead, logp_slopes: Tensor) -> None:
        """Give the source dL/dlogits of the chunk, knowing its dL/dlogp [n]."""
        chunk, entropy_slopes = (source, rows, read, logp_slopes), self.tokens.entropy_slopes()
        temperature = self.tokens.objective.temperature
        if entropy_slopes is None:
            _rows.absorb_logp_slopes(*chunk, temperature)
        else:
            _rows.absorb_logp_and_entropy_slopes(*chunk, entropy_slopes[rows], temperature)


def run_chunks(source: _rows.RowSource, loop: Loop, wants_grad: bool) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of all rows; where gradients are wanted, the source takes them in."""
    tokens, softcap = loop.tokens, loop.tokens.objective.logit_softcap
    parts, reads_twice = _rows.chunks(source, softcap, loop.budget_mb), False
    if wants_grad and tokens.needs_whole_sequences and len(parts) > 1:
        whole = _rows.sequence_chunks(source, tokens.sequence_index, tokens.num_sequences, softcap, loop.budget_mb)
        parts, reads_twice = whole or parts, whole is None
    buffers = _rows.make_buffers(source, parts, softcap)
    token_logps = torch.empty(source.num_rows, dtype=source.dtype, device=source.device)
    entropies = torch.zeros_like(token_logps)
    for rows in parts:
        read = loop.read(source, rows, buffers)
        token_logps[rows] = read.logps
        if read.entropies is not None:
            entropies[rows] = read.entropies
        if wants_grad and not reads_twice:
            loop.absorb(source, rows, read, tokens.rows(rows).logp_slopes(read.logps))
    if reads_twice:
        slopes = tokens.logp_slopes(token_logps)
        for rows in parts:
            loop.absorb(source, rows, loop.read(source, rows, buffers), slopes[rows])
    return token_logps, entropies


def gather_tokens(request: Request, dtype: torch.dtype) -> TokenBatch:
    """The valid tokens of a call."""
    shape, device = request.completion_mask.shape, request.completion_mask.device
    index = valid_index(request.completion_mask, request.completion_mask)
    sequence_index = _sequences(index, shape, request.cu_seqlens)

    def valid(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().reshape(-1).index_select(0, index).to(dtype)

    def number(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=device).detach()

    advantages = request.advantages
    if advantages is None:
        assert request.rewards is not None
        advantages = advantages_of_rewards(request.rewards, request.group_size)
    if advantages.shape == (request.num_sequences,):
        token_advantages = advantages.detach().index_select(0, sequence_index).to(dtype)
    else:
        token_advantages = advantages.detach().reshape(-1).index_select(0, index).to(dtype)
    normalizer = None if request.normalizer is None else number(request.normalizer)
    old_logps, rollout_logps, corrections = valid(request.old_logps), valid(request.rollout_logps), None
    if old_logps is not None and rollout_logps is not None:
        corrections = reference.rollout_weights(
            old_logps, rollout_logps, sequence_index, request.num_sequences, request.objective
        )
        rollout_logps = None
    return TokenBatch(
        index=index,
        sequence_index=sequence_index,
        num_sequences=request.num_sequences,
        advantages=token_advantages,
        old_logps=old_logps,
        ref_logps=valid(request.ref_logps),
        rollout_logps=rollout_logps,
        corrections=corrections,
        weights=reference.token_weights(
            sequence_index, request.num_sequences, normalizer, token_advantages, request.objective
        ),
        beta=number(request.beta),
        entropy_bonus=None if request.entropy_bonus is None else number(request.entropy_bonus),
        objective=request.objective,
    )


def _sequences(index: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """The sequence of each valid token."""
    if cu_seqlens is None:
        return index // max(shape[1], 1)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), index, right=True)
