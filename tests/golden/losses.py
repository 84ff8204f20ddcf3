"""Losses, metrics, log-probs and gradients of the public functions: `python -m tests.golden.losses PATH OUT.json`.

PATH is torch or kernels: the PyTorch path, or the Triton kernels in the interpreter, for which TRITON_INTERPRET=1 must
be in the environment. Only the public API is used, so that the same file runs on any commit.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import expo_kernels
from expo_kernels import Objective, akl_beta, group_advantages
from tests.golden.calls import curriculum, from_hidden, from_logits, from_logps, given, in_place, log_probs, of_packed
from tests.golden.digests import Record, digest, write
from tests.golden.inputs import Batch, make_batch

Run = Callable[[], dict[str, Tensor]]

DTYPES = (torch.bfloat16, torch.float16, torch.float64)
SMALL = (4, 5, 8, 13)  # B, T, H, V
WIDE = (2, 3, 4, 4111)  # more columns than a program reads at once
LONG = (2, 1100, 4, 11)  # more positions than a program reads at once
RANGE = {"clip_low": 0.1, "clip_high": 0.15}
TAUS = {"sapo_tau_pos": 1.3, "sapo_tau_neg": 0.8}
POWERS = {"vespo_k_pos": 1.5, "vespo_k_neg": 0.9, "vespo_lambda_pos": 1.2, "vespo_lambda_neg": 2.5}
BOUNDS = {"rollout_floor": 0.7, "rollout_cap": 1.4}

OBJECTIVES = {
    "default": Objective(),
    "clip range": Objective(**RANGE),
    "dual clip": Objective(dual_clip=1.3, **RANGE),
    "clip of sequences": Objective(ratio="sequence", **RANGE),
    "cispo": Objective(surrogate="cispo", **RANGE),
    "cispo of sequences": Objective(surrogate="cispo", ratio="sequence", **RANGE),
    "sapo": Objective(surrogate="sapo", **TAUS),
    "sapo of sequences": Objective(surrogate="sapo", ratio="sequence", aggregation="token", **TAUS),
    "gmpo": Objective(surrogate="gmpo", **RANGE),
    "vespo": Objective(surrogate="vespo", aggregation="token", **POWERS),
    "k1": Objective(kl="k1"),
    "k2": Objective(kl="k2"),
    "weighted k1": Objective(kl="k1", kl_importance_weighted=True, surrogate="sapo"),
    "weighted k2": Objective(kl="k2", kl_importance_weighted=True, surrogate="gmpo"),
    "weighted k3": Objective(kl_importance_weighted=True, **RANGE),
    "weighted k3 of sequences": Objective(kl_importance_weighted=True, ratio="sequence", dual_clip=1.3),
    "sum": Objective(aggregation="sum"),
    "token": Objective(aggregation="token", clip_high=0.28),
    "constant": Objective(aggregation="constant", max_completion_length=7),
    "luspo": Objective(ratio="sequence", aggregation="sum", **RANGE),
    "temperature": Objective(temperature=0.7),
    "softcap": Objective(logit_softcap=2.0),
    "softcap, temperature, gmpo": Objective(surrogate="gmpo", logit_softcap=3.0, temperature=1.4),
    "clamp": Objective(log_ratio_clamp=0.3),
    "rollout token": Objective(rollout_correction="token", rollout_cap=1.4),
    "rollout sequence": Objective(rollout_correction="sequence", dual_clip=1.3, **BOUNDS),
    "rollout token mask": Objective(rollout_correction="token_mask", aggregation="token", **BOUNDS),
    "rollout sequence mask": Objective(rollout_correction="sequence_mask", surrogate="gmpo", kl="k2", **BOUNDS),
    "rollout token, vespo": Objective(rollout_correction="token", surrogate="vespo", **BOUNDS),
    "rollout token mask, vespo": Objective(rollout_correction="token_mask", surrogate="vespo", kl="k1", **BOUNDS),
    "rollout sequence, cispo": Objective(rollout_correction="sequence", surrogate="cispo", ratio="sequence", **BOUNDS),
}
IN_EVERY_DTYPE = ("clip range", "clip of sequences", "gmpo", "vespo", "sapo", "softcap", "rollout sequence")


def calls(batch: Batch) -> dict[str, dict[str, Any]]:
    """Optional arguments of a call other than its objective, by name."""
    plain: dict[str, Any] = {"advantages": batch.advantages, "old_logps": batch.old_logps, "beta": 0.2}
    plain["ref_logps"] = batch.ref_logps
    return {
        "on policy": {**plain, "old_logps": None},
        "no penalty": {**plain, "ref_logps": None, "beta": 0.0},
        "beta a tensor": {**plain, "beta": torch.tensor(0.3, dtype=torch.float64)},
        "rewards": {**plain, "advantages": None, "rewards": batch.rewards, "group_size": 2},
        "an advantage per token": {**plain, "advantages": batch.token_advantages},
        "normalizer": {**plain, "normalizer": 11.0},
        "normalizer a tensor": {**plain, "normalizer": torch.tensor(7.0)},
    }


def levels(batch: Batch, objective: Objective) -> dict[str, Run]:
    """A loss through every entry point."""
    call = given(batch, objective)
    return {
        "logps": lambda: from_logps(batch, **call),
        "logits": lambda: from_logits(batch, **call),
        "logits in place": lambda: in_place(batch, **call),
        "hidden, one chunk": lambda: from_hidden(batch, **call),
        "hidden, chunks": lambda: from_hidden(batch, num_rows=7, **call),
    }


def loss_cases(path: str) -> Iterator[tuple[str, Run]]:
    """The cases of the loss, by name."""
    small = make_batch(*SMALL)
    for name, objective in OBJECTIVES.items():
        for level, run in levels(small, objective).items():
            yield f"{name}: {level}", run
    # the kernels do not support float64
    for dtype in DTYPES if path == "torch" else DTYPES[:2]:
        batch = make_batch(*SMALL, dtype)
        for name in IN_EVERY_DTYPE:
            for level, run in levels(batch, OBJECTIVES[name]).items():
                yield f"{name}: {level}: {dtype}", run
    for name in ("clip range", "gmpo"):
        objective = OBJECTIVES[name]
        for call, options in calls(small).items():
            options = {**options, "objective": objective}
            yield f"{name}: {call}: logps", lambda options=options: from_logps(small, **options)
            yield f"{name}: {call}: logits", lambda options=options: from_logits(small, scale=0.75, **options)
            yield f"{name}: {call}: hidden", lambda options=options: from_hidden(small, num_rows=7, **options)
        usual = given(small, objective)
        for bonus in (0.0, 0.3):
            options = {**usual, "entropy_bonus": bonus, "return_entropy": True}
            yield f"{name}: entropy bonus {bonus}: logits", lambda options=options: from_logits(small, **options)
            yield f"{name}: entropy bonus {bonus}: in place", lambda options=options: in_place(small, **options)
            yield f"{name}: entropy bonus {bonus}: hidden", lambda options=options: from_hidden(small, **options)
        # chunks of 3 rows are shorter than a sequence, so that a ratio per sequence takes an extra pass
        options = {**usual, "num_rows": 3}
        yield f"{name}: chunks below a sequence", lambda options=options: from_hidden(small, **options)
        yield f"{name}: frozen head", lambda options=options: from_hidden(small, frozen=True, **options)
        yield f"{name}: no bias", lambda options=options: from_hidden(small, bias=False, **options)
    for name in ("clip range", "clip of sequences", "gmpo", "vespo", "rollout sequence"):
        for level in ("logps", "logits", "hidden"):
            yield f"{name}: packed: {level}", lambda n=name, at=level: of_packed(small, at, OBJECTIVES[n])
    wide, long = make_batch(*WIDE), make_batch(*LONG)
    for name in ("clip range", "softcap, temperature, gmpo"):
        for level, run in levels(wide, OBJECTIVES[name]).items():
            yield f"{name}: wide: {level}", run
    for name in ("clip of sequences", "gmpo", "vespo", "rollout sequence"):
        yield f"{name}: long: logps", levels(long, OBJECTIVES[name])["logps"]


def other_cases(path: str) -> Iterator[tuple[str, Run]]:
    """Log-probs, advantages, beta and the curriculum, by name."""
    for dtype in (torch.float32, *(DTYPES if path == "torch" else DTYPES[:2])):
        batch = make_batch(*SMALL, dtype)
        for settings in ({}, {"temperature": 0.7}, {"temperature": 1.3, "logit_softcap": 2.0}):
            yield f"token_logps: {settings}: {dtype}", lambda b=batch, s=settings: log_probs(b, "logits", **s)
            yield f"linear_token_logps: {settings}: {dtype}", lambda b=batch, s=settings: log_probs(b, "hidden", **s)
            chunks = {**settings, "logits_budget_mb": 5 * SMALL[-1] * 4 / 2**20}
            yield f"linear_token_logps: {chunks}: {dtype}", lambda b=batch, s=chunks: log_probs(b, "hidden", **s)
    for seed in range(3):
        rewards = make_batch(12, 1, 1, 2, seed=seed).rewards
        for scale in ("group", "batch", "none"):
            name = f"group_advantages: {scale}: {seed}"
            yield name, lambda r=rewards, s=scale: {"advantages": group_advantages(r, group_size=4, scale=s)}
        for rho in ("tanh", "constant"):
            yield f"akl_beta: {rho}: {seed}", lambda r=rewards, by=rho: {"beta": akl_beta(r, 0.02, rho=by)}
    for estimate in ("ema", "counted"):
        yield f"curriculum: {estimate}", lambda by=estimate: curriculum(by)


def main(path: str, out: str) -> None:
    """Run every case on one path and write the record."""
    imported = Path(expo_kernels.__file__).parent.parent
    assert imported == Path.cwd(), f"this would record the code in {imported}; run it there, or set PYTHONPATH"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # an output that is not written becomes NaN
    if path == "kernels":
        assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
        import tests.kernels.interpreter.kernels_on_cpu  # noqa: F401  # turns the kernels on
    losses = list(loss_cases(path))
    if path == "kernels":
        losses = losses[::2]  # the interpreter is slow; every objective keeps two entry points or three
    record: Record = {}
    for name, run in [*losses, *other_cases(path)]:
        assert name not in record, name
        record[name] = {key: digest(value) for key, value in run().items()}
    write(Path(out), record)


if __name__ == "__main__":
    main(*sys.argv[1:])
