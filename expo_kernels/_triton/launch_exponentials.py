"""The arguments, grid and tile of the launches of `exponentials.py` and `exponential_grads.py`.

Letters: n rows of a chunk, V vocabulary, M positions of the caller's tensors.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from expo_kernels import _launch
from expo_kernels._head import Chunk, Exponentials
from expo_kernels._inputs import Tokens
from expo_kernels._triton import exponential_grads as grad_kernels
from expo_kernels._triton import exponentials as kernels
from expo_kernels._triton.launch import chunk_arguments, token_arguments

ALIGNMENT = 16  # elements: rows of exponentials start and end on multiples of it
BLOCK_TILES = 64  # exponents that are read at once: those of V = 262,144


def launch_exponentials(chunk: Chunk, tokens: Tokens, *, has_entropy: bool, stores_logs: bool) -> None:
    """Compute the logits of a chunk tile by tile, and keep their exponentials, if the chunk has memory for these, and
    the numbers of each tile; with `stores_logs` keep 16-bit logs of the exponentials."""
    kept, logits = _exponentials_of(chunk), chunk.logits
    tile = _launch.exponential_tile(kept.vocab_size)
    num_rows, num_tiles = logits.shape[0], triton.cdiv(kept.vocab_size, tile.block)
    kept.tiles, kept.chosen = (
        torch.empty(*shape, num_rows, dtype=torch.float32, device=logits.device)
        for shape in ((num_tiles, kernels.NUM_PARTS.value), ())
    )
    assert logits.stride(0) % ALIGNMENT == 0
    for number, _ in enumerate(kept.logits_by_tile):
        num_columns = min(tile.block, kept.vocab_size - number * tile.block)
        with _launch.current(logits.device):
            kernels.exponentials_kernel[(num_rows,)](
                logits_ptr=logits,
                bias_ptr=kept.bias,
                row_stride=logits.stride(0) // ALIGNMENT,
                tile=number,
                num_columns=triton.cdiv(num_columns, ALIGNMENT),
                HAS_SOFTCAP=tokens.objective.logit_softcap is not None,
                HAS_ENTROPY=has_entropy,
                STORES_LOGS=stores_logs,
                **_rows(chunk, tokens, stores_logs=stores_logs),
            )


def launch_combine_tiles(
    chunk: Chunk,
    tokens: Tokens,
    logps: Tensor,
    *,
    entropies: Tensor | None = None,
    row_max: Tensor | None = None,
    sum_exp: Tensor | None = None,
) -> None:
    """Write log-probs (and entropies, and the values that the gradients need) of these rows by position."""
    kept, tile = _exponentials_of(chunk), _launch.token_tile()
    assert kept.tiles is not None
    num_tiles, _, num_rows = kept.tiles.shape
    with _launch.current(logps.device):
        kernels.combine_tiles_kernel[(triton.cdiv(num_rows, tile.block),)](
            tiles_ptr=kept.tiles,
            chosen_ptr=kept.chosen,
            logps_ptr=logps,
            entropies_ptr=entropies,
            row_max_ptr=row_max,
            sum_exp_ptr=sum_exp,
            temperatures_ptr=tokens.temperatures,
            hyper_ptr=tokens.hyper_parameters,
            num_tiles=num_tiles,
            HAS_SOFTCAP=tokens.objective.logit_softcap is not None,
            **token_arguments(chunk, tokens, tile),
        )


def launch_exponential_grads(
    chunk: Chunk, tokens: Tokens, *, row_max: Tensor, sum_exp: Tensor, grad_logps: Tensor
) -> None:
    """Make `grad_logits`, `row_scale` and the gradients of two columns of these rows from their exponentials."""
    kept = _exponentials_of(chunk)
    assert kept.tiles is not None
    assert kept.chosen is not None
    chunk.row_scale = torch.empty_like(kept.chosen)
    columns = _exact_columns(chunk, kept.chosen)
    with _launch.current(grad_logps.device):
        grad_kernels.exponential_grads_kernel[(kept.tiles.shape[2],)](
            row_scale_ptr=chunk.row_scale,
            row_max_ptr=row_max,
            sum_exp_ptr=sum_exp,
            grad_logps_ptr=grad_logps,
            num_tiles=kept.tiles.shape[0],
            HAS_SOFTCAP=tokens.objective.logit_softcap is not None,
            BLOCK_TILES=BLOCK_TILES,
            **columns,
            **_rows(chunk, tokens),
        )


def launch_log_grads(
    chunk: Chunk,
    tokens: Tokens,
    *,
    row_max: Tensor,
    sum_exp: Tensor,
    grad_logps: Tensor,
    entropies: Tensor,
    grad_entropies: Tensor,
) -> None:
    """Overwrite logs of exponentials by `grad_logits`, and make the gradients of two columns."""
    kept = _exponentials_of(chunk)
    assert kept.tiles is not None
    assert kept.chosen is not None
    columns = _exact_columns(chunk, kept.chosen)
    with _launch.current(grad_logps.device):
        grad_kernels.log_grads_kernel[(kept.tiles.shape[2],)](
            row_max_ptr=row_max,
            sum_exp_ptr=sum_exp,
            grad_logps_ptr=grad_logps,
            entropies_ptr=entropies,
            grad_entropies_ptr=grad_entropies,
            num_tiles=kept.tiles.shape[0],
            num_columns=triton.cdiv(kept.vocab_size, ALIGNMENT),
            BLOCK_TILES=BLOCK_TILES,
            **columns,
            **_rows(chunk, tokens, stores_logs=True),
        )


def _exact_columns(chunk: Chunk, chosen: Tensor) -> dict[str, Tensor]:
    """The arguments for the two columns whose gradients are float32; the chunk gets their memory."""
    chunk.rounding_residual, chunk.other_grad = (torch.empty_like(chosen) for _ in range(2))
    chunk.other_ids = torch.empty_like(chosen, dtype=torch.int64)
    return {
        "residual_ptr": chunk.rounding_residual,
        "other_grad_ptr": chunk.other_grad,
        "other_id_ptr": chunk.other_ids,
    }


def _exponentials_of(chunk: Chunk) -> Exponentials:
    assert chunk.exponentials is not None
    return chunk.exponentials


def _rows(chunk: Chunk, tokens: Tokens, *, stores_logs: bool = False) -> dict[str, Any]:
    """The arguments that the kernels on exponentials share."""
    kept = _exponentials_of(chunk)
    tile = _launch.exponential_tile(kept.vocab_size)
    memory = kept.memory
    if memory is not None:
        assert memory.stride(0) % ALIGNMENT == 0
        assert memory.data_ptr() % (ALIGNMENT * memory.itemsize) == 0
    return {
        "exponentials_ptr": memory.view(torch.int16) if memory is not None and stores_logs else memory,
        "tiles_ptr": kept.tiles,
        "chosen_ptr": kept.chosen,
        "ids_ptr": tokens.ids,
        "temperatures_ptr": tokens.temperatures,
        "hyper_ptr": tokens.hyper_parameters,
        "exponentials_row_stride": 0 if memory is None else memory.stride(0) // ALIGNMENT,
        "vocab_size": kept.vocab_size,
        "ALIGNMENT": ALIGNMENT,
        "BLOCK_V": tile.block,
        **chunk_arguments(chunk, tokens, tile.num_warps),
    }
