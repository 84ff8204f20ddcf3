"""An evaluation put together from what was asked for: questions, model, engine, verifier and the folder of results."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expo.config import RunConfig
from expo.data import QuestionSet, load_questions, only_gradable, render_whole_set
from expo.data.record import set_lines
from expo.errors import CheckpointError, ConfigError
from expo.evaluation.config import Invocation
from expo.evaluation.frozen import FrozenPolicy
from expo.evaluation.protocol import PROTOCOL, REPLIES, differences, facts_of_questions, protocol_of, resume_replies
from expo.evaluation.scores import Agree
from expo.learner.model import check_model_path
from expo.rewards.verifier import Verifier
from expo.rollout.build import build_engine
from expo.rollout.data_parallel import DataParallelEngine, DataParallelVerifier
from expo.rollout.vllm.common import check_vllm
from expo.rollout.weight_sync import WeightSync, make_probe
from expo.run.checkpoint import Checkpoints
from expo.run.environment import describe_environment
from expo.run.folder import RunFolder
from expo.runtime.atomic_io import remove_leftovers
from expo.runtime.console import Display
from expo.runtime.distributed import Ranks, join_ranks
from expo.runtime.signals import StopSwitch
from expo.runtime.watchdog import Watchdog
from expo.types import Prompt


@dataclass(frozen=True)
class Evaluation:
    """The objects of an evaluation.

    sets: the questions of each set with their prompts; facts: what results.json says of how they came about; done: how
    many questions of each set have all their replies in the folder.
    """

    config: RunConfig
    ranks: Ranks
    policy: FrozenPolicy
    verifier: DataParallelVerifier
    agree: Agree  # by this rank's own verifier
    sets: dict[str, list[Prompt]]
    facts: dict[str, Any]
    done: dict[str, int]
    folder: RunFolder
    display: Display
    watchdog: Watchdog
    switch: StopSwitch

    def start_engine(self) -> DataParallelEngine:
        """The rollout engine, with the weights that it must have.

        Raises: SyncError if they turn out to be others.
        """
        engine = build_engine(self.config, self.policy, self.ranks, self.switch, self.display, self.folder.path)
        probe = make_probe([p.prompt_ids for asked in self.sets.values() for p in asked], self.config.max_tokens)
        WeightSync(engine, self.policy, self.ranks, probe, 1.0, self.config.rollout.sync_tolerance).run()
        return engine


@contextmanager
def open_evaluation(invocation: Invocation) -> Iterator[Evaluation]:
    """An evaluation's parts; inside, signals to stop are noted, and every wait has its deadline.

    Raises:
        ConfigError: if it cannot be, found before the model loads where that is possible.
        CheckpointError: if the checkpoint asked for is not there or not whole.
    """
    config = invocation.config
    assert config.run.dir is not None
    watchdog, switch = Watchdog(int(os.environ.get("RANK", "0")), go_on="give the same command again"), StopSwitch()
    with ExitStack() as stack:
        with watchdog.phase("start", config.deadline.start):
            ranks = join_ranks(config.run.device, max(config.deadline.start, config.deadline.evaluation))
            stack.enter_context(switch.listening())
            if config.run.threads is not None:
                torch.set_num_threads(config.run.threads)
            display = Display(is_shown=ranks.is_rank0)
            questions = ranks.raise_on_all_ranks(lambda: _load_sets(config, display))
            checkpoint = _checkpoint(invocation, ranks)
            # an engine with weights of its own needs the memory of the device
            device = ranks.device if config.rollout.engine == "transformers" else torch.device("cpu")
            policy = ranks.raise_on_all_ranks(lambda: FrozenPolicy(config, device, checkpoint))
            sets = ranks.raise_on_all_ranks(lambda: _render_sets(config, questions, policy.tokenizer))
            facts = ranks.run_on_rank0(lambda: _facts(invocation, checkpoint, questions, sets, policy))
            folder = RunFolder(config.run.dir, is_writer=ranks.is_rank0)
            stack.callback(folder.release)
            ranks.raise_on_all_ranks(folder.lock)
            done = ranks.run_on_rank0(lambda: _resume(folder, facts))
            verifier = stack.enter_context(Verifier(config.reward.workers, config.reward.timeout_s))
        yield Evaluation(
            config=config,
            ranks=ranks,
            policy=policy,
            verifier=DataParallelVerifier(verifier, ranks),
            agree=verifier.agree,
            sets=sets,
            facts=facts,
            done=done,
            folder=folder,
            display=display,
            watchdog=watchdog,
            switch=switch,
        )


def _load_sets(config: RunConfig, display: Display) -> dict[str, QuestionSet]:
    check_model_path(config.model)
    if config.rollout.engine == "vllm":
        check_vllm()
    return {name: _load_set(name, source, config, display) for name, source in config.evaluation.sets.items()}


def _load_set(name: str, source: str, config: RunConfig, display: Display) -> QuestionSet:
    """The questions of a set, and a word on what was left out.

    Raises: ConfigError if the file repeats itself: an AIME file of 960 rows holds 30 questions, 32 samples to each.
    """
    loaded = load_questions(source)
    if loaded.fewest_rows > 1:
        num_distinct = loaded.num_rows - loaded.num_duplicates
        raise ConfigError(
            f"--sets {name}: {source} has {loaded.num_rows:,} rows for {num_distinct:,} questions, each in "
            f"{loaded.fewest_rows} or more, and how often a question is asked is --num-samples; give --sets a file "
            f"that holds each once (of AIME 2024: aime-2024), and --num-samples={loaded.fewest_rows} if that was meant"
        )
    loaded = only_gradable(loaded, config.data.skip_bad_answers)
    for line in set_lines(loaded):
        display.line(f"{name}: {line}")
    return loaded


def _checkpoint(invocation: Invocation, ranks: Ranks) -> Path | None:
    if invocation.run is None:
        return None
    checkpoints = Checkpoints(invocation.run / "checkpoints", ranks, config_hash=None)
    found = checkpoints.newest_whole() if invocation.step is None else checkpoints.whole(invocation.step)
    if found is None:
        raise CheckpointError(f"the run {invocation.run} has neither an export nor a checkpoint yet")
    return found


def _render_sets(config: RunConfig, sets: dict[str, QuestionSet], tokenizer: Any) -> dict[str, list[Prompt]]:
    return {name: render_whole_set(name, found.questions, config.data, tokenizer) for name, found in sets.items()}


def _facts(
    invocation: Invocation,
    checkpoint: Path | None,
    questions: dict[str, QuestionSet],
    sets: dict[str, list[Prompt]],
    policy: FrozenPolicy,
) -> dict[str, Any]:
    environment = describe_environment()
    return {
        "model": {
            "path": invocation.model,
            "checkpoint": checkpoint and checkpoint.name,
            "hub_commit": getattr(policy.model.config, "_commit_hash", None),
            "weights_sha256": policy.checksum(),
        },
        "protocol": protocol_of(invocation.config),
        "questions": {
            name: facts_of_questions(found, sets[name], policy.tokenizer.decode(sets[name][0].prompt_ids))
            for name, found in questions.items()
        },
        "software": {"commit": environment["commit"], "versions": environment["versions"]},
    }


def _resume(folder: RunFolder, facts: dict[str, Any]) -> dict[str, int]:
    """What is done already in the folder, or a new folder.

    Raises: ConfigError if it holds an evaluation that was made in another way.
    """
    remove_leftovers(folder.path)
    if (folder.path / PROTOCOL).exists():
        differing = differences(folder.read_json(PROTOCOL), facts)
        if differing:
            raise ConfigError(
                f"--out = {folder.path} holds another evaluation: {', '.join(differing)}; leave these as they were, or "
                f"give another folder"
            )
    elif any(path.name != ".lock" for path in folder.path.iterdir()):
        raise ConfigError(f"--out = {folder.path} holds something else than an evaluation; give another folder")
    else:
        folder.write_json(PROTOCOL, facts)
    return resume_replies(folder.path / f"{REPLIES}.jsonl", facts["protocol"]["num_samples"])
