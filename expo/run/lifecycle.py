"""A run beside its training steps: it resumes from a checkpoint, evaluates, saves, and finishes."""

from dataclasses import replace
from pathlib import Path

from expo.errors import CheckpointError, Diverged, FolderError, first_line
from expo.evaluate import evaluate
from expo.report import write_report
from expo.reporting.comparison import results_table
from expo.reporting.reader import commits_of, evaluations_by_step
from expo.run.advice import first_unparsed, set_advice
from expo.run.ahead import RolloutQueue, wait_for
from expo.run.changes import describe
from expo.run.checkpoint import Position, current_position
from expo.run.collapse import CollapseWatch
from expo.run.divergence import DIVERGED, step_to_go_back_to, with_advice
from expo.run.environment import ENVIRONMENT
from expo.run.folder import RunFolder
from expo.run.schedule import is_due, is_over
from expo.run.setup import Run
from expo.runtime.atomic_io import write_whole
from expo.runtime.endings import disk_errors, reason_of
from expo.runtime.signals import raise_reason

SUMMARY = "summary.json"


def resume_run(run: Run, queue: RolloutQueue, resume: bool) -> tuple[Position, CollapseWatch]:
    """Restores the newest whole checkpoint if `resume` is set and there is one; after a divergence, the last good one.

    Returns: the position of the run, and a watch that has seen all its steps.

    Raises:
        CheckpointError: if there are checkpoints, but none of them is whole.
        Diverged: if the policy's log-probs are not finite.
    """
    config, data, books = run.config, run.data, run.bookkeeping
    with run.guard("save"):
        position = current_position(0, data.curriculum, data.generator)
        books.checkpoints.remove_leftovers()
        back_to = run.ranks.run_on_rank0(lambda: step_to_go_back_to(books.folder)) if resume else None
        checkpoint = books.checkpoints.newest_whole(back_to) if resume else None
        if checkpoint is not None:
            position = books.checkpoints.load(checkpoint, run.learner.policy)
            position = _restore_draws(run, queue, position, checkpoint)
        else:
            books.checkpoints.delete_after(position.step)
        if resume and run.ranks.is_rank0:
            _show_start(run, position, is_new=checkpoint is None, has_diverged=back_to is not None)
        logs = None if checkpoint is None else books.checkpoints.logs_at(checkpoint)
        # without a checkpoint nothing vouches for any row
        kept_step = -1 if checkpoint is None else position.step
        messages = run.ranks.raise_on_all_ranks(lambda: books.folder.rewind(kept_step, logs))
        for message in messages:
            books.display.line(message)
        books.folder.remove(DIVERGED)
        if not is_over(config.run, position):
            books.folder.remove(SUMMARY)  # it says that the run is finished
        run.rollout.cache.drop(position.step)
        books.folder.record_first_step(position.step + 1)
        watch = CollapseWatch(config.run, config.policy.updates_per_step)
        watch.replay(run.ranks.run_on_rank0(lambda: books.folder.read_rows("metrics")))
    with run.guard("sync"):
        try:
            run.rollout.sync.run()
        except Diverged as error:
            raise with_advice(error, run, position.good_step) from None
    return position, watch


def _show_start(run: Run, position: Position, *, is_new: bool, has_diverged: bool) -> None:
    """Says after which step a run goes on that is not new, and with which changed settings."""
    books = run.bookkeeping
    changed = books.folder.starts()[-1].get("changed", {})
    if is_new and not has_diverged:
        books.display.line(f"no checkpoint in {books.checkpoints.folder}: the run starts with step 1")
        return
    when = " before it diverged," if has_diverged else ""
    with_changes = f" with {describe(changed)}" if changed else ""
    books.display.line(
        f"resuming after step {position.step} of {run.config.run.steps}{when} in {books.folder.path}{with_changes}"
    )


def _restore_draws(run: Run, queue: RolloutQueue, position: Position, checkpoint: Path) -> Position:
    """Restores what draws the questions, and the steps that were sampled before.

    Returns: the position with these steps.

    Raises: CheckpointError if the checkpoint is not of these questions.
    """
    try:
        run.data.curriculum.load_state_dict(dict(position.curriculum))
        run.data.generator.set_state(position.generator)
        return replace(position, ahead=queue.restore(position.step, position.ahead))
    except (LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not fit this run ({first_line(error)}); restore its questions, or the "
            f"checkpoint"
        ) from error


def evaluate_if_due(run: Run, queue: RolloutQueue, position: Position) -> float | None:
    """Evaluates the current policy, if that is due, on every set whose scores are not yet in evaluations.jsonl.

    Returns: mean pass@1 over the sets; None if nothing was evaluated.
    """
    config, books, step = run.config, run.bookkeeping, position.step
    is_first_or_last = step == 0 or is_over(config.run, position)
    if not (run.data.evaluation_sets and (is_first_or_last or is_due(step, config.evaluation.every))):
        return None
    with run.guard("sync"):
        digests = run.ranks.run_on_rank0(lambda: _sets_to_evaluate(run, step))
    sets = {name: run.data.evaluation_sets[name] for name in digests}
    num_replies = sum(len(prompts) for prompts in sets.values()) * config.evaluation.num_samples
    if num_replies == 0:
        return None
    queue.give_engine()
    warnings: list[str | None] = []
    with run.guard("evaluation"), books.display.bar(f"evaluation after step {step}, replies", num_replies) as bar:
        result = evaluate(
            run.rollout.engine,
            run.rollout.verifier,
            sets,
            config.evaluation,
            config.rollout.max_new_tokens,
            config.run.seed,
            on_progress=bar.advance,
            on_scores=lambda name, scores, graded: warnings.append(
                set_advice(name, scores, first_unparsed(graded.rows), run.rollout.verifier.why_unparsed, config)
            ),
        )
    for warning in filter(None, warnings):
        books.display.line(warning)
    row = {"step": step, "reply_tokens": position.reply_tokens, **result, "question_digests": digests}
    books.folder.append("evaluations", row)
    pass_at_1 = [scores["pass_at"]["1"]["mean"] for scores in result["sets"].values()]
    return float(sum(pass_at_1) / len(pass_at_1))


def _sets_to_evaluate(run: Run, step: int) -> dict[str, str]:
    """The evaluation sets without scores of this step under the present settings, with their questions' digests."""
    folder, section = run.bookkeeping.folder, run.config.evaluation
    records = folder.read_object("data.json")["sets"]
    digests = {name: records[f"evaluation.sets.{name}"]["digest"] for name in run.data.evaluation_sets}
    present = {name: getattr(section, name) for name in ("num_samples", "temperature", "top_p")}
    rows = [row for row in folder.read_rows("evaluations") if row["step"] == step]
    # rows of earlier versions have no digests; their sets could not change
    recorded = [
        (name, row.get("question_digests", digests).get(name))
        for row in rows
        if row.get("sets") and all(row.get(setting) == value for setting, value in present.items())
        for name in row["sets"]
    ]
    return {name: digest for name, digest in digests.items() if (name, digest) not in recorded}


def save_checkpoint(run: Run, position: Position, score: float | None = None, *, is_required: bool = False) -> None:
    """Saves a checkpoint, then deletes the checkpoints and cached replies that are no longer needed.

    Args:
        position: the position of the run.
        score: of the policy, larger is better; None if it was not evaluated after this step.
        is_required: whether a failure ends the run; otherwise it is a warning.

    Raises: CheckpointError if the checkpoint is required and could not be written.
    """
    section, books = run.config.run, run.bookkeeping
    wait_for(run, position.ahead)
    with run.guard("save"):
        try:
            books.checkpoints.save(position, run.learner.policy, score)
            books.checkpoints.retain(
                section.keep_checkpoints,
                best=section.keep_best,
                good_step=position.good_step,
                scored_since=_scored_since(books.folder),
            )
            run.rollout.cache.drop(position.step)
        except CheckpointError as error:
            if is_required:
                raise CheckpointError(f"{error}; free some space, then continue with --resume") from None
            books.display.line(f"warning: {error}; free some space")


def _scored_since(folder: RunFolder) -> int:
    """The first step whose evaluation, and so its score, is of the present kind."""
    since, is_pending = 0, False
    for start in folder.starts():
        is_pending |= any(name.startswith("evaluation.") for name in start.get("changed", {}))
        if is_pending and "first_step" in start:  # without it, the start died before it took a step
            since, is_pending = start["first_step"], False
    return since


def stop(run: Run, position: Position, reason: str) -> None:
    """Saves a checkpoint, since the run was asked to stop.

    Args:
        run: the run.
        position: its position.
        reason: the signal or setting.

    Raises:
        CheckpointError: if the checkpoint could not be written.
        Interrupted, OutputError: as `raise_reason`, after saving.
    """
    save_checkpoint(run, position, is_required=True)
    text = f"stopped by {reason} after step {position.step}; continue with --resume"
    raise_reason(reason, text)
    run.bookkeeping.display.line(text)


def finish(run: Run, position: Position) -> None:
    """Writes the exported model, summary.json and the report, and prints the scores before and after training.

    Raises: FolderError on rank 0 if one of them could not be written.
    """
    config, folder, display = run.config, run.bookkeeping.folder, run.bookkeeping.display
    with run.guard("save"):
        export(run)
    if not run.ranks.is_rank0:
        return
    rows = [row for row in folder.read_rows("evaluations") if isinstance(row.get("sets"), dict)]
    evaluations, timed = evaluations_by_step(rows), folder.read_rows("metrics") + rows
    summary = {
        "seed": config.run.seed,
        "steps": position.step,
        "reply_tokens": position.reply_tokens,
        "commits": commits_of(folder.read_object(ENVIRONMENT)),
        "seconds": sum(row["seconds"] for row in timed if isinstance(row.get("seconds"), int | float)),
        "before": next((row["sets"] for row in evaluations if row["step"] == 0), {}),
        "after": evaluations[-1]["sets"] if evaluations else {},
    }
    folder.write_json(SUMMARY, summary)
    if evaluations:
        display.line(results_table(summary["before"], summary["after"]))
    if position.good_step < position.step - 1:
        display.line(
            f"warning: the run ends with updates that were skipped, or signs of collapse; the last step from which a "
            f"good one was taken is {position.good_step}"
        )
    try:
        report = write_report(folder.path)
    except OSError as error:
        raise FolderError(
            f"the run is finished, but its report cannot be written ({reason_of(error)}); make room, then run "
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

    if not run.ranks.is_rank0:
        policy.export(path)
        return
    with disk_errors(path, "free some space, then continue with --resume"):
        write_whole(path, write)
