"""The Triton backend: the log-probs, the loss and dL/dlogits of a chunk, by kernels and without synchronisation.

The ops of log-probs use `TritonLogps`; `TritonLoss` adds the objective. Both keep one number per position and launch
one kernel per chunk. With a head that is sharded over the vocabulary, each rank reads its own columns, one all-gather
exchanges a few numbers of each row, and each rank combines them: two launches in place of one. A head that keeps
exponentials has one launch per tile of the vocabulary, one that combines their numbers, and one for the gradient.
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from expo_kernels._exponentials import uses_exponentials
from expo_kernels._head import Chunk, HeadCall
from expo_kernels._inputs import LossInputs, Tokens, make_tokens
from expo_kernels._triton.launch import (
    launch_combine_shards,
    launch_grad_logits,
    launch_logps,
    launch_read_shard,
    launch_row_loss,
    launch_sequence_loss,
    launch_token_loss,
    make_sums,
)
from expo_kernels._triton.launch_exponentials import (
    launch_combine_tiles,
    launch_exponential_grads,
    launch_exponentials,
    launch_log_grads,
)
from expo_kernels._vocab_group import VocabShard
from expo_kernels.advantages import advantages_of_rewards
from expo_kernels.objective import Objective


class TritonLogps:
    """Log-probs, entropies and log-sum-exps of rows, and dL/dlogits given their gradients; one number per position."""

    def __init__(
        self,
        call: HeadCall,
        tokens: Tokens,
        shard: VocabShard | None,
        *,
        has_entropy_grad: bool,
        has_lse_grad: bool = False,
    ) -> None:
        self.mask, self.shard, self.has_entropy_grad = tokens.mask, shard, has_entropy_grad
        self.has_lse_grad = has_lse_grad
        self.keeps_exponentials = not has_lse_grad and uses_exponentials(call, shard, has_entropy_grad=has_entropy_grad)
        self._is_one_launch = shard is None and not self.keeps_exponentials
        if shard is not None:
            tokens = _in_separate_launches(tokens, *shard.columns_of(tokens.ids), are_local=True)
        elif self.keeps_exponentials:
            exists = (tokens.ids >= 0) & (tokens.ids < call.tensors.vocab_size)
            tokens = _in_separate_launches(tokens, tokens.ids, exists, are_local=False)
        self.tokens = dataclasses.replace(tokens, temperatures=call.temperatures)
        self.token_logps = torch.zeros(tokens.ids.numel(), dtype=torch.float32, device=tokens.ids.device)
        self.entropies: Tensor | None = None
        self.row_max: Tensor | None = None
        self.sum_exp: Tensor | None = None
        self.grad_logps: Tensor | None = None
        self.grad_entropies: Tensor | None = None
        self.grad_lse: Tensor | None = None

    @classmethod
    def reading(cls, call: HeadCall, shard: VocabShard | None, *, return_entropy: bool, keeps_rows: bool) -> Self:
        """A backend for log-probs, for entropies if wanted, and for the row values that `differentiating` takes."""
        backend = cls(call, _logp_tokens(call), shard, has_entropy_grad=False)
        if return_entropy:
            backend.entropies = torch.zeros_like(backend.token_logps)
        if keeps_rows:
            backend.row_max, backend.sum_exp = (torch.zeros_like(backend.token_logps) for _ in range(2))
        return backend

    @classmethod
    def differentiating(
        cls,
        call: HeadCall,
        shard: VocabShard | None,
        kept_rows: list[Tensor],
        grad_logps: Tensor,
        grad_entropies: Tensor | None,
        grad_lse: Tensor | None,
    ) -> Self:
        """A backend for dL/dlogits; `kept_rows` are entropies, row maxima and sums of exponentials."""
        has_grad = {"has_entropy_grad": grad_entropies is not None, "has_lse_grad": grad_lse is not None}
        backend = cls(call, _logp_tokens(call), shard, **has_grad)
        backend.entropies, backend.row_max, backend.sum_exp = kept_rows
        backend.grad_logps = grad_logps.contiguous()
        backend.grad_entropies = None if grad_entropies is None else grad_entropies.contiguous()
        backend.grad_lse = None if grad_lse is None else grad_lse.contiguous()
        return backend

    def lse(self) -> Tensor:
        """Log-sum-exp of each row, [M]; 0 where masked."""
        assert self.row_max is not None
        assert self.sum_exp is not None
        temperatures = self.tokens.temperatures
        temperature = self.tokens.objective.temperature if temperatures is None else temperatures
        lse = self.row_max / temperature + self.sum_exp.log()
        is_skipped = self.sum_exp == 0
        if self.tokens.mask is not None:
            is_skipped |= ~self.tokens.mask
        return lse.masked_fill_(is_skipped, 0.0)

    def logps(self, chunk: Chunk) -> None:
        """Compute the log-probs of a chunk, and the row values that `grad_logits` needs."""
        row_values = {"entropies": self.entropies, "row_max": self.row_max, "sum_exp": self.sum_exp}
        if self.keeps_exponentials:
            self._keep_exponentials(chunk, has_entropy=self.entropies is not None)
            launch_combine_tiles(chunk, self.tokens, self.token_logps, **row_values)
        elif self.shard is None:
            launch_logps(chunk, self.tokens, self.token_logps, **row_values)
        else:
            parts = launch_read_shard(chunk, self.tokens, has_entropy=self.entropies is not None)
            launch_combine_shards(chunk, self.tokens, self.shard.all_gather(parts), self.token_logps, **row_values)

    def grad_logits(self, chunk: Chunk) -> None:
        """Write dL/dlogits of a chunk."""
        assert self.row_max is not None
        assert self.sum_exp is not None
        assert self.grad_logps is not None
        rows = {"row_max": self.row_max, "sum_exp": self.sum_exp, "grad_logps": self.grad_logps}
        if self.grad_entropies is not None:
            assert self.entropies is not None
            rows |= {"entropies": self.entropies, "grad_entropies": self.grad_entropies}
        if self.grad_lse is not None:
            rows["grad_lse"] = self.grad_lse
        if not self.keeps_exponentials:
            launch_grad_logits(chunk, self.tokens, **rows)
            return
        assert chunk.exponentials is not None
        if chunk.exponentials.tiles is None:  # the log-probs are from another pass
            self._keep_exponentials(chunk, has_entropy=False)
        if self.grad_entropies is None:
            launch_exponential_grads(chunk, self.tokens, **rows)
        else:
            launch_log_grads(chunk, self.tokens, **rows)

    def _keep_exponentials(self, chunk: Chunk, *, has_entropy: bool) -> None:
        stores_logs = self.grad_entropies is not None
        launch_exponentials(chunk, self.tokens, has_entropy=has_entropy, stores_logs=stores_logs)


class TritonLoss(TritonLogps):
    """The policy loss and its metrics, without synchronisation."""

    def __init__(self, call: HeadCall, inputs: LossInputs, shard: VocabShard | None, *, return_entropy: bool) -> None:
        tokens = make_tokens(inputs, call.completion_ids)
        super().__init__(call, tokens, shard, has_entropy_grad=tokens.entropy_bonus is not None)
        self.needs_whole_sequences, self._wants_grad = self.tokens.needs_whole_sequences, any(call.wants_grad)
        self._sums, self._return_entropy = make_sums(self.token_logps.device), return_entropy
        if self.needs_whole_sequences or not self._is_one_launch:
            self.row_max, self.sum_exp, self.grad_logps = (torch.zeros_like(self.token_logps) for _ in range(3))
            has_bonus = self.tokens.entropy_bonus is not None
            self.entropies = torch.zeros_like(self.token_logps) if return_entropy or has_bonus else None
            self.grad_entropies = torch.zeros_like(self.token_logps) if has_bonus else None

    def loss(self, chunk: Chunk) -> None:
        """Compute log-probs, loss and, if wanted, dL/dlogits of a chunk, in one launch if that is possible."""
        if self._is_one_launch:
            launch_row_loss(chunk, self.tokens, self._sums, self.token_logps, return_entropy=self._return_entropy)
            return
        assert self.grad_logps is not None
        self.logps(chunk)
        launch_token_loss(
            chunk,
            self.tokens,
            self._sums,
            self.token_logps,
            self.grad_logps,
            entropies=self.entropies,
            grad_entropies=self.grad_entropies,
        )
        if self._wants_grad:
            self.grad_logits(chunk)

    def sequence_loss(self, chunk: Chunk | None) -> None:
        """Compute loss and dL/dlogps of the sequences of a chunk (None: of all sequences)."""
        assert self.grad_logps is not None
        launch_sequence_loss(
            self.tokens,
            self._sums,
            self.token_logps,
            self.grad_logps,
            entropies=self.entropies,
            grad_entropies=self.grad_entropies,
            sequences=None if chunk is None else chunk.span.sequences,
        )

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss 0-dim, metrics [len(METRIC_NAMES)], and the number of tokens."""
        return self._sums.result()


def loss_from_logps(logps: Tensor, inputs: LossInputs) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Loss, metrics and number of tokens, and dL/dlogps, shaped like `logps`."""
    flat, sums = logps.reshape(-1).contiguous(), make_sums(logps.device)
    grad_logps = torch.zeros_like(flat, dtype=torch.float32)
    launch_sequence_loss(make_tokens(inputs, None), sums, flat, grad_logps)
    return sums.result(), grad_logps.view(logps.shape)


def token_losses_from_logps(logps: Tensor, inputs: LossInputs) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Sum of the losses, metrics and number of tokens, and the loss of each token, shaped like `logps`."""
    flat, sums = logps.reshape(-1).contiguous(), make_sums(logps.device)
    losses, grad_logps = (torch.zeros_like(flat, dtype=torch.float32) for _ in range(2))
    launch_sequence_loss(make_tokens(inputs, None), sums, flat, grad_logps, losses=losses)
    return sums.result(), losses.view(logps.shape)


def token_losses_grad(grad_losses: Tensor, logps: Tensor, inputs: LossInputs) -> Tensor:
    """dL/dlogps, float32, shaped like `logps`, from the gradient of each token's loss."""
    flat, weights = logps.reshape(-1).contiguous(), grad_losses.reshape(-1).contiguous()
    grad_logps = torch.zeros_like(flat, dtype=torch.float32)
    launch_sequence_loss(make_tokens(inputs, None), make_sums(logps.device), flat, grad_logps, weights=weights)
    return grad_logps.view(logps.shape)


def _in_separate_launches(tokens: Tokens, ids: Tensor, exists: Tensor, *, are_local: bool) -> Tokens:
    """The inputs of kernels that compute log-probs and their gradients in separate launches. `exists`: which ids are
    columns of the whole head; `are_local`: they count this rank's columns."""
    advantages, meaning = tokens.advantages, tokens.advantages_are
    if advantages is not None and meaning == "rewards":
        advantages, meaning = advantages_of_rewards(advantages, tokens.group_size), "sequence"
    return dataclasses.replace(
        tokens,
        ids=ids,
        ids_are_local=are_local,
        # kernels do not read the rows whose id is no column of the head
        mask=exists if tokens.mask is None else tokens.mask & exists,
        advantages=advantages,
        advantages_are=meaning,
    )


def _logp_tokens(call: HeadCall) -> Tokens:
    """The inputs of the kernels for log-probs, which use only the objective's temperature and softcap."""
    return Tokens(
        ids=call.completion_ids.reshape(-1).contiguous(),
        mask=None if call.mask is None else (call.mask != 0).reshape(-1),
        objective=Objective(temperature=call.temperature, logit_softcap=call.logit_softcap),
    )
