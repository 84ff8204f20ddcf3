"""Triton kernels of `CurriculumTable`: the update in one launch, and the keys of sampling without replacement.

Source: FG-ExPO (arXiv 2605.11403), eq. 6 and 7, as in `reference.py`. Letters: Q questions, K of them in an update.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# device code: Triton determines the types of its arguments

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_kernels import _launch

# index of each number in the float64 block of settings
MOMENTUM = tl.constexpr(0)
MEAN = tl.constexpr(1)
STD = tl.constexpr(2)
IS_COUNTED = tl.constexpr(3)

_UPDATE_RUN_TIME = ["ids_ptr", "rates_ptr", "settings_ptr", "num_updates", "num_questions"]
_RACE_RUN_TIME = ["seed_ptr", "num_questions"]


@triton.jit(do_not_specialize=_UPDATE_RUN_TIME)
def update_kernel(
    ids_ptr,  # [K] int64, ascending
    rates_ptr,  # [K] float64, ascending within an id
    pass_rates_ptr,  # [Q] float32, in and out
    visits_ptr,  # [Q] int64, in and out
    log_weights_ptr,  # [Q] float32, out
    settings_ptr,  # [4] float64
    num_updates,
    num_questions,
    BLOCK: tl.constexpr,
):
    """Update each question's smoothed pass rate by the mean of its rates, its number of visits and its weight."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    question = tl.load(ids_ptr + position, mask=position < num_updates, other=-1)
    before = tl.load(ids_ptr + position - 1, mask=(position > 0) & (position < num_updates), other=-1)
    # the first of each run of equal ids processes the whole run in the order of the rates, so that any order of the
    # caller's pairs gives equal bits
    leads = (question >= 0) & (question < num_questions) & (question != before)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    next_position = position
    goes_on = leads
    while tl.max(goes_on.to(tl.int32), axis=0) > 0:
        total += tl.load(rates_ptr + next_position, mask=goes_on, other=0.0)
        count += goes_on.to(tl.float64)
        next_position += 1
        goes_on = goes_on & (next_position < num_updates)
        goes_on = goes_on & (tl.load(ids_ptr + next_position, mask=goes_on, other=-1) == question)
    visits = tl.load(visits_ptr + question, mask=leads, other=0)
    momentum = tl.load(settings_ptr + MOMENTUM)
    counted = tl.minimum(momentum, visits.to(tl.float64) / (visits + 1).to(tl.float64))
    momentum = tl.where(tl.load(settings_ptr + IS_COUNTED) != 0, counted, momentum)
    old = tl.load(pass_rates_ptr + question, mask=leads, other=0.0).to(tl.float64)
    smoothed = momentum * old + (1.0 - momentum) * (total / tl.where(leads, count, 1.0))
    smoothed = smoothed.to(tl.float32)
    tl.store(pass_rates_ptr + question, smoothed, mask=leads)
    tl.store(visits_ptr + question, visits + 1, mask=leads)
    std = tl.load(settings_ptr + STD)
    distance = smoothed.to(tl.float64) - tl.load(settings_ptr + MEAN)
    tl.store(log_weights_ptr + question, (-distance * distance / (2.0 * std * std)).to(tl.float32), mask=leads)


@triton.jit(do_not_specialize=_RACE_RUN_TIME)
def race_kernel(
    log_weights_ptr,  # [Q] float32
    seed_ptr,  # [1] int64
    keys_ptr,  # [Q] float64, out
    num_questions,
    BLOCK: tl.constexpr,
):
    """Keys log w - log E with E exponential: the k largest are a sample of k without replacement."""
    question = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = question < num_questions
    high, low, _, _ = tl.randint4x(tl.load(seed_ptr), question.to(tl.uint32))
    # 53 bits: float32 has too few distinct uniforms for a million questions
    high = (high.to(tl.uint32, bitcast=True) >> 5).to(tl.float64)
    low = (low.to(tl.uint32, bitcast=True) >> 6).to(tl.float64)
    uniform = (high * 67108864.0 + low + 0.5) * (1.0 / 9007199254740992.0)
    log_weights = tl.load(log_weights_ptr + question, mask=in_range, other=0.0).to(tl.float64)
    tl.store(keys_ptr + question, log_weights - tl.log(-tl.log(uniform)), mask=in_range)


def launch_update(
    ids: Tensor, rates: Tensor, pass_rates: Tensor, visits: Tensor, log_weights: Tensor, settings: Tensor
) -> None:
    """Update the table in place from pairs in any order: ids [K] int64 and rates [K] float64."""
    if ids.numel() == 0:
        return
    order = rates.argsort(stable=True)
    order = order[ids[order].argsort(stable=True)]
    tile = _launch.curriculum_tile()
    with _launch.current(ids.device):
        update_kernel[(triton.cdiv(ids.numel(), tile.block),)](
            ids[order],
            rates[order],
            pass_rates,
            visits,
            log_weights,
            settings,
            ids.numel(),
            pass_rates.numel(),
            BLOCK=tile.block,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )


def launch_race(log_weights: Tensor, seed: Tensor) -> Tensor:
    """Keys of sampling without replacement, [Q] float64."""
    keys = torch.empty(log_weights.shape, dtype=torch.float64, device=log_weights.device)
    tile = _launch.curriculum_tile()
    with _launch.current(keys.device):
        race_kernel[(triton.cdiv(keys.numel(), tile.block),)](
            log_weights,
            seed,
            keys,
            keys.numel(),
            BLOCK=tile.block,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return keys
