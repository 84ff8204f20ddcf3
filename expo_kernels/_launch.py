"""Chunk sizes: all that depends on the hardware."""

import torch

# On CPU products of few rows lose up to a third of their speed to repacking the head, and beyond H / 3 rows little is
# gained: measured on two cores at (V, H) = (32,768, 512) and (65,536, 1,024). So large a chunk is a third of dWeight,
# which is held in any case. Small heads fill 16 MiB.
CPU_LOGITS_BUDGET_MB = 16.0
CPU_MOST_ROWS = 512
ACCELERATOR_LOGITS_BUDGET_MB = 512.0
WIDEN_BYTES = 16 * 2**20  # float32 bytes of head weight held at once when it is stored in a narrower dtype


def chunk_rows(
    num_tokens: int,
    vocab_size: int,
    *,
    itemsize: int,
    buffers: int,
    budget_mb: float | None,
    device: torch.device,
    hidden_size: int = 0,
) -> int:
    """Rows per chunk, >= 1, such that `buffers` of [rows, V] fit the budget; chunks come out nearly equal.

    Args:
        num_tokens: valid tokens in all.
        vocab_size: V.
        itemsize: bytes per logit.
        buffers: [rows, V] buffers alive at once.
        budget_mb: MiB for them together; None: the default of the device.
        device: where they live.
        hidden_size: H of the products that make the logits; 0 where they are ready.
    """
    least = 1
    if budget_mb is None and device.type == "cpu":
        budget_mb, least = CPU_LOGITS_BUDGET_MB, max(1, min(-(-hidden_size // 3), CPU_MOST_ROWS))
    elif budget_mb is None:
        budget_mb = ACCELERATOR_LOGITS_BUDGET_MB
    most = max(least, int(budget_mb * 2**20) // max(vocab_size * itemsize * buffers, 1))
    num_chunks = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // num_chunks))


def widen_rows(hidden_size: int, itemsize: int) -> int:
    """Rows of the head's weight to widen at once, >= 1."""
    return max(1, WIDEN_BYTES // (max(hidden_size, 1) * itemsize))
