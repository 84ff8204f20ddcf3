"""The PyTorch backend: log-probs, the loss and dL/dlogits of a chunk, in the memory of its logits.

The gradient of a token depends on other tokens only through constants that are known in advance (masks, lengths, the
normalizer), so dL/dlogp is the autograd derivative of the formula in `reference.py`. The log-prob ops use `TorchLogps`;
`TorchLoss` adds the objective. The log-probs of every op come from `_read`, so two ops agree bit for bit on the same
inputs and chunks.

Letters: N valid tokens, n of them in a chunk, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from expo_kernels import _compat, _launch, reference
from expo_kernels._head import Chunk, HeadCall
from expo_kernels._inputs import METRIC_NAMES, LossInputs
from expo_kernels._packing import sequence_of
from expo_kernels._vocab_group import VocabShard
from expo_kernels.advantages import advantages_of_rewards
from expo_kernels.objective import Objective

ENTROPY_BLOCK = 2**18  # elements processed at once, in place of a second [n, V] buffer


class _Read(NamedTuple):
    """The result of reading one chunk of n rows; `probs` and `softcap_grads` are views of buffers."""

    logps: Tensor  # [n] of the chosen ids, nats
    columns: Tensor  # [n, 1] int64: columns of the chosen ids
    is_here: Tensor | None  # [n] bool: whether this rank's vocabulary shard holds them
    probs: Tensor  # [n, V], not normalised: probabilities times sum_exp
    row_max: Tensor  # [n] of the logits, after softcap and temperature
    sum_exp: Tensor  # [n], >= 1
    softcap_grads: Tensor | None  # [n, V]: d capped / d raw
    entropies: Tensor | None  # [n], nats, if wanted


class TorchLogps:
    """Log-probs, entropies and log-sum-exps of rows, and dL/dlogits given their gradients."""

    def __init__(self, call: HeadCall, index: Tensor, shard: VocabShard | None, *, wants_entropy: bool) -> None:
        """`index` [N]: flat positions of the valid tokens."""
        self._chosen_ids = call.completion_ids.reshape(-1).index_select(0, index).long()
        self._temperature: float | Tensor = call.temperature  # [N] if it differs from token to token
        if call.temperatures is not None:
            self._temperature = call.temperatures.index_select(0, index)
        self._softcap = call.logit_softcap
        self._wants_entropy, self._shard = wants_entropy, shard
        self.token_logps = torch.empty(index.numel(), dtype=call.tensors.arithmetic_dtype, device=index.device)
        self.token_entropies = torch.zeros_like(self.token_logps)
        self.lse: Tensor | None = None  # [N], if wanted
        self.grad_logps: Tensor | None = None  # [N]
        self.grad_entropies: Tensor | None = None  # [N]
        self.grad_lse: Tensor | None = None  # [N]
        self._softcap_buffer: Tensor | None = None
        self._last: tuple[Chunk, _Read] | None = None

    def logps(self, chunk: Chunk) -> None:
        """Compute the log-probs of a chunk, and its entropies and log-sum-exps if wanted."""
        read = self._read(chunk)
        self._last = chunk, read
        self.token_logps[chunk.rows] = read.logps
        if read.entropies is not None:
            self.token_entropies[chunk.rows] = read.entropies
        if self.lse is not None:
            self.lse[chunk.rows] = read.row_max + read.sum_exp.log()

    def grad_logits(self, chunk: Chunk) -> None:
        """Write dL/dlogits of a chunk, up to its row scale: dlogp/dlogits = (onehot - probs) / temperature."""
        assert self.grad_logps is not None
        is_read = self._last is not None and self._last[0] is chunk
        read = self._last[1] if is_read and self._last is not None else self._read(chunk)
        grad_logps, temperature = self.grad_logps[chunk.rows], self._temperature_of(chunk)
        if self.grad_entropies is None and self.grad_lse is None:
            read.probs.scatter_add_(1, read.columns, _where_here(read, -read.sum_exp))
            chunk.row_scale, chunk.is_signed = -grad_logps / (read.sum_exp * temperature), False
        else:
            others = (None if grad is None else grad[chunk.rows] for grad in (self.grad_entropies, self.grad_lse))
            _grad_with_others(read, grad_logps, *others)
            inverse = 1.0 / temperature
            chunk.row_scale = inverse if isinstance(inverse, Tensor) else torch.full_like(read.sum_exp, inverse)
        chunk.sums_to_zero = read.softcap_grads is None and self.grad_lse is None
        if read.softcap_grads is not None:
            read.probs.mul_(read.softcap_grads)
        chunk.grad_logits = read.probs

    def _read(self, chunk: Chunk) -> _Read:
        """Log-probs of the chosen ids; the probabilities overwrite the logits.

        The logits are divided by the softcap already, or by the temperature if there is no softcap. Temperatures that
        differ divide the rows here.
        """
        logits, softcap_grads, shard, scales = chunk.logits, None, self._shard, None
        temperature = self._temperature_of(chunk)
        if isinstance(temperature, Tensor):
            scales = ((1.0 if self._softcap is None else self._softcap) / temperature).unsqueeze(1)
        if self._softcap is not None:
            logits.tanh_()
            softcap_grads = torch.mul(logits, logits, out=self._softcap_rows(logits)).neg_().add_(1.0)
            if scales is None:
                logits.mul_(self._softcap / temperature)
        columns, is_here, row_max = self._chosen_ids[chunk.rows], None, None
        if shard is not None:
            row_max = logits.amax(dim=-1, keepdim=True)
            if scales is not None:
                row_max.mul_(scales)
            shard.all_reduce_max(row_max)
            columns, is_here = shard.columns(columns)
        columns = columns.unsqueeze(1)
        chosen, sum_exp, row_max = _exponentials(logits, columns, row_max, scales)
        entropy_sum = _entropy_sums(logits) if self._wants_entropy else None
        if shard is not None:
            assert is_here is not None
            # one reduction for all sums of a row; its chosen logit is on one rank only
            parts = [torch.where(is_here, chosen, 0.0), sum_exp]
            reduced = torch.stack(parts if entropy_sum is None else [*parts, entropy_sum])
            shard.all_reduce_sum(reduced)
            chosen, sum_exp = reduced[0], reduced[1]
            entropy_sum = None if entropy_sum is None else reduced[2]
        entropies = None if entropy_sum is None else entropy_sum / sum_exp + sum_exp.log()
        return _Read(chosen - sum_exp.log(), columns, is_here, logits, row_max, sum_exp, softcap_grads, entropies)

    def _temperature_of(self, chunk: Chunk) -> float | Tensor:
        return self._temperature[chunk.rows] if isinstance(self._temperature, Tensor) else self._temperature

    def _softcap_rows(self, logits: Tensor) -> Tensor:
        """A buffer for the softcap's derivatives, reused by every chunk."""
        buffer = self._softcap_buffer
        if buffer is None or buffer.shape[0] < logits.shape[0]:
            buffer = self._softcap_buffer = torch.empty_like(logits)
        return buffer[: logits.shape[0]]


def _exponentials(
    logits: Tensor, columns: Tensor, row_max: Tensor | None, scales: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite logits [n, V], times `scales` [n, 1], by exp(logit - row maximum); return (chosen logit - row maximum),
    sum_exp and the row maximum, [n] each. A given `row_max` [n, 1] has the scale in it.

    Processes a few rows at a time, so that they stay in the CPU's cache from the first pass to the last.
    """
    chosen, sum_exp, maxima = [], [], []
    num_rows = _launch.rows_in_cache(logits)
    for rows in range(0, max(logits.shape[0], 1), num_rows):
        block = slice(rows, rows + num_rows)
        part = logits[block]
        if scales is not None:
            part.mul_(scales[block])
        maxima.append(part.amax(dim=-1, keepdim=True) if row_max is None else row_max[block])
        part.sub_(maxima[-1])
        chosen.append(part.gather(1, columns[block]).squeeze(1))
        # sum() adds pairwise; log_softmax adds sequentially, with an error of 4e-5 nats at V = 262,144
        sum_exp.append(part.exp_().sum(dim=-1))
    return torch.cat(chosen), torch.cat(sum_exp), torch.cat(maxima).squeeze(1)


def _entropy_sums(probs: Tensor) -> Tensor:
    """Sum of -p log p over each row, [n], for any scale of p; a logit of -inf counts as probability 0."""
    step = max(1, ENTROPY_BLOCK // max(probs.shape[1], 1))
    return torch.cat([torch.special.entr(block).sum(dim=-1) for block in torch.split(probs, step)])


def _where_here(read: _Read, values: Tensor) -> Tensor:
    """Values [n] as [n, 1], with 0 where another rank holds the chosen column."""
    return (values if read.is_here is None else torch.where(read.is_here, values, 0.0)).unsqueeze(1)


def _grad_with_others(read: _Read, grad_logps: Tensor, grad_entropies: Tensor | None, grad_lse: Tensor | None) -> None:
    """Overwrite the probabilities by the gradient if L also depends on the entropies or on the log-sum-exps:
    dentropy/dlogit_j = -p_j (log p_j + entropy), dlse/dlogit_j = p_j."""
    of_probs = -grad_logps if grad_lse is None else grad_lse - grad_logps
    if grad_entropies is None:
        read.probs.mul_((of_probs / read.sum_exp).unsqueeze(1))
    else:
        _add_entropy_grad(read, of_probs, grad_entropies)
    read.probs.scatter_add_(1, read.columns, _where_here(read, grad_logps))


def _add_entropy_grad(read: _Read, of_probs: Tensor, grad_entropies: Tensor) -> None:
    """Overwrite the probabilities p by of_probs * p plus the gradient of the entropies."""
    assert read.entropies is not None
    entropies = read.entropies.unsqueeze(1)
    probs = read.probs.div_(read.sum_exp.unsqueeze(1))
    step = max(1, ENTROPY_BLOCK // max(probs.shape[1], 1))
    for start in range(0, probs.shape[0], step):
        block = slice(start, start + step)
        p = probs[block]
        of_entropy = torch.xlogy(p, p).add_(p * entropies[block]).mul_(-grad_entropies[block].unsqueeze(1))
        p.mul_(of_probs[block].unsqueeze(1)).add_(of_entropy)


@dataclass(frozen=True)
class TokenBatch:
    """The N valid tokens of a call, with all that the objective needs of each; nothing here carries a gradient."""

    index: Tensor  # [N] int64: flat positions
    sequence_index: Tensor  # [N] int64: the sequence of each
    advantages: Tensor  # [N]
    old_logps: Tensor | None  # [N]
    ref_logps: Tensor | None  # [N]
    rollout_logps: Tensor | None  # [N], only if the correction depends on the current log-probs
    corrections: Tensor | None  # [N], only if it does not
    weights: Tensor  # [N]: share of each token's loss in the whole
    beta: Tensor  # 0-dim
    entropy_bonus: Tensor | None  # 0-dim
    num_sequences: int
    objective: Objective

    def of_rows(self, rows: slice) -> Self:
        """The tokens of one chunk."""

        def part(name: str) -> object:
            value = getattr(self, name)
            return value[rows] if isinstance(value, Tensor) and value.dim() > 0 else value

        return type(self)(**{field.name: part(field.name) for field in fields(self)})  # type: ignore[arg-type]

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

    def grad_logps(self, logps: Tensor) -> Tensor:
        """dL/dlogp of each token, [N]."""
        with _compat.autograd_inside_an_op(), torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            loss = (self.terms(leaf).losses * self.weights).sum()
            (grad_logps,) = torch.autograd.grad(loss, leaf)
        return grad_logps

    def grad_entropies(self) -> Tensor | None:
        """dL/dentropy of each token, [N]; None without a bonus."""
        return None if self.entropy_bonus is None else -self.entropy_bonus * self.weights

    def result(self, logps: Tensor, entropies: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The whole loss 0-dim, the metrics [len(METRIC_NAMES)] in that order, and the number of tokens."""
        terms = self.terms(logps)
        loss, total = (terms.losses * self.weights).sum(), logps.numel()
        grad_entropies = self.grad_entropies()
        if grad_entropies is not None:
            assert entropies is not None
            loss = loss + (grad_entropies * entropies).sum()
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
        return loss, torch.stack([(means | others)[name] for name in METRIC_NAMES]), num_tokens


class TorchLoss(TorchLogps):
    """The policy loss of the valid tokens, and dL/dlogits if a gradient is wanted."""

    def __init__(self, call: HeadCall, tokens: TokenBatch, shard: VocabShard | None, *, return_entropy: bool) -> None:
        wants_entropy = return_entropy or tokens.entropy_bonus is not None
        super().__init__(call, tokens.index, shard, wants_entropy=wants_entropy)
        wants_grad = any(call.wants_grad)
        self._tokens, self._wants_grad = tokens, wants_grad
        self.needs_whole_sequences = tokens.needs_whole_sequences
        if wants_grad:
            self.grad_logps, self.grad_entropies = torch.empty_like(self.token_logps), tokens.grad_entropies()

    def loss(self, chunk: Chunk) -> None:
        """Compute log-probs and, if wanted, dL/dlogits of a chunk, for a token-level objective."""
        self.logps(chunk)
        if self._wants_grad:
            self.sequence_loss(chunk)
            self.grad_logits(chunk)

    def sequence_loss(self, chunk: Chunk | None) -> None:
        """Compute dL/dlogp of a chunk's tokens (None: of all) from their log-probs."""
        if self.grad_logps is not None:
            rows = slice(None) if chunk is None else chunk.rows
            tokens = self._tokens if chunk is None else self._tokens.of_rows(rows)
            self.grad_logps[rows] = tokens.grad_logps(self.token_logps[rows])

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss 0-dim, metrics [len(METRIC_NAMES)], and the number of tokens."""
        return self._tokens.result(self.token_logps, self.token_entropies)


def gather_tokens(inputs: LossInputs, dtype: torch.dtype) -> TokenBatch:
    """The valid tokens of a call."""
    shape, device = inputs.completion_mask.shape, inputs.completion_mask.device
    index = valid_index(inputs.completion_mask, inputs.completion_mask)
    sequence_index = _sequences(index, shape, inputs.cu_seqlens)

    def valid(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().reshape(-1).index_select(0, index).to(dtype)

    def number(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=device).detach()

    advantages = inputs.advantages
    if advantages is None:
        assert inputs.rewards is not None
        advantages = advantages_of_rewards(inputs.rewards, inputs.group_size)
    if advantages.shape == (inputs.num_sequences,):
        token_advantages = advantages.detach().index_select(0, sequence_index).to(dtype)
    else:
        token_advantages = advantages.detach().reshape(-1).index_select(0, index).to(dtype)
    normalizer = None if inputs.normalizer is None else number(inputs.normalizer)
    old_logps, rollout_logps, corrections = valid(inputs.old_logps), valid(inputs.rollout_logps), None
    if old_logps is not None and rollout_logps is not None:
        corrections = reference.rollout_weights(
            old_logps, rollout_logps, sequence_index, inputs.num_sequences, inputs.objective
        )
        rollout_logps = None
    return TokenBatch(
        index=index,
        sequence_index=sequence_index,
        advantages=token_advantages,
        old_logps=old_logps,
        ref_logps=valid(inputs.ref_logps),
        rollout_logps=rollout_logps,
        corrections=corrections,
        weights=reference.token_weights(
            sequence_index, inputs.num_sequences, normalizer, token_advantages, inputs.objective
        ),
        beta=number(inputs.beta),
        entropy_bonus=None if inputs.entropy_bonus is None else number(inputs.entropy_bonus),
        num_sequences=inputs.num_sequences,
        objective=inputs.objective,
    )


def _sequences(index: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """The sequence of each valid token."""
    if cu_seqlens is None:
        return index // max(shape[1], 1)
    return sequence_of(index, cu_seqlens)


def valid_index(mask: Tensor | None, ids: Tensor) -> Tensor:
    """Flat positions of the valid tokens, [N] int64, in order."""
    if mask is None:
        return torch.arange(ids.numel(), device=ids.device)
    return mask.reshape(-1).nonzero().squeeze(1)


def spread(tokens: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """Scatter values of the valid tokens to their positions, 0 elsewhere; differentiable."""
    return tokens.new_zeros(shape.numel()).index_copy(0, index, tokens).view(shape)
