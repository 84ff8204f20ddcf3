"""Packed input: sequences one after another in one row, [N], whose borders `cu_seqlens` gives."""

import torch
from torch import Tensor


def sequence_of(positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sequence that each position belongs to.

    Args:
        positions: [n] int64, in [0, N).
        cu_seqlens: [B + 1] integers, from 0 to N.

    Returns:
        [n] int64, in [0, B).
    """
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)
