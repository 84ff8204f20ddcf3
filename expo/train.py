"""EXPO, top to bottom: `python -m expo.train [CONFIG.yaml] [--section.field=value ...]`.

Source: algorithm 1 of arXiv 2605.11403. A step draws questions by the curriculum's weights, samples a group of
replies to each, grades them, and takes gradient steps on the clipped surrogate with the accuracy-conditioned KL.
`--curriculum.kind=uniform --kl.rho=constant` is GRPO.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo.config import RunConfig, parse_command_line
from expo.errors import CheckpointError, Diverged, ExpoError, StopRequested
from expo.evaluate import evaluate
from expo.learner.mini_batch import MiniBatch
from expo.planning.plan import print_plan
from expo.report import write_report
from expo.reporting.reader import commits_of, results_table
from expo.rewards.graded import GradedRollouts, grade
from expo.rewards.groups import Rollouts
from expo.rollout import GenerationRequest, Sampling, request_seed
from expo.run.checkpoint import Position, random_states
from expo.run.environment import ENVIRONMENT
from expo.run.metrics import curriculum_row, progress_note, step_row
from expo.run.setup import Parts, open_run
from expo.runtime.atomic_io import write_whole
from expo.runtime.cli import fail
from expo.runtime.distributed import leave_ranks
from expo.runtime.timer import PhaseTimer
from expo.types import Prompt, Reply, Sample
from expo_kernels import akl_beta, group_advantages

PROGRAM = "python -m expo.train"


def train(config: RunConfig, resume: bool = False) -> Path:
    """Runs `config` to its end, or until it is asked to stop, and returns the run's folder.

    Every rank of the run calls it. Each draws the same questions, samples and grades its share of the replies, and
    after that holds all of them; the policy's update is shared out again.

    Args:
        config: the whole run.
        resume: go on from the newest whole checkpoint in the run's folder, if it has one.

    Raises:
        ConfigError: if the run cannot be, found before any model loads where that is possible.
        Diverged: if run.max_bad_updates updates in a row had a loss or gradient that was not finite.
        CheckpointError: if the run was to end and its state could not be written.
        GoldError: if a gold answer turned out to be one that replies cannot be graded against.
        RewardError: if one of reward.functions failed.
        SyncError: if the rollout engine's weights turned out not to be the policy's.
        EngineError: if a rollout engine in another process cannot go on.
    """
    with open_run(config, resume) as parts:
        position = resume_run(parts, resume)
        try:
            evaluate_if_due(parts, position)
            with parts.display.bar("step", config.run.steps, done=position.step) as bar:
                while not is_over(config, position):
                    step = position.step + 1
                    raise_if_stop_requested(parts)
                    timer = PhaseTimer(parts.guard)
                    with timer.phase("curriculum"):
                        drawn = draw_questions(parts)
                    rollouts = roll_out(parts, step, drawn, timer)
                    sampled, kept = rollouts.sampled, rollouts.kept_groups
                    with timer.phase("curriculum"):
                        parts.curriculum.update(drawn[: len(sampled.prompts)], sampled.correct.mean(dim=1))
                    advantages = group_advantages(
                        kept.rewards.flatten(), config.rollout.group_size, scale=config.objective.advantage_scale
                    )
                    beta = akl_beta(sampled.correct, config.kl.beta, rho=config.kl.rho)
                    with timer.phase("reference"):
                        parts.engine.sleep()
                        samples = training_samples(kept, advantages, mask_truncated=config.objective.mask_truncated)
                        mini_batches = parts.policy.prepare(samples)
                    raise_if_stop_requested(parts)
                    with timer.phase("update"):
                        updates, bad_updates = update_policy(parts, step, mini_batches, beta, position.bad_updates)
                    with timer.phase("sync"):
                        difference = parts.sync.run()

                    reply_tokens = position.reply_tokens + sampled.num_tokens
                    position = position_after(parts, step, bad_updates, reply_tokens)
                    with parts.guard("save"):
                        row = step_row(step, sampled, float(beta), updates, parts.curriculum, timer)
                        row.update(rollouts.metrics(), **parts.policy.mismatch())
                        row.update(sync_max_abs_dlogp=difference, sync_weights_compared=parts.sync.num_compared)
                        row.update(parts.throughput.row(sampled, mini_batches, timer))
                        record(parts, step, sampled, row)
                    bar.advance(note=progress_note(row))
                    score = evaluate_if_due(parts, position)
                    position = replace(position, random=random_states())  # evaluating may have drawn some
                    if is_due(step, config.run.checkpoint_every) or is_over(config, position):
                        save(parts, position, score)
        except StopRequested as request:
            save(parts, position, must=True)
            parts.display.line(f"stopped by {request} after step {position.step}; go on with --resume")
        else:
            finish(parts, position)
    return parts.folder.path


def draw_questions(parts: Parts) -> Tensor:
    """Indices of this step's questions, none twice (paper eq. 7; or all alike), in the order in which they are asked:
    [questions_per_step], and as many for each round that may replace groups.
    """
    section = parts.config.rollout
    count = min(section.questions_per_step * (1 + section.max_resamples), len(parts.train_set))
    if parts.config.curriculum.kind == "uniform":
        return torch.randperm(len(parts.train_set), generator=parts.generator)[:count]
    return parts.curriculum.sample(count, generator=parts.generator)


def roll_out(parts: Parts, step: int, drawn: Tensor, timer: PhaseTimer) -> Rollouts:
    """Graded groups of the first questions drawn; then, for rollout.max_resamples rounds at most, of as many of the
    next ones as there are groups still missing that teach something.
    """
    section = parts.config.rollout
    rollouts, missing = Rollouts([], section.questions_per_step), section.questions_per_step
    while missing and len(drawn) and len(rollouts.rounds) <= section.max_resamples:
        questions, drawn = drawn[:missing], drawn[missing:]
        with timer.phase("rollout"):
            prompts, replies = sample_replies(parts, step, len(rollouts.rounds), questions)
        with timer.phase("reward"):
            graded = parts.reward_composer.shape(grade(parts.verifier, prompts, replies))
        rollouts = replace(rollouts, rounds=[*rollouts.rounds, graded])
        missing = rollouts.num_missing
    return rollouts


def sample_replies(parts: Parts, step: int, round_index: int, drawn: Tensor) -> tuple[list[Prompt], list[list[Reply]]]:
    """Drawn questions and group_size replies to each; seeds follow from run, step, question and sample alone.

    What the run had sampled in this very place before it died is not sampled again.
    """
    config = parts.config
    prompts = [parts.train_set[index] for index in drawn.tolist()]
    requests = []
    for prompt in prompts:
        key = (config.run.seed, "rollout", step, prompt.question.id)
        seeds = [request_seed(*key, sample) for sample in range(config.rollout.group_size)]
        requests.append(GenerationRequest(prompt.prompt_ids, seeds))
    sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens)
    ids = [prompt.question.id for prompt in prompts]
    return prompts, parts.cache.replies(step, round_index, ids, lambda: parts.engine.generate(requests, sampling))


def training_samples(graded: GradedRollouts, advantages: Tensor, *, mask_truncated: bool) -> list[Sample]:
    """Every reply with its prompt and its advantage, question after question; truncated ones left out if so asked."""
    value = iter(advantages.tolist())
    return [
        Sample(prompt.prompt_ids, reply.token_ids, reply.logps, next(value), mask_truncated and reply.is_truncated)
        for prompt, group in zip(graded.prompts, graded.replies, strict=True)
        for reply in group
    ]


def is_over(config: RunConfig, position: Position) -> bool:
    """Whether the run has taken all its steps, or sampled all the tokens it may."""
    budget = config.run.reply_tokens
    return position.step >= config.run.steps or (budget is not None and position.reply_tokens >= budget)


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is done after this one."""
    return every > 0 and step % every == 0


def raise_if_stop_requested(parts: Parts) -> None:
    """Raises StopRequested on every rank if one of them has been asked to stop."""
    with parts.guard("sync"):
        reasons = [reason for reason in parts.ranks.gather(parts.switch.reason) if reason is not None]
    if reasons:
        raise StopRequested(reasons[0])


def update_policy(
    parts: Parts, step: int, mini_batches: Sequence[MiniBatch], beta: Tensor, bad_updates: int
) -> tuple[list[dict[str, float]], int]:
    """The metrics of each optimizer step, and how many have been skipped in a row up to now.

    Raises: Diverged when run.max_bad_updates have been.
    """
    updates = []
    for index, mini_batch in enumerate(mini_batches):
        updates.append(parts.policy.update(mini_batch, beta))
        if not updates[-1]["skipped"]:
            bad_updates = 0
            continue
        bad_updates += 1
        name = f"bad_updates/step-{step:06d}-update-{index}-rank-{parts.ranks.rank}.pt"
        path = parts.folder.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {"micro_batches": [asdict(micro) for micro in mini_batch.micro_batches], "beta": beta, **updates[-1]}
        write_whole(path, functools.partial(torch.save, held))
        parts.display.line(f"step {step}, update {index}: the gradient is not finite; skipped, its batch is in {path}")
        if bad_updates >= parts.config.run.max_bad_updates:
            raise Diverged(
                f"{bad_updates} updates in a row had a loss or gradient that was not finite, the last at step {step}: "
                f"{updates[-1]}; their batches are in {path.parent}. Look at them, lower optimizer.lr, and go on from "
                f"the last checkpoint with --resume"
            )
    return updates, bad_updates


def record(parts: Parts, step: int, graded: GradedRollouts, row: Mapping[str, Any]) -> None:
    """Writes down a step: its metrics, some of its replies, and where the curriculum stands."""
    kept = graded.rows()[: parts.config.run.completions_per_step]
    parts.folder.append("completions", *({"step": step, **row} for row in kept))
    parts.folder.append("curriculum", curriculum_row(step, parts.curriculum))
    parts.folder.append("metrics", row)
    for tracker in parts.trackers:
        tracker.log(step, row)


def evaluate_if_due(parts: Parts, position: Position) -> float | None:
    """Evaluates every set with the present policy, if that is due here and not in evaluations.jsonl yet.

    Returns: mean pass@1 over the sets; None if nothing was evaluated.
    """
    config, sets, step = parts.config, parts.evaluation_sets, position.step
    total = sum(len(prompts) for prompts in sets.values()) * config.evaluation.num_samples
    is_edge = step == 0 or is_over(config, position)
    if total == 0 or not (is_edge or is_due(step, config.evaluation.every)):
        return None
    with parts.guard("sync"):
        is_known = parts.ranks.run_on_rank0(
            lambda: step in [row["step"] for row in parts.folder.read_rows("evaluations")]
        )
    if is_known:
        return None
    with parts.guard("evaluation"), parts.display.bar(f"evaluation after step {step}, replies", total) as bar:
        result = evaluate(
            parts.engine,
            parts.verifier,
            sets,
            config.evaluation,
            config.rollout.max_new_tokens,
            config.run.seed,
            on_progress=bar.advance,
        )
    parts.folder.append("evaluations", {"step": step, "reply_tokens": position.reply_tokens, **result})
    first = [found["pass_at"]["1"]["mean"] for found in result["sets"].values()]
    return float(sum(first) / len(first))


def position_after(parts: Parts, step: int, bad_updates: int = 0, reply_tokens: int = 0) -> Position:
    """What the next step reads besides the policy, as it stands now."""
    return Position(
        step,
        parts.curriculum.state_dict(),
        parts.generator.get_state(),
        bad_updates,
        reply_tokens,
        random_states(),
    )


def save(parts: Parts, position: Position, score: float | None = None, *, must: bool = False) -> None:
    """Writes a checkpoint and deletes those that need not be kept, and the replies before it; unless it `must`, a
    failure is only reported.
    """
    with parts.guard("save"):
        try:
            parts.checkpoints.save(position, parts.policy, score)
            parts.checkpoints.retain(parts.config.run.keep_checkpoints, best=parts.config.run.keep_best)
            parts.cache.drop(position.step)
        except CheckpointError as error:
            if must:
                raise
            parts.display.line(f"warning: {error}; free some space")


def resume_run(parts: Parts, resume: bool) -> Position:
    """Where the run stands: after the newest whole checkpoint, if it is to resume and there is one, or at its start."""
    with parts.guard("save"):
        position = position_after(parts, step=0)
        parts.checkpoints.tidy()
        found = parts.checkpoints.newest_whole() if resume else None
        if found is not None:
            position = parts.checkpoints.load(found, parts.policy)
            parts.curriculum.load_state_dict(dict(position.curriculum))
            parts.generator.set_state(position.generator)
            parts.display.line(
                f"going on after step {position.step} of {parts.config.run.steps} in {parts.folder.path}"
            )
        parts.folder.rewind(position.step)
        parts.cache.drop(position.step)
        parts.folder.record_start(position.step + 1, parts.ranks.size)
    with parts.guard("sync"):
        parts.sync.run()
    return position


def finish(parts: Parts, position: Position) -> None:
    """The exported model, summary.json, the report, and the table of before and after."""
    folder, config = parts.folder, parts.config
    with parts.guard("save"):
        export(parts)
    if not parts.ranks.is_rank0:
        return
    evaluations = folder.read_rows("evaluations")
    summary = {
        "seed": config.run.seed,
        "steps": position.step,
        "reply_tokens": position.reply_tokens,
        "commits": commits_of(folder.read_json(ENVIRONMENT)),
        "seconds": sum(row["seconds"] for row in folder.read_rows("metrics") + evaluations),
        "before": evaluations[0]["sets"] if evaluations else {},
        "after": evaluations[-1]["sets"] if evaluations else {},
    }
    folder.write_json("summary.json", summary)
    if evaluations:
        parts.display.line(results_table(summary["before"], summary["after"]))
    parts.display.line(f"run:    {folder.path}\nreport: {write_report(folder.path)}")


def export(parts: Parts) -> None:
    """Writes the policy as a transformers folder; every rank takes part, rank 0 writes."""

    def write(path: Path) -> None:
        parts.policy.export(path)
        parts.tokenizer.save_pretrained(path)

    if parts.ranks.is_rank0:
        write_whole(parts.folder.path / "export", write)
    else:
        parts.policy.export(parts.folder.path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when the run has ended well, 1 when it could not go on, 2 when it cannot be.

    What is wrong is one line on stderr. 75 is the exit code of a phase that outlasted its deadline.
    """
    invocation = parse_command_line(sys.argv[1:] if argv is None else argv, PROGRAM)
    try:
        if invocation.dry_run:
            return print_plan(invocation)
        train(invocation.config, invocation.resume)
    except ExpoError as error:
        fail(PROGRAM, error)
    leave_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
