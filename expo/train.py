"""EXPO, top to bottom: `python -m expo.train [CONFIG.yaml] [--section.field=value ...]`.

Source: algorithm 1 of arXiv 2605.11403. A step draws questions by the curriculum's weights, samples a group of
replies to each, grades them, and takes gradient steps on the clipped surrogate with the accuracy-conditioned KL.
`--curriculum.kind=uniform --kl.rho=constant` is GRPO.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from expo.config import RunConfig, parse_command_line
from expo.errors import Diverged, StopRequested
from expo.learner.batch import MiniBatch
from expo.learner.policy import Policy
from expo.planning.plan import print_plan
from expo.rewards.groups import GradedRollouts, Rollouts, grade
from expo.rollout import GenerationRequest, Sampling, request_seed
from expo.run.advice import step_advice
from expo.run.ahead import RolloutQueue
from expo.run.bad_updates import BadUpdates
from expo.run.checkpoint import current_position, random_states
from expo.run.collapse import collapse_advice
from expo.run.divergence import end_if_collapsed, last_good_step, with_advice
from expo.run.lifecycle import evaluate_if_due, finish, resume_run, save_checkpoint, stop
from expo.run.metrics import curriculum_row, progress_note, step_row
from expo.run.schedule import is_due, is_over
from expo.run.setup import RunRollout, open_run
from expo.runtime.distributed import leave_ranks
from expo.runtime.endings import errors_on_one_line, run_and_exit
from expo.runtime.signals import raise_reason
from expo.runtime.timer import PhaseTimer
from expo.types import Prompt, Reply, Sample
from expo_kernels import CurriculumTable, akl_beta, group_advantages

PROGRAM = "python -m expo.train"


def train(config: RunConfig, resume: bool = False) -> Path:
    """Trains until the run is over or is asked to stop, and returns the run's folder.

    Every rank calls it. All ranks draw the same questions; each samples and grades its share of the replies, after
    which every rank holds all of them; each takes its share of every policy update.

    Args:
        config: of the run.
        resume: continue from the newest whole checkpoint in the run's folder, if there is one.

    Raises:
        ConfigError: if the run cannot start; before any model loads where that is possible.
        Diverged: if run.max_bad_updates updates in a row had a non-finite loss or gradient, or the policy's log-probs
            are not finite; Collapsed, a kind of it, if run.end_on_collapse is set and the policy has collapsed.
        CheckpointError: if the run is over, or was asked to stop, and its checkpoint could not be written.
        Interrupted: if Ctrl-C stopped the run, after a checkpoint was saved.
        OutputError: if the run was stopped since stdout could not be written, after a checkpoint was saved.
        FolderError: if a file in the run's folder could not be written.
        GoldError: if replies cannot be graded against a gold answer.
        GraderError: if the processes that grade cannot start.
        RewardError: if one of reward.functions failed.
        SyncError: if the rollout engine does not hold the policy's weights after a weight sync.
        EngineError: if a rollout engine in another process cannot continue.
    """
    with open_run(config, resume) as run, RolloutQueue(run, sample_rollouts) as queue:
        data, rollout, policy, books = run.data, run.rollout, run.learner.policy, run.bookkeeping
        position, watch = resume_run(run, queue, resume)
        try:
            evaluate_if_due(run, queue, position)
            with books.display.bar("step", config.run.steps, done=position.step) as bar:
                while not is_over(config.run, position):
                    step = position.step + 1
                    run.raise_if_stop_requested()
                    timer = PhaseTimer(run.guard)
                    with timer.phase("curriculum"):
                        for later in queue.unstarted(step):
                            queue.start(later, draw_questions(data.train_set, data.curriculum, data.generator, config))
                    taken = queue.take(step, timer)
                    rollouts = taken.wait().rollouts
                    sampled, kept = rollouts.sampled, rollouts.kept_groups
                    with timer.phase("curriculum"):
                        data.curriculum.update(taken.drawn[: len(sampled.prompts)], sampled.correct.mean(dim=1))
                    advantages = group_advantages(
                        kept.rewards.flatten(), config.rollout.group_size, scale=config.objective.advantage_scale
                    )
                    beta = akl_beta(sampled.correct, config.kl.beta, rho=config.kl.rho)
                    with timer.phase("reference"):
                        rollout.engine.sleep()
                        samples = training_samples(kept, advantages, mask_truncated=config.objective.mask_truncated)
                        mini_batches = policy.prepare(samples)
                    run.raise_if_stop_requested()
                    with timer.phase("update"):
                        updates, num_bad = update_policy(
                            policy, mini_batches, beta, step, books.bad_updates, position.bad_updates
                        )
                    with timer.phase("sync"):
                        queue.update_weights(step)

                    with run.guard("save"):
                        row = step_row(step, sampled, float(beta), updates, data.curriculum, timer)
                        row.update(rollouts.metrics(), **policy.mismatch(), **queue.sync_metrics(taken))
                        rollout_seconds = taken.wait().seconds["rollout"]
                        row.update(books.throughput.row(sampled, mini_batches, timer, rollout_seconds))
                        books.record_step(step, sampled, row, curriculum_row(step, data.curriculum))
                    watch.add(row)
                    position = current_position(
                        step,
                        data.curriculum,
                        data.generator,
                        ahead=queue.pending(),
                        bad_updates=num_bad,
                        reply_tokens=position.reply_tokens + sampled.num_tokens,
                        good_step=last_good_step(watch, step, num_bad, position.good_step),
                    )
                    bar.advance(note=progress_note(row, watch.signs))
                    advice = step_advice(row, sampled, rollout.verifier.why_unparsed, config)
                    for warning in filter(None, (advice, collapse_advice(step, watch, config))):
                        books.display.line(warning)
                    end_if_collapsed(run, watch, step)
                    score = evaluate_if_due(run, queue, position)
                    position = replace(position, random=random_states())  # an evaluation may draw random numbers
                    if is_due(step, config.run.checkpoint_every) or is_over(config.run, position):
                        save_checkpoint(run, position, score, is_required=is_over(config.run, position))
        except StopRequested as request:
            queue.keep_only(position.ahead)
            stop(run, position, str(request))
        except Diverged as error:
            raise with_advice(error, run, position.good_step) from None
        else:
            finish(run, position)
            raise_reason(run.switch.reason, f"the run is finished; its results are in {books.folder.path}")
    return books.folder.path


def draw_questions(
    train_set: Sequence[Prompt], curriculum: CurriculumTable, generator: torch.Generator, config: RunConfig
) -> Tensor:
    """Indices of the step's questions without repetition, in the order of their use: [questions_per_step] int64, and
    as many again for each resampling round. They are drawn by the curriculum's weights (paper eq. 7), or uniformly.
    """
    section = config.rollout
    count = min(section.questions_per_step * (1 + section.max_resamples), len(train_set))
    if config.curriculum.kind == "uniform":
        return torch.randperm(len(train_set), generator=generator)[:count]
    return curriculum.sample(count, generator=generator)


def sample_rollouts(
    rollout: RunRollout,
    prompts: Sequence[Prompt],
    step: int,
    config: RunConfig,
    probe_logps: Callable[[], Tensor],
    timer: PhaseTimer,
) -> Rollouts:
    """Graded groups of the first questions_per_step prompts; then, for up to max_resamples rounds, groups of the next
    prompts in place of those whose rewards are all equal.

    `probe_logps`: the log-probs of the probe under the weights that sample, by which cached replies are recognised.
    """
    section = config.rollout
    rollouts, missing = Rollouts([], section.questions_per_step), section.questions_per_step
    while missing and len(prompts) and len(rollouts.rounds) <= section.max_resamples:
        current, prompts = prompts[:missing], prompts[missing:]
        with timer.phase("rollout"):
            replies = sample_replies(rollout, current, step, len(rollouts.rounds), config, probe_logps)
        with timer.phase("reward"):
            graded = rollout.reward_composer.shape(grade(rollout.verifier, current, replies))
        rollouts = replace(rollouts, rounds=[*rollouts.rounds, graded])
        missing = rollouts.num_missing
    return rollouts


def sample_replies(
    rollout: RunRollout,
    prompts: Sequence[Prompt],
    step: int,
    round_index: int,
    config: RunConfig,
    probe_logps: Callable[[], Tensor],
) -> list[list[Reply]]:
    """group_size replies to each prompt, from the cache if the run sampled them before it was interrupted.

    The seed of a reply depends on run seed, step, question id and sample number alone.
    """
    requests = []
    for prompt in prompts:
        key = (config.run.seed, "rollout", step, prompt.question.id)
        seeds = [request_seed(*key, sample) for sample in range(config.rollout.group_size)]
        requests.append(GenerationRequest(prompt.prompt_ids, seeds))
    sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens)
    ids = [prompt.question.id for prompt in prompts]
    return rollout.cache.replies(
        step, round_index, ids, probe_logps, lambda: rollout.engine.generate(requests, sampling)
    )


def training_samples(graded: GradedRollouts, advantages: Tensor, *, mask_truncated: bool) -> list[Sample]:
    """One sample for each reply, question after question; truncated replies are left out if `mask_truncated`."""
    value = iter(advantages.tolist())
    return [
        Sample(prompt.prompt_ids, reply.token_ids, reply.logps, next(value), mask_truncated and reply.is_truncated)
        for prompt, group in zip(graded.prompts, graded.replies, strict=True)
        for reply in group
    ]


def update_policy(
    policy: Policy,
    mini_batches: Sequence[MiniBatch],
    beta: Tensor,
    step: int,
    bad_updates: BadUpdates,
    num_bad: int,
) -> tuple[list[dict[str, float]], int]:
    """Takes one optimizer step for each mini-batch.

    Args:
        num_bad: consecutive updates skipped before this step.

    Returns: the metrics of each update, and the number of consecutive updates skipped up to now.

    Raises: Diverged if run.max_bad_updates updates in a row were skipped.
    """
    updates = []
    for index, mini_batch in enumerate(mini_batches):
        updates.append(policy.update(mini_batch, beta))
        num_bad = num_bad + 1 if updates[-1]["skipped"] else 0
        if num_bad:
            bad_updates.keep(step, index, mini_batch, beta, updates[-1], num_bad)
    return updates, num_bad


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`. An error is one line on stderr.

    Exit codes: 0 if the run ended well or was asked to stop, 1 if it could not continue, 2 if it could not start, 3 if
    the policy collapsed, 75 if a phase exceeded its deadline, 130 after Ctrl-C.
    """
    with errors_on_one_line(prog):
        invocation = parse_command_line(sys.argv[1:] if argv is None else argv, prog)
        if invocation.dry_run:
            return print_plan(invocation)
        train(invocation.config, invocation.resume)
    leave_ranks()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
