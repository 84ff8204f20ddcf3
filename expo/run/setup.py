"""A run put together from its configuration: inputs, folder, and the parts that the algorithm in train.py moves.

Whatever can be found wrong without loading a model is found before one loads.
"""

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expo.config import RunConfig, changed_settings, load_config
from expo.data import (
    Overlap,
    QuestionSet,
    find_overlap,
    load_questions,
    only_gradable,
    render_prompts,
    render_whole_set,
)
from expo.data.record import require_same_questions, set_lines, set_record
from expo.errors import ConfigError
from expo.learner.model import check_model_path, load_tokenizer
from expo.learner.policy import DeepSpeedPolicy, Policy
from expo.rewards.compose import RewardComposer, RewardFunction, load_reward_functions
from expo.rewards.verifier import Verifier
from expo.rollout import request_seed
from expo.rollout.build import build_engine
from expo.rollout.cache import ReplyCache
from expo.rollout.data_parallel import DataParallelEngine, DataParallelVerifier
from expo.rollout.vllm.common import check_vllm
from expo.rollout.weight_sync import WeightSync, make_probe
from expo.run.checkpoint import Checkpoints
from expo.run.folder import RunFolder
from expo.run.throughput import Throughput
from expo.run.trackers import Tracker, check_trackers, open_trackers
from expo.runtime.console import Display
from expo.runtime.distributed import Ranks, join_ranks
from expo.runtime.signals import StopSwitch
from expo.runtime.watchdog import Watchdog
from expo.types import Prompt
from expo_kernels import CurriculumTable

RUNS = Path("runs")
MAY_CHANGE_ON_RESUME = (
    "run.dir",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.keep_best",
    "run.save_by_minutes",
    "run.completions_per_step",
    "run.max_bad_updates",
    "run.trackers",
    "rollout.keep_replies",
    "vllm.servers",
    "vllm.gpus",
    "vllm.transfer",
    "vllm.weights_folder",
    "vllm.patience_s",
)


@dataclass(frozen=True)
class Inputs:
    """What is read before any model loads: training questions, evaluation sets and reward functions by name, what the
    questions of both share, and their prompts.
    """

    train: QuestionSet
    evaluation: dict[str, QuestionSet]
    train_set: list[Prompt]
    evaluation_sets: dict[str, list[Prompt]]
    overlap: Overlap
    reward_functions: dict[str, RewardFunction]

    @property
    def sets(self) -> dict[str, QuestionSet]:
        """All of them by the field that names them."""
        return {"data.train": self.train, **{f"evaluation.sets.{name}": q for name, q in self.evaluation.items()}}


@dataclass(frozen=True)
class Parts:
    """The objects of a run; each can be replaced by another of the same interface."""

    config: RunConfig
    ranks: Ranks
    policy: Policy
    engine: DataParallelEngine
    sync: WeightSync
    cache: ReplyCache
    verifier: DataParallelVerifier
    reward_composer: RewardComposer
    curriculum: CurriculumTable
    generator: torch.Generator  # draws questions
    train_set: list[Prompt]
    evaluation_sets: dict[str, list[Prompt]]
    tokenizer: Any
    folder: RunFolder
    checkpoints: Checkpoints
    display: Display
    trackers: list[Tracker]
    throughput: Throughput
    watchdog: Watchdog
    switch: StopSwitch

    def guard(self, phase: str) -> AbstractContextManager[None]:
        """The watchdog's eye on a phase that `config.deadline` names."""
        seconds = getattr(self.config.deadline, phase, None)
        return nullcontext() if seconds is None else self.watchdog.phase(phase, seconds)


@contextmanager
def open_run(config: RunConfig, resume: bool) -> Iterator[Parts]:
    """A run's parts, ready to move; inside, signals to stop are noted, and every wait has its deadline.

    Raises: ConfigError if the run cannot be, found before any model loads where that is possible.
    """
    watchdog, switch = Watchdog(int(os.environ.get("RANK", "0"))), StopSwitch(config.run.save_by_minutes)
    with ExitStack() as stack:
        with watchdog.phase("start", config.deadline.start):
            ranks = join_ranks(config.run.device, max(config.deadline.model_dump().values()))
            # not before: a process that waits for others has nothing to save, and can only die of the signal
            stack.enter_context(switch.listening())
            watchdog.siblings = _processes_here(ranks)
            inputs = ranks.raise_on_all_ranks(lambda: load_inputs(config))
            folder = open_folder(config, resume, ranks)
            watchdog.folder = folder.path
            ranks.run_on_rank0(lambda: require_same_questions(folder.path / "data.json", inputs.sets))
            parts = _build_parts(config, inputs, folder, ranks, watchdog, switch, resume)
        try:
            yield parts
        finally:
            parts.engine.close()
            parts.verifier.close()
            for tracker in parts.trackers:
                tracker.close()
            folder.release()


def _processes_here(ranks: Ranks) -> list[int]:
    """Process ids of the ranks that this process can signal: in its machine, and in its container."""
    here = [socket.gethostname()]
    with suppress(OSError):  # Linux alone has these; host names of containers may be alike
        here += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return [process for place, process in ranks.gather((here, os.getpid())) if place == here]


def load_inputs(config: RunConfig) -> Inputs:
    """Questions with gradable answers and their prompts, and the reward functions.

    Raises: ConfigError naming the model folder, file, line, answer, prompts or function that is wrong.
    """
    check_model_path(config.model)
    check_trackers(config.run.trackers)
    if config.rollout.engine.startswith("vllm") and not config.vllm.servers:
        check_vllm()
    skip = config.data.skip_bad_answers
    train_set = only_gradable(load_questions(config.data.train), skip)
    evaluation = {name: only_gradable(load_questions(source), skip) for name, source in config.evaluation.sets.items()}
    overlap = find_overlap(train_set, evaluation)
    train_set = overlap.drop_from(train_set, config.data.drop_overlap)
    tokenizer = load_tokenizer(config.model)
    prompts = render_prompts(train_set.questions, config.data, tokenizer)
    _require_enough(config, len(prompts))
    evaluation_prompts = {
        name: render_whole_set(f"evaluation.sets.{name}", loaded.questions, config.data, tokenizer)
        for name, loaded in evaluation.items()
    }
    reward_functions = load_reward_functions(config.reward.functions)
    return Inputs(train_set, evaluation, prompts, evaluation_prompts, overlap, reward_functions)


def _require_enough(config: RunConfig, num_questions: int) -> None:
    wanted = config.rollout.questions_per_step
    if num_questions < wanted:
        raise ConfigError(
            f"rollout.questions_per_step = {wanted}, but {config.data.train} has {num_questions} usable questions, "
            f"and no question comes twice in a step; lower it to {num_questions} or less"
        )
    if num_questions == wanted and config.rollout.max_resamples:
        raise ConfigError(
            f"rollout.max_resamples = {config.rollout.max_resamples} finds no further questions: every step asks all "
            f"{wanted} of {config.data.train}; set it to 0, or lower rollout.questions_per_step"
        )


def open_folder(config: RunConfig, resume: bool, ranks: Ranks) -> RunFolder:
    """The run's folder with its config.yaml, which rank 0 writes.

    Raises: ConfigError if it holds a run that was not asked to go on, a run of another configuration, or one that a
        process is still at work on.
    """
    path = ranks.run_on_rank0(lambda: _checked_folder(config, resume))
    folder = RunFolder(path, is_writer=ranks.is_rank0)
    ranks.raise_on_all_ranks(folder.take)
    folder.write_text("config.yaml", config.to_yaml())
    return folder


def _checked_folder(config: RunConfig, resume: bool) -> Path:
    path = config.run.dir or (_newest_run() if resume else None) or _new_run(config.run.seed)
    saved = path / "config.yaml"
    if saved.exists():
        if not resume:
            raise ConfigError(f"run.dir = {path} already holds a run; add --resume to go on, or choose another folder")
        _require_same_run(config, saved)
    return path


def _new_run(seed: int) -> Path:
    return RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}"


def _newest_run() -> Path | None:
    runs = sorted(RUNS.glob("*/config.yaml"))
    return runs[-1].parent if runs else None


def _require_same_run(config: RunConfig, saved: Path) -> None:
    differing = changed_settings(_settings_of(load_config(saved)), _settings_of(config))
    if differing:
        raise ConfigError(
            f"--resume would change the run in {saved.parent}: {', '.join(differing)}; leave these as they were"
        )


def _settings_of(config: RunConfig) -> dict[str, Any]:
    """Every setting that a run's numbers depend on, by its dotted name."""
    return {
        name: value
        for name, value in config.settings.items()
        if not name.startswith("deadline.") and name not in MAY_CHANGE_ON_RESUME
    }


def _build_parts(
    config: RunConfig,
    inputs: Inputs,
    folder: RunFolder,
    ranks: Ranks,
    watchdog: Watchdog,
    switch: StopSwitch,
    resume: bool,
) -> Parts:
    """Loads the model and its reference; sets PyTorch's number of threads."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    display = Display(is_shown=ranks.is_rank0)
    policy = DeepSpeedPolicy(config, ranks)
    _record_data(inputs, folder, display)
    engine = build_engine(config, policy, ranks, switch, display, folder.path)
    probe = make_probe([prompt.prompt_ids for prompt in inputs.train_set], config.max_tokens)
    sync = WeightSync(engine, policy, ranks, probe, config.rollout.temperature, config.rollout.sync_tolerance)
    settings = hashlib.sha256(repr(sorted(_settings_of(config).items())).encode()).hexdigest()
    return Parts(
        config=config,
        ranks=ranks,
        policy=policy,
        engine=engine,
        sync=sync,
        cache=ReplyCache(
            folder.path / "rollouts",
            ranks,
            settings,
            sync.policy_logps,
            display.line,
            is_on=config.rollout.keep_replies,
        ),
        verifier=DataParallelVerifier(Verifier(config.reward.workers, config.reward.timeout_s), ranks),
        reward_composer=RewardComposer(config.reward, config.rollout.max_new_tokens, inputs.reward_functions, ranks),
        curriculum=_curriculum(config, len(inputs.train_set)),
        generator=torch.Generator().manual_seed(request_seed(config.run.seed, "questions")),
        train_set=inputs.train_set,
        evaluation_sets=inputs.evaluation_sets,
        tokenizer=policy.tokenizer,
        folder=folder,
        checkpoints=Checkpoints(folder.path / "checkpoints", ranks, settings),
        display=display,
        trackers=open_trackers(config.run.trackers, folder.path, config, resume) if ranks.is_rank0 else [],
        throughput=Throughput(config, policy.model.config, ranks),
        watchdog=watchdog,
        switch=switch,
    )


def _record_data(inputs: Inputs, folder: RunFolder, display: Display) -> None:
    """Shows what the sets hold and what was left out of them, and writes it to data.json."""
    records = {}
    prompts_of_sets = [inputs.train_set, *inputs.evaluation_sets.values()]
    for (name, loaded), prompts in zip(inputs.sets.items(), prompts_of_sets, strict=True):
        num_long = len(loaded.questions) - len(prompts)
        records[name] = set_record(loaded, num_long)
        for line in set_lines(loaded, num_long):
            display.line(line)
    for line in inputs.overlap.lines():
        display.line(line)
    folder.write_json("data.json", {"sets": records, "overlap": inputs.overlap.to_json()})


def _curriculum(config: RunConfig, num_questions: int) -> CurriculumTable:
    section = config.curriculum
    return CurriculumTable(
        num_questions,
        mean=section.mean,
        std=section.std,
        momentum=section.momentum,
        initial_pass_rate=section.initial_pass_rate,
        estimate=section.estimate,
        device="cpu",
    )
