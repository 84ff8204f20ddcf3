"""Builds a run from its configuration: the objects that the algorithm in train.py uses.

Every error that can be found without loading a model is raised before one loads.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from expo.config import RunConfig
from expo.data.record import require_same_questions
from expo.errors import StopRequested
from expo.learner.policy import DeepSpeedPolicy, Policy
from expo.rewards.build import build_verifier
from expo.rewards.compose import RewardComposer
from expo.rewards.groups import GradedRollouts
from expo.rollout import request_seed
from expo.rollout.build import build_engine
from expo.rollout.cache import ReplyCache
from expo.rollout.data_parallel import DataParallelEngine, DataParallelVerifier
from expo.rollout.weight_sync import WeightSync, make_probe
from expo.run.bad_updates import BadUpdates
from expo.run.changes import SAMPLING
from expo.run.checkpoint import Checkpoints
from expo.run.folder import RunFolder, fixed_digest, open_folder, settings_digest, write_start
from expo.run.inputs import Inputs, load_inputs, record_data
from expo.run.rank_inputs import require_same_inputs, require_same_settings
from expo.run.throughput import Throughput
from expo.run.trackers import Tracker, open_trackers
from expo.runtime.console import Display
from expo.runtime.distributed import Ranks, join_ranks
from expo.runtime.extension_locks import remove_abandoned_locks
from expo.runtime.signals import CLOSED_STDOUT, StopSwitch
from expo.runtime.watchdog import Watchdog
from expo.types import Prompt
from expo_kernels import CurriculumTable


@dataclass(frozen=True)
class RunData:
    """The questions of a run with their prompts, and the curriculum that draws from them.

    generator: the random state of the draws.
    """

    train_set: list[Prompt]
    evaluation_sets: dict[str, list[Prompt]]
    curriculum: CurriculumTable
    generator: torch.Generator


@dataclass(frozen=True)
class RunRollout:
    """What samples replies and rewards them."""

    engine: DataParallelEngine
    sync: WeightSync
    cache: ReplyCache
    verifier: DataParallelVerifier
    reward_composer: RewardComposer


@dataclass(frozen=True)
class RunLearner:
    """The policy under training and its tokenizer."""

    policy: Policy
    tokenizer: Any


@dataclass(frozen=True)
class RunBookkeeping:
    """What records a run: its files, checkpoints, trackers and console.

    completions_per_step: replies of each step that are written to completions.jsonl.
    """

    folder: RunFolder
    checkpoints: Checkpoints
    bad_updates: BadUpdates
    display: Display
    trackers: list[Tracker]
    throughput: Throughput
    completions_per_step: int

    def record_step(
        self, step: int, graded: GradedRollouts, row: Mapping[str, Any], curriculum_row: Mapping[str, Any]
    ) -> None:
        """Appends a step to completions.jsonl, curriculum.jsonl and metrics.jsonl, and logs it to the trackers."""
        completions = graded.rows()[: self.completions_per_step]
        self.folder.append("completions", *({"step": step, **completion} for completion in completions))
        self.folder.append("curriculum", curriculum_row)
        self.folder.append("metrics", row)
        for tracker in self.trackers:
            tracker.log(step, row)


@dataclass(frozen=True)
class Run:
    """The objects of a run, by their role; each can be replaced by another one with the same interface."""

    config: RunConfig
    ranks: Ranks
    watchdog: Watchdog
    switch: StopSwitch
    data: RunData
    rollout: RunRollout
    learner: RunLearner
    bookkeeping: RunBookkeeping

    def guard(self, phase: str) -> AbstractContextManager[None]:
        """A context that must end within `deadline.<phase>` seconds; without that field there is no deadline."""
        seconds = getattr(self.config.deadline, phase, None)
        return nullcontext() if seconds is None else self.watchdog.phase(phase, seconds)

    def raise_if_stop_requested(self) -> None:
        """Raises StopRequested on every rank if one of them has been asked to stop."""
        with self.guard("sync"):
            reasons = [reason for reason in self.ranks.gather(self.switch.reason) if reason is not None]
        if reasons:
            raise StopRequested(reasons[0])


@contextmanager
def open_run(config: RunConfig, resume: bool) -> Iterator[Run]:
    """Builds a run. Inside the context, signals request a stop, and every phase has a deadline.

    Raises:
        ConfigError: if the run cannot start; before any model loads where that is possible.
        FolderError: if a file in the run's folder cannot be written.
    """
    watchdog = Watchdog(int(os.environ.get("RANK", "0")))
    switch = StopSwitch(config.run.save_by_minutes, "the run saves a checkpoint as soon as it can, and ends")
    with ExitStack() as stack:
        with watchdog.phase("start", config.deadline.start):
            timeout = max(config.deadline.model_dump().values())
            ranks = join_ranks(config.run.device, timeout, watchdog.watch_ranks)
            # only now: before the ranks have joined there is nothing to save, and a signal should end the process
            stack.enter_context(switch.listening())
            if config.run.end_with_launcher:
                switch.end_with_parent()
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the others go on once it has exchanged its settings
                remove_abandoned_locks()
            require_same_settings(config, ranks, resume=resume)
            inputs = ranks.raise_on_all_ranks(lambda: load_inputs(config, ranks.size))
            require_same_inputs(inputs.sets, inputs.prompts, inputs.model_files, ranks)
            folder, changed = open_folder(config, resume, ranks)
            stack.callback(folder.release)
            watchdog.folder = folder.path
            ranks.run_on_rank0(lambda: require_same_questions(folder.path / "data.json", inputs.sets))
            for message in ranks.raise_on_all_ranks(lambda: write_start(folder, config, ranks.size, changed)):
                Display(is_shown=ranks.is_rank0).line(message)
            run = _build_run(config, inputs, folder, ranks, watchdog, switch, resume)
        try:
            yield run
        finally:
            run.rollout.engine.close()
            run.rollout.verifier.close()
            for tracker in run.bookkeeping.trackers:
                tracker.close()


def _build_run(
    config: RunConfig,
    inputs: Inputs,
    folder: RunFolder,
    ranks: Ranks,
    watchdog: Watchdog,
    switch: StopSwitch,
    resume: bool,
) -> Run:
    """Loads the policy and its reference, and builds all else; sets PyTorch's number of threads."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    display = Display(is_shown=ranks.is_rank0, on_closed=lambda _: switch.request(CLOSED_STDOUT))
    policy = DeepSpeedPolicy(config, ranks)
    record_data(inputs, folder, display)
    earlier_hash = ranks.run_on_rank0(lambda: settings_digest(config, folder.starts()))
    engine = build_engine(config, policy, ranks, switch, display, folder.path)
    rollout = _build_rollout(config, inputs, engine, policy, ranks, folder, display)
    trackers = open_trackers(config.run.trackers, folder.path, config, resume) if ranks.is_rank0 else []
    return Run(
        config=config,
        ranks=ranks,
        watchdog=watchdog,
        switch=switch,
        data=RunData(
            train_set=inputs.train_set,
            evaluation_sets=inputs.evaluation_sets,
            curriculum=_build_curriculum(config, len(inputs.train_set)),
            generator=torch.Generator().manual_seed(request_seed(config.run.seed, "questions")),
        ),
        rollout=rollout,
        learner=RunLearner(policy, policy.tokenizer),
        bookkeeping=RunBookkeeping(
            folder=folder,
            checkpoints=Checkpoints(
                folder.path / "checkpoints", ranks, fixed_digest(config), folder.flush_logs, earlier_hash
            ),
            bad_updates=BadUpdates(folder.path, ranks, display, config.run.max_bad_updates),
            display=display,
            trackers=trackers,
            throughput=Throughput(config, policy.model.config, ranks),
            completions_per_step=config.run.completions_per_step,
        ),
    )


def _build_rollout(
    config: RunConfig,
    inputs: Inputs,
    engine: DataParallelEngine,
    policy: DeepSpeedPolicy,
    ranks: Ranks,
    folder: RunFolder,
    display: Display,
) -> RunRollout:
    probe = make_probe([prompt.prompt_ids for prompt in inputs.train_set], config.max_tokens)
    sync = WeightSync(engine, policy, ranks, probe, config.rollout.temperature, config.rollout.sync_tolerance)
    some_prompt = policy.tokenizer.decode(inputs.train_set[0].prompt_ids)
    cache = ReplyCache(
        folder.path / "rollouts",
        ranks,
        fixed_digest(config, also=SAMPLING),
        display.line,
        is_on=config.rollout.keep_replies,
    )
    return RunRollout(
        engine=engine,
        sync=sync,
        cache=cache,
        verifier=DataParallelVerifier(build_verifier(config.reward, some_prompt), ranks),
        reward_composer=RewardComposer(config.reward, config.rollout.max_new_tokens, inputs.reward_functions, ranks),
    )


def _build_curriculum(config: RunConfig, num_questions: int) -> CurriculumTable:
    section = config.curriculum
    return CurriculumTable(
        num_questions,
        mean=section.mean,
        std=section.std,
        momentum=section.momentum,
        initial_pass_rate=section.initial_pass_rate,
        estimate=section.estimate,
        group_size=config.rollout.group_size,
        device="cpu",
    )
