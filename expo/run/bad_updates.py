"""Updates that were skipped for a non-finite loss or gradient: their batches are kept, too many end the run."""

import functools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from expo.errors import Diverged, first_line
from expo.learner.batch import MiniBatch
from expo.runtime.atomic_io import write_whole
from expo.runtime.console import Display
from expo.runtime.distributed import Ranks


class BadUpdates:
    """Writes the batch of each skipped update to `bad_updates/` in the run's folder.

    Args:
        folder: the run's.
        ranks: the processes of the run; every rank writes its own share of the batch.
        display: shows where the batch is.
        limit: run.max_bad_updates.
    """

    def __init__(self, folder: Path, ranks: Ranks, display: Display, limit: int) -> None:
        self._folder, self._ranks, self._display, self._limit = folder / "bad_updates", ranks, display, limit

    def keep(
        self, step: int, index: int, mini_batch: MiniBatch, beta: Tensor, metrics: Mapping[str, float], in_a_row: int
    ) -> None:
        """Writes this rank's share of the mini-batch of update `index` in `step`.

        Args:
            step, index: which update.
            mini_batch, beta: its inputs.
            metrics: its metrics.
            in_a_row: number of consecutive skipped updates, this one included.

        Raises: Diverged if `in_a_row` has reached the limit.
        """
        path = self._folder / f"step-{step:06d}-update-{index}-rank-{self._ranks.rank}.pt"
        content = {"micro_batches": [asdict(micro) for micro in mini_batch.micro_batches], "beta": beta, **metrics}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, functools.partial(torch.save, content))
            where = f"its batch is in {path}"
        except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError for some full disks
            where = f"its batch could not be kept in {path} ({first_line(error)})"
        self._display.line(f"step {step}, update {index}: the gradient is not finite; the update is skipped, {where}")
        if in_a_row >= self._limit:
            raise Diverged(
                f"{in_a_row} updates in a row had a non-finite loss or gradient, the last at step {step}: {metrics}; "
                f"their batches are in {path.parent}"
            )
