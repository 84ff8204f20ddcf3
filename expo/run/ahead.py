"""Sampling while learning: with rollout.ahead = k, step t + k is sampled and graded while the policy learns step t.

Step t is sampled with the weights after step t - 1 - k, and the first k + 1 steps of a run with those it starts from:
the weights follow from the number of the step alone. A checkpoint after step t contains the replies of the steps t + 1
to t + k, whose weights are gone by then: a resumed run trains on the same replies as one that was never interrupted.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from expo.config import RunConfig
from expo.rewards.groups import GradedRollouts, Rollouts
from expo.rollout.packing import PackedReplies, pack_replies
from expo.rollout.weight_sync import StagedWeights
from expo.run.setup import Run, RunRollout
from expo.runtime.signals import StopSwitch
from expo.runtime.timer import PhaseTimer
from expo.types import Prompt, Verdict

CLOSE_S = 10.0  # for the thread to end

Sample = Callable[[RunRollout, Sequence[Prompt], int, RunConfig, Callable[[], Tensor], PhaseTimer], Rollouts]
"""Samples and grades the replies of a step: called with what samples, the prompts drawn, the step, the configuration, a
function that gives the log-probs of the probe under the weights that sample, and a timer."""


@dataclass(frozen=True)
class Sampled:
    """The graded replies of a step.

    seconds: of the phases rollout and reward; sync_difference, num_compared: of the weight sync before it, as in
    `WeightSync`.
    """

    rollouts: Rollouts
    seconds: Mapping[str, float]
    sync_difference: float | None
    num_compared: int | None


class StepRollouts:
    """The questions drawn for a step, and its replies, once they are sampled and graded.

    Args:
        step: its number.
        drawn: [n] int64, indices of the questions in the order of their use.
        weights_step: the step after which the policy had the weights that sample.
    """

    def __init__(self, step: int, drawn: Tensor, weights_step: int) -> None:
        self.step, self.drawn, self.weights_step = step, drawn, weights_step
        self.future: Future[Sampled] = Future()

    def wait(self) -> Sampled:
        """The replies. Raises: what ended sampling or grading, on every rank."""
        return self.future.result()

    def to_dict(self) -> dict[str, Any]:
        """The entry of a checkpoint: tensors and plain containers."""
        sampled = self.future.result()
        return {
            "step": self.step,
            "drawn": self.drawn,
            "weights_step": self.weights_step,
            "rounds": [_round_to_dict(graded) for graded in sampled.rollouts.rounds],
            "seconds": dict(sampled.seconds),
            "sync_difference": sampled.sync_difference,
            "num_compared": sampled.num_compared,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], train_set: Sequence[Prompt], size: int) -> "StepRollouts":
        """What `to_dict` wrote.

        Args:
            content: of the checkpoint.
            train_set: the run's questions.
            size: number of groups to train on.

        Raises: LookupError, TypeError or ValueError if it is something else.
        """
        found = cls(int(content["step"]), content["drawn"], int(content["weights_step"]))
        prompts = [train_set[index] for index in found.drawn.tolist()]
        rounds = []
        for entry in content["rounds"]:
            rounds.append(_round_from_dict(entry, prompts))
            prompts = prompts[len(rounds[-1].prompts) :]
        found.future.set_result(
            Sampled(Rollouts(rounds, size), content["seconds"], content["sync_difference"], content["num_compared"])
        )
        return found


class RolloutQueue:
    """The steps that are being sampled, each in its turn: in a thread of its own if rollout.ahead > 0, which has a
    process group of its own; otherwise when a step is taken.

    Args:
        run: the run; all its ranks make the same calls.
        sample: samples and grades a step.
    """

    def __init__(self, run: Run, sample: Sample) -> None:
        self._run, self._sample = run, sample
        self._ahead = run.config.rollout.ahead
        self._sync = run.rollout.sync
        self._pending: list[StepRollouts] = []
        self._last_started = 0
        self._weights_step = 0
        self._staged: StagedWeights | None = None  # the weights of `_weights_step`; None: the engine has them
        self._used: StagedWeights | None = None  # the last staged weights that the engine was given
        self._switch = StopSwitch()  # of the thread: a signal to the process must not end what a checkpoint needs
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        if self._ahead:
            group = run.ranks.new_group()
            self._thread = threading.Thread(target=self._work, args=(group,), name="rollouts", daemon=True)
            self._thread.start()

    def __enter__(self) -> "RolloutQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self, step: int, entries: Sequence[Mapping[str, Any]]) -> tuple[StepRollouts, ...]:
        """Goes on after a step, with the steps that its checkpoint contains, which are returned.

        Raises: LookupError, TypeError or ValueError if they are not those of this run.
        """
        size, train_set = self._run.config.rollout.questions_per_step, self._run.data.train_set
        self._pending = [StepRollouts.from_dict(entry, train_set, size) for entry in entries]
        found = [rollouts.step for rollouts in self._pending]
        if found != list(range(step + 1, step + 1 + len(found))) or len(found) > self._ahead:
            raise ValueError(f"replies of the steps {found}, after step {step} with rollout.ahead = {self._ahead}")
        self._weights_step, self._last_started = step, step + len(found)
        return self.pending()

    def unstarted(self, step: int) -> range:
        """The steps to start before `step` is taken."""
        end = max(step, min(step + self._ahead, self._run.config.run.steps))
        return range(max(self._last_started + 1, step), end + 1)

    def start(self, step: int, drawn: Tensor) -> None:
        """Has a step sampled with the policy's present weights, after the steps that were started before."""
        rollouts = StepRollouts(step, drawn, self._weights_step)
        self._pending.append(rollouts)
        self._last_started = step
        if self._thread is not None:
            staged = self._staged
            # computed here, if at all: the thread must not read the policy, which changes meanwhile
            logps = self._sync.policy_logps() if staged is None else staged.logps
            self._jobs.put(lambda: self._sample_in_thread(rollouts, staged, logps))

    def take(self, step: int, timer: PhaseTimer) -> StepRollouts:
        """The rollouts of the next step, once they are sampled and graded.

        Raises: what `sample` raises; SyncError if the engine does not hold the weights that should sample it.
        """
        rollouts = self._pending.pop(0)
        assert rollouts.step == step
        if self._thread is None:
            rollouts.future.set_result(self._sampled(self._run.rollout, rollouts, self._sync.policy_logps, timer))
        else:
            with timer.phase("rollout"):
                rollouts.wait()
        return rollouts

    def pending(self) -> tuple[StepRollouts, ...]:
        """The steps that were started and not taken."""
        return tuple(self._pending)

    def update_weights(self, step: int) -> None:
        """Has all further steps sampled with the weights after `step`, those that the policy has now.

        Raises: as `WeightSync.run`.
        """
        self._weights_step = step
        if self._thread is None:
            self._sync.run()
        else:
            self._staged = self._sync.stage()

    def sync_metrics(self, rollouts: StepRollouts) -> dict[str, Any]:
        """The entries of metrics.jsonl about the weights that sampled a step; `STEP_METRICS` describes them."""
        sampled = rollouts.wait()
        in_turns = self._thread is None
        return {
            "rollout_weights_age": rollouts.step - 1 - rollouts.weights_step,
            "sync_max_abs_dlogp": self._sync.largest_difference if in_turns else sampled.sync_difference,
            "sync_weights_compared": self._sync.num_compared if in_turns else sampled.num_compared,
            "seconds_sampling": sum(sampled.seconds.values()),
        }

    def give_engine(self) -> None:
        """Waits until all steps that were started are sampled, and gives the engine the policy's present weights."""
        wait_for(self._run, self._pending)
        if self._staged is not self._used:
            with self._run.guard("sync"):
                self._use(self._staged)

    def keep_only(self, needed: Sequence[StepRollouts]) -> None:
        """Waits for some of the steps, and ends the sampling of all others."""
        wait_for(self._run, needed)
        self.close()

    def close(self) -> None:
        """Ends the thread, and what it samples."""
        self._switch.request("the end of the run")
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_S)

    # --- in the thread

    def _work(self, group: Any) -> None:
        self._run.ranks.use_group(group)
        while (job := self._jobs.get()) is not None:
            job()

    def _sample_in_thread(self, rollouts: StepRollouts, staged: StagedWeights | None, logps: Tensor) -> None:
        try:
            self._switch.check()
            self._use(staged)
            rollout = replace(self._run.rollout, engine=self._run.rollout.engine.with_switch(self._switch))
            timer = PhaseTimer(waits_for_gpu=False)
            rollouts.future.set_result(self._sampled(rollout, rollouts, lambda: logps, timer))
        except BaseException as error:  # raised where the step is taken
            rollouts.future.set_exception(error)
            self._switch.request("an error in an earlier step")

    def _use(self, staged: StagedWeights | None) -> None:
        if staged is not None and staged is not self._used:
            self._sync.use(staged)
            self._used = staged

    def _sampled(
        self, rollout: RunRollout, rollouts: StepRollouts, probe_logps: Callable[[], Tensor], timer: PhaseTimer
    ) -> Sampled:
        prompts = [self._run.data.train_set[index] for index in rollouts.drawn.tolist()]
        found = self._sample(rollout, prompts, rollouts.step, self._run.config, probe_logps, timer)
        seconds = {name: timer.seconds_of(name) for name in ("rollout", "reward")}
        return Sampled(found, seconds, self._sync.largest_difference, self._sync.num_compared)


def wait_for(run: Run, steps: Sequence[StepRollouts]) -> None:
    """Waits until all these steps are sampled and graded. Raises: as `StepRollouts.wait`."""
    if steps:
        with run.guard("rollout"):
            for rollouts in steps:
                rollouts.wait()


def _round_to_dict(graded: GradedRollouts) -> dict[str, Any]:
    verdicts = [verdict for group in graded.verdicts for verdict in group]
    return {
        "replies": pack_replies(graded.replies).to_dict(),
        "kinds": [verdict.kind for verdict in verdicts],
        "answers": [verdict.answer for verdict in verdicts],
        "is_unevaluated": [verdict.is_unevaluated for verdict in verdicts],
        "shaped": graded.shaped,
        "reward_parts": dict(graded.reward_parts),
    }


def _round_from_dict(content: Mapping[str, Any], prompts: Sequence[Prompt]) -> GradedRollouts:
    replies = PackedReplies.from_dict(content["replies"]).unpack()
    columns = (content["kinds"], content["answers"], content["is_unevaluated"])
    verdicts = iter([Verdict(*values) for values in zip(*columns, strict=True)])
    used = prompts[: len(replies)]
    groups = [[next(verdicts) for _ in group] for group in replies]
    if len(used) != len(replies) or next(verdicts, None) is not None:
        raise ValueError(f"{len(content['kinds'])} verdicts on {len(replies)} groups of {len(prompts)} questions")
    return GradedRollouts(used, replies, groups, content["shaped"], content["reward_parts"])
