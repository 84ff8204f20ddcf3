"""A run beside its training steps: it resumes from a checkpoint, evaluates, saves, and finishes."""

from pathlib import Path

from expo.errors import CheckpointError, FolderError, first_line
from expo.evaluate import evaluate
from expo.report import write_report
from expo.reporting.comparison import results_table
from expo.reporting.reader import commits_of
from expo.run.checkpoint import Position, current_position
from expo.run.environment import ENVIRONMENT
from expo.run.schedule import is_due, is_over
from expo.run.setup import Run
from expo.runtime.atomic_io import write_whole


def resume_run(run: Run, resume: bool) -> Position:
    """Restores the newest whole checkpoint if `resume` is set and there is one; returns the position of the run.

    Raises: CheckpointError if there are checkpoints, but none of them is whole.
    """
    data, books = run.data, run.bookkeeping
    with run.guard("save"):
        position = current_position(0, data.curriculum, data.generator)
        books.checkpoints.remove_leftovers()
        checkpoint = books.checkpoints.newest_whole() if resume else None
        if checkpoint is not None:
            position = books.checkpoints.load(checkpoint, run.learner.policy)
            _restore_draws(run, position, checkpoint)
            books.display.line(f"resuming after step {position.step} of {run.config.run.steps} in {books.folder.path}")
        elif resume:
            books.display.line(f"no checkpoint in {books.checkpoints.folder}: the run starts with step 1")
        logs = None if checkpoint is None else books.checkpoints.logs_at(checkpoint)
        messages = run.ranks.raise_on_all_ranks(lambda: books.folder.rewind(position.step if resume else -1, logs))
        run.rollout.cache.drop(position.step)
        messages += books.folder.record_start(position.step + 1, run.ranks.size)
        for message in messages:
            books.display.line(message)
    with run.guard("sync"):
        run.rollout.sync.run()
    return position


def _restore_draws(run: Run, position: Position, checkpoint: Path) -> None:
    """Restores what draws the questions. Raises: CheckpointError if the checkpoint is not of these questions."""
    try:
        run.data.curriculum.load_state_dict(dict(position.curriculum))
        run.data.generator.set_state(position.generator)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not fit this run ({first_line(error)}); restore its questions, or the "
            f"checkpoint"
        ) from error


def evaluate_if_due(run: Run, position: Position) -> float | None:
    """Evaluates the current policy on every set, if that is due and not yet in evaluations.jsonl.

    Returns: mean pass@1 over the sets; None if nothing was evaluated.
    """
    config, sets, books, step = run.config, run.data.evaluation_sets, run.bookkeeping, position.step
    num_replies = sum(len(prompts) for prompts in sets.values()) * config.evaluation.num_samples
    is_first_or_last = step == 0 or is_over(config.run, position)
    if num_replies == 0 or not (is_first_or_last or is_due(step, config.evaluation.every)):
        return None
    with run.guard("sync"):
        is_recorded = run.ranks.run_on_rank0(
            lambda: step in [row["step"] for row in books.folder.read_rows("evaluations") if row.get("sets")]
        )
    if is_recorded:
        return None
    with run.guard("evaluation"), books.display.bar(f"evaluation after step {step}, replies", num_replies) as bar:
        result = evaluate(
            run.rollout.engine,
            run.rollout.verifier,
            sets,
            config.evaluation,
            config.rollout.max_new_tokens,
            config.run.seed,
            on_progress=bar.advance,
        )
    books.folder.append("evaluations", {"step": step, "reply_tokens": position.reply_tokens, **result})
    pass_at_1 = [scores["pass_at"]["1"]["mean"] for scores in result["sets"].values()]
    return float(sum(pass_at_1) / len(pass_at_1))


def save_checkpoint(run: Run, position: Position, score: float | None = None, *, is_required: bool = False) -> None:
    """Saves a checkpoint, then deletes the checkpoints and cached replies that are no longer needed.

    Args:
        position: the position of the run.
        score: of the policy, larger is better; None if it was not evaluated after this step.
        is_required: whether a failure ends the run; otherwise it is a warning.

    Raises: CheckpointError if the checkpoint is required and could not be written.
    """
    section, books = run.config.run, run.bookkeeping
    with run.guard("save"):
        try:
            books.checkpoints.save(position, run.learner.policy, score)
            books.checkpoints.retain(section.keep_checkpoints, best=section.keep_best)
            run.rollout.cache.drop(position.step)
        except CheckpointError as error:
            if is_required:
                raise
            books.display.line(f"warning: {error}; free some space")


def finish(run: Run, position: Position) -> None:
    """Writes the exported model, summary.json and the report, and prints the scores before and after training."""
    config, folder, display = run.config, run.bookkeeping.folder, run.bookkeeping.display
    with run.guard("save"):
        export(run)
    if not run.ranks.is_rank0:
        return
    evaluations = [row for row in folder.read_rows("evaluations") if isinstance(row.get("sets"), dict)]
    timed = folder.read_rows("metrics") + evaluations
    summary = {
        "seed": config.run.seed,
        "steps": position.step,
        "reply_tokens": position.reply_tokens,
        "commits": commits_of(folder.read_object(ENVIRONMENT)),
        "seconds": sum(row["seconds"] for row in timed if isinstance(row.get("seconds"), int | float)),
        "before": next((row["sets"] for row in evaluations if row["step"] == 0), {}),
        "after": evaluations[-1]["sets"] if evaluations else {},
    }
    folder.write_json("summary.json", summary)
    if evaluations:
        display.line(results_table(summary["before"], summary["after"]))
    try:
        report = write_report(folder.path)
    except OSError as error:
        raise FolderError(
            f"the report in {folder.path} cannot be written ({error}); the run is complete, so mend that and call "
            f"python -m expo.report {folder.path}"
        ) from error
    display.line(f"run:    {folder.path}\nreport: {report}")


def export(run: Run) -> None:
    """Writes the policy and its tokenizer as a transformers folder; every rank calls it, rank 0 writes.

    Raises: FolderError on rank 0 if the folder cannot be written.
    """
    policy, path = run.learner.policy, run.bookkeeping.folder.path / "export"

    def write(temporary: Path) -> None:
        policy.export(temporary)
        run.learner.tokenizer.save_pretrained(temporary)
        mode = (temporary / "config.json").stat().st_mode  # as the umask of this process has it
        for path in temporary.glob("*.safetensors"):  # which safetensors makes readable for its owner alone
            path.chmod(mode)

    if not run.ranks.is_rank0:
        policy.export(path)
        return
    try:
        write_whole(path, write)
    except OSError as error:
        raise FolderError(
            f"{path} cannot be written ({error}); free some space, then continue with --resume"
        ) from error
