"""Sets up an evaluation from its arguments: questions, policy, verifier and the folder of results."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expo.config import EvalConfig
from expo.data import QuestionSet, ReadOptions, load_questions, only_gradable, prompt_warnings, render_whole_set
from expo.data.record import set_lines
from expo.errors import ConfigError
from expo.evaluation.agreement import AnswerComparer
from expo.evaluation.config import EvalArguments
from expo.evaluation.frozen import FrozenPolicy
from expo.evaluation.protocol import PROTOCOL, differences, evaluation_protocol, question_metadata
from expo.evaluation.replies import REPLIES, resume_replies
from expo.evaluation.saved_weights import find_checkpoint
from expo.learner.model_checks import check_context, check_same_weights, check_token_ids
from expo.learner.model_files import check_model_files, file_digests, load_model_config
from expo.rewards.build import build_verifier
from expo.rollout.build import build_engine
from expo.rollout.data_parallel import DataParallelEngine, DataParallelVerifier
from expo.rollout.vllm.common import check_vllm
from expo.rollout.weight_sync import WeightSync, make_probe
from expo.run.environment import describe_environment
from expo.run.folder import RunFolder
from expo.run.rank_inputs import require_same_inputs, require_same_settings
from expo.runtime.atomic_io import remove_leftovers
from expo.runtime.console import Display
from expo.runtime.distributed import Ranks, join_ranks
from expo.runtime.signals import StopSwitch
from expo.runtime.watchdog import Watchdog
from expo.types import Prompt


@dataclass(frozen=True)
class Evaluation:
    """The objects of an evaluation.

    sets: the prompts of each question set; metadata: what results.json records of the evaluation beside its scores;
    num_done: how many questions of each set have all their replies in the folder.
    """

    config: EvalConfig
    ranks: Ranks
    policy: FrozenPolicy
    verifier: DataParallelVerifier
    comparer: AnswerComparer  # uses this rank's own verifier
    sets: dict[str, list[Prompt]]
    metadata: dict[str, Any]
    num_done: dict[str, int]
    folder: RunFolder
    display: Display
    watchdog: Watchdog
    switch: StopSwitch

    def start_engine(self) -> DataParallelEngine:
        """Starts the rollout engine and gives it the policy's weights.

        Raises: SyncError if the engine's weights differ from the policy's.
        """
        config = self.config
        engine = build_engine(config, self.policy, self.ranks, self.switch, self.display, self.folder.path)
        prompts = [prompt.prompt_ids for prompts in self.sets.values() for prompt in prompts]
        probe = make_probe(prompts, config.max_tokens)
        WeightSync(engine, self.policy, self.ranks, probe, 1.0, config.rollout.sync_tolerance).run()
        return engine


@contextmanager
def open_evaluation(arguments: EvalArguments) -> Iterator[Evaluation]:
    """Sets up an evaluation. Inside the block, a signal to stop is recorded and every wait has a deadline.

    Raises:
        ConfigError: if the evaluation cannot run; before the model loads where that is possible.
        CheckpointError: if the checkpoint does not exist or is incomplete.
    """
    config = arguments.config
    assert config.run.dir is not None
    watchdog = Watchdog(int(os.environ.get("RANK", "0")), go_on="give the same command again")
    switch = StopSwitch(on_interrupt="the evaluation keeps the replies so far, and ends")
    with ExitStack() as stack:
        with watchdog.phase("start", config.deadline.start):
            timeout = max(config.deadline.start, config.deadline.evaluation)
            ranks = join_ranks(config.run.device, timeout, watchdog.watch_ranks)
            stack.enter_context(switch.listening())
            if config.run.threads is not None:
                torch.set_num_threads(config.run.threads)
            display = Display(is_shown=ranks.is_rank0)
            for note in arguments.notes:
                display.line(note)
            require_same_settings(config, ranks)
            questions = ranks.raise_on_all_ranks(lambda: _load_sets(config, display))
            checkpoint = arguments.run and find_checkpoint(arguments.run, arguments.step, ranks)
            # vLLM holds a copy of the weights, so the policy leaves the GPU's memory to it
            device = ranks.device if config.rollout.engine == "transformers" else torch.device("cpu")
            policy = ranks.raise_on_all_ranks(lambda: FrozenPolicy(config.model, config.policy, device, checkpoint))
            sets = ranks.raise_on_all_ranks(lambda: _render_sets(config, questions, policy.tokenizer, display))
            files = ranks.raise_on_all_ranks(lambda: file_digests(config.model, policy.model.config))
            require_same_inputs(questions, sets, files, ranks)
            check_same_weights(config.model.path, policy.model, ranks)
            metadata = ranks.run_on_rank0(lambda: _metadata(arguments, checkpoint, questions, sets, policy))
            folder = RunFolder(config.run.dir, is_writer=ranks.is_rank0)
            stack.callback(folder.release)
            ranks.raise_on_all_ranks(folder.lock)
            num_done = ranks.run_on_rank0(lambda: _resume(folder, metadata))
            some_prompt = policy.tokenizer.decode(next(iter(sets.values()))[0].prompt_ids)
            verifier = stack.enter_context(build_verifier(config.reward, some_prompt))
        yield Evaluation(
            config=config,
            ranks=ranks,
            policy=policy,
            verifier=DataParallelVerifier(verifier, ranks),
            comparer=AnswerComparer(verifier.agree, display, watchdog, switch, config.deadline.evaluation),
            sets=sets,
            metadata=metadata,
            num_done=num_done,
            folder=folder,
            display=display,
            watchdog=watchdog,
            switch=switch,
        )


def _load_sets(config: EvalConfig, display: Display) -> dict[str, QuestionSet]:
    check_model_files(config.model)
    check_context(load_model_config(config.model), config.data.max_prompt_tokens, config.rollout.max_new_tokens)
    if config.rollout.engine == "vllm":
        check_vllm()
    options, verifier = ReadOptions.of(config.data, needs_columns=False), config.reward.verifier
    return {
        name: _load_set(name, source, options, verifier, display) for name, source in config.evaluation.sets.items()
    }


def _load_set(name: str, source: str, options: ReadOptions, verifier: str, display: Display) -> QuestionSet:
    """Loads a set, and shows its size and what was left out.

    Raises: ConfigError if the file repeats every question: an AIME file of 960 rows has 30 questions, each in 32 rows.
    """
    loaded = load_questions(source, options)
    if loaded.fewest_rows > 1:
        num_distinct = loaded.num_rows - loaded.num_duplicates
        raise ConfigError(
            f"--sets {name}: {source} has {loaded.num_rows:,} rows for {num_distinct:,} questions, each in "
            f"{loaded.fewest_rows} or more, but --num-samples sets the number of replies to a question; give --sets a "
            f"file with one row per question (for AIME 2024: aime-2024), and --num-samples={loaded.fewest_rows} for as "
            f"many replies"
        )
    loaded = only_gradable(loaded, options.skip_bad_answers, verifier)
    for line in set_lines(loaded):
        display.line(f"{name}: {line}")
    return loaded


def _render_sets(
    config: EvalConfig, sets: dict[str, QuestionSet], tokenizer: Any, display: Display
) -> dict[str, list[Prompt]]:
    rendered = {name: render_whole_set(name, loaded.questions, config.data, tokenizer) for name, loaded in sets.items()}
    prompts = (prompt.prompt_ids for group in rendered.values() for prompt in group)
    check_token_ids(load_model_config(config.model), tokenizer, prompts)
    for line in prompt_warnings(rendered, config.data, config.reward.verifier, tokenizer):
        display.line(line)
    return rendered


def _metadata(
    arguments: EvalArguments,
    checkpoint: Path | None,
    questions: dict[str, QuestionSet],
    sets: dict[str, list[Prompt]],
    policy: FrozenPolicy,
) -> dict[str, Any]:
    environment = describe_environment()
    return {
        "model": {
            "path": arguments.model,
            "checkpoint": checkpoint and checkpoint.name,
            "hub_commit": getattr(policy.model.config, "_commit_hash", None),
            "weights_sha256": policy.checksum(),
        },
        "protocol": evaluation_protocol(arguments.config),
        "questions": {
            name: question_metadata(
                loaded, sets[name], policy.tokenizer.decode(sets[name][0].prompt_ids), arguments.config
            )
            for name, loaded in questions.items()
        },
        "software": {"commit": environment["commit"], "versions": environment["versions"]},
    }


def _resume(folder: RunFolder, metadata: dict[str, Any]) -> dict[str, int]:
    """Starts the folder of results, or resumes it. Returns: how many questions of each set are done.

    Raises: ConfigError if the folder holds an evaluation with other metadata.
    """
    remove_leftovers(folder.path)
    if (folder.path / PROTOCOL).exists():
        saved = folder.read_object(PROTOCOL)
        if not saved:
            raise ConfigError(f"{folder.path / PROTOCOL} is damaged; restore it, or give another folder as --out")
        differing = differences(saved, metadata)
        if differing:
            raise ConfigError(
                f"--out = {folder.path} holds another evaluation: {', '.join(differing)}; change these back, or give "
                f"another folder"
            )
    elif any(path.name != ".lock" for path in folder.path.iterdir()):
        raise ConfigError(f"--out = {folder.path} holds files but no evaluation; give another folder")
    else:
        folder.write_json(PROTOCOL, metadata)
    path = folder.path / f"{REPLIES}.jsonl"
    try:
        return resume_replies(path, metadata["protocol"]["num_samples"], metadata["questions"])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read or cut ({error}); move it away, or give another folder") from error
