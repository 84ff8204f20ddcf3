"""A head that keeps bfloat16 exponentials of its logits: 2 bytes a logit in place of 4.

The logits of a chunk are products of hidden states and one tile of the weight at a time, 4,096 columns, into one
float32 buffer that stays in a GPU's L2 cache. After each product a kernel reads it and writes bfloat16 exponentials,
which both gradient products take as their operand. The formulas are in `_triton/exponentials.py` and
`_triton/exponential_grads.py`.

Letters: n rows of a chunk, V vocabulary, H hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from expo_kernels import _launch
from expo_kernels._head import Chunk, Exponentials, Gradients, HeadCall, LinearHead, Spans
from expo_kernels._products_gpu import are_narrow, scaled_row_sum
from expo_kernels._vocab_group import VocabShard


def uses_exponentials(call: HeadCall, shard: VocabShard | None, *, has_entropy_grad: bool) -> bool:
    """Whether the head of this call keeps exponentials, if the kernels run.

    It does for bfloat16 operands and a whole head. Gradients of entropies with a softcap need the float32 logits: where
    the softcap saturates, its derivative is too inexact from rounded ones.
    """
    hidden, weight, _ = call.tensors
    if not _launch.keeps_exponentials() or weight is None or shard is not None:
        return False
    if has_entropy_grad and call.logit_softcap is not None:
        return False
    return are_narrow(hidden.dtype, call.weight_dtype or weight.dtype, weight)


class ExponentialHead(LinearHead):
    """Logits hidden @ weight.T + bias one tile at a time; chunks keep their exponentials."""

    _memory: Tensor | None = None

    def chunks(self, spans: Spans) -> Iterator[Chunk]:
        """Rows whose logits are computed when they are read; each chunk overwrites the one before."""
        vocab_size, device = self._weight.shape[0], self._weight.device
        if self._buffer is None:
            columns = _launch.exponential_tile(vocab_size).block
            self._buffer = torch.empty(spans.most_rows, columns, dtype=torch.float32, device=device)
            if any(self._wants_grad):
                # rows start on multiples of 16 elements, so that every access can be 128 bits wide
                columns = -(-vocab_size // 16) * 16
                self._memory = torch.empty(spans.most_rows, columns, dtype=torch.bfloat16, device=device)
        for span in spans.spans:
            hidden = self._take(span)
            logits, memory = self._buffer[: hidden.shape[0]], None
            chunk = Chunk(span, logits, None, hidden=hidden)
            if self._memory is not None:
                memory = self._memory[: hidden.shape[0]]
                chunk.grad_logits = memory[:, :vocab_size]
            chunk.exponentials = Exponentials(memory, self._logits_by_tile(logits, hidden), vocab_size, self._bias)
            yield chunk

    def _logits_by_tile(self, out: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        columns = out.shape[1]
        for start in range(0, self._weight.shape[0], columns):
            some_weight = self._weight[start : start + columns]
            self._products.write_logits(out[:, : some_weight.shape[0]], hidden, some_weight, None, self._scale)
            yield out

    def _add_scaled_rows(self, grad_bias: Tensor, grad_logits: Tensor, scale: Tensor) -> None:
        grad_bias.add_(scaled_row_sum(grad_logits, scale))

    def gradients(self) -> Gradients:
        """Gradients of hidden, weight and bias (None where not wanted), not yet in the inputs' dtypes."""
        self._memory = None
        return super().gradients()
