"""A run that diverged or collapsed: where it goes back to, and what continues it.

A checkpoint is good if a whole step without a sign of divergence was taken from it. The last good one is kept until
there is a newer one. When a run diverges, its folder records the step; `--resume` then goes back to the last good
checkpoint, with the learning rate, clip range or tolerance that the command line gives.
"""

import shlex
from contextlib import suppress

from expo.errors import Collapsed, Diverged, FolderError
from expo.run.collapse import CollapseWatch
from expo.run.folder import RunFolder
from expo.run.setup import Run

DIVERGED = "diverged.json"  # in the run's folder, until it is resumed
# what a message proposes: a tenth of the learning rate, and at most one that pretrained models bear
LOWER, AT_MOST = 0.1, 1e-5


def last_good_step(watch: CollapseWatch, step: int, num_bad: int, before: int) -> int:
    """The last step whose policy has proven good, after `step`.

    Args:
        watch: has seen the step.
        step: number of the step.
        num_bad: updates skipped in a row up to now.
        before: the same after the step before.
    """
    return step - 1 if watch.is_clear and num_bad == 0 else before


def end_if_collapsed(run: Run, watch: CollapseWatch, step: int) -> None:
    """Raises: Collapsed if the policy has collapsed and run.end_on_collapse is set."""
    if run.config.run.end_on_collapse and watch.collapse:
        raise Collapsed(f"the policy has collapsed at step {step}: {', '.join(watch.collapse)}")


def with_advice(error: Diverged, run: Run, good_step: int) -> Diverged:
    """Records in the run's folder that the run has diverged; the error with the command that continues it.

    Args:
        error: says what happened.
        run: the run.
        good_step: the last step whose policy has proven good.
    """
    books, config = run.bookkeeping, run.config
    with suppress(FolderError):  # on a full disk the error itself is more important
        books.folder.write_json(DIVERGED, {"good_step": good_step, "reason": str(error)})
    step = books.checkpoints.newest_step(up_to=good_step)
    back = f"goes back to the checkpoint of step {step}" if step else "starts the run over, since no checkpoint is good"
    lower = min(LOWER * config.optimizer.lr, AT_MOST)
    folder = books.folder.path
    command = shlex.join(
        [
            *("python", "-m", "expo.train", str(folder / "config.yaml"), f"--run.dir={folder}"),
            *(f"--optimizer.lr={lower:g}", "--resume"),
        ]
    )
    launched = "" if run.ranks.size == 1 else ", with the launcher that started it"
    return type(error)(
        f"{error}. --resume {back}. Inspect metrics.jsonl, lower optimizer.lr or narrow the clip range, and "
        f"continue{launched}: {command}"
    )


def step_to_go_back_to(folder: RunFolder) -> int | None:
    """The last good step of a run that has diverged; None if it has not diverged since its last start."""
    good_step = folder.read_object(DIVERGED).get("good_step")
    return good_step if type(good_step) is int else None  # of a damaged record, the newest checkpoint is taken
