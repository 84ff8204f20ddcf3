"""Temperatures that differ from sequence to sequence or from token to token: their checks, and one for each position.

Letters: B sequences, M positions of the caller's tensors.
"""

import torch
from torch import Tensor

from expo_kernels import _validate as validate
from expo_kernels._packing import sequence_of


def check(temperature: Tensor, like_name: str, like: Tensor, num_sequences: int | None) -> None:
    """`temperature` has one number per sequence, or one per position of the argument `like_name`, which is `like`.

    Args:
        temperature: [B] or shaped like `like`.
        like_name: name of the argument that has the positions.
        like: [B, T], or packed [N].
        num_sequences: B; None if it is not known, as without cu_seqlens.
    """
    validate.floating("temperature", temperature)
    validate.same_device(**{like_name: like, "temperature": temperature})
    if temperature.shape == like.shape or (num_sequences is not None and temperature.shape == (num_sequences,)):
        return
    per_sequence = "" if num_sequences is None else f"one per sequence, [{num_sequences}], or "
    how = "; use temperature.flatten()" if num_sequences is not None and temperature.numel() == num_sequences else ""
    raise ValueError(
        f"temperature has shape {list(temperature.shape)}; expected a number, {per_sequence}"
        f"one per position, {list(like.shape)}{how}"
    )


def of_positions(
    temperature: Tensor, mask: Tensor | None, shape: torch.Size, dtype: torch.dtype, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The temperature of each position, [M]; 1 where masked, so that a masked one may hold anything.

    With as many packed sequences as positions it is read per sequence, as advantages are.

    Raises:
        ValueError: one of a valid position is not finite or not > 0 (checked where values may be read).
    """
    if cu_seqlens is not None and len(temperature) == len(cu_seqlens) - 1:
        positions = torch.arange(shape.numel(), device=temperature.device)
        temperature = temperature[sequence_of(positions, cu_seqlens)]
    elif temperature.dim() < len(shape):
        temperature = temperature.unsqueeze(1).expand(shape)
    made = temperature.detach().to(dtype).reshape(-1)
    is_masked = None if mask is None else mask.reshape(-1) == 0
    if validate.may_read(made):
        validate.positive("temperature", made if is_masked is None else made[~is_masked])
    return (made if is_masked is None else made.masked_fill(is_masked, 1.0)).contiguous()
