"""The inputs of a run that are read before any model loads: questions, prompts and reward functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo.config import RunConfig
from expo.data import (
    Overlap,
    QuestionSet,
    ReadOptions,
    find_overlap,
    load_questions,
    only_gradable,
    prompt_warnings,
    render_prompts,
    render_whole_set,
)
from expo.data.record import EVALUATION, TRAINING, set_lines, set_record
from expo.errors import ConfigError
from expo.learner.model_checks import check_context, check_token_ids
from expo.learner.model_files import check_model_files, file_digests, load_model_config, load_tokenizer
from expo.rewards.build import check_verifier
from expo.rewards.compose import RewardFunction, load_reward_functions
from expo.rollout.engine import stop_ids
from expo.rollout.vllm.common import check_ranks, check_vllm
from expo.rollout.vllm.key import read_key
from expo.run.folder import RunFolder
from expo.run.trackers import check_trackers
from expo.runtime.console import Display
from expo.types import Prompt

NO_RESAMPLES = "--rollout.max_resamples=0"


@dataclass(frozen=True)
class Inputs:
    """Questions, prompts and reward functions of a run.

    train, evaluation: the question sets; train_set, evaluation_sets: their prompts; overlap: the questions that
    training and evaluation sets share; reward_functions: by their name in reward.functions; model_files: digests of the
    model's files, by name; warnings: about the prompts.
    """

    train: QuestionSet
    evaluation: dict[str, QuestionSet]
    train_set: list[Prompt]
    evaluation_sets: dict[str, list[Prompt]]
    overlap: Overlap
    reward_functions: dict[str, RewardFunction]
    model_files: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def sets(self) -> dict[str, QuestionSet]:
        """All question sets, by the config field that names them."""
        return {TRAINING: self.train, **{EVALUATION + name: q for name, q in self.evaluation.items()}}

    @property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The prompts of all question sets, by the config field that names the set."""
        evaluation = {EVALUATION + name: prompts for name, prompts in self.evaluation_sets.items()}
        return {TRAINING: self.train_set, **evaluation}


def load_inputs(config: RunConfig, num_ranks: int = 1) -> Inputs:
    """Reads the questions with gradable answers, renders their prompts, and imports the reward functions.

    --dry-run makes the same checks, on what is on this machine (expo/planning/checks.py).

    Raises: ConfigError naming the model folder, file, line, answer, prompts or function that is wrong.
    """
    model_config = read_model_config(config)
    check_engine(config)
    check_batches(config, num_ranks)
    check_width(config, num_ranks)
    check_settings(config)
    sets = {name: read_set(config, name) for name in sources(config)}
    sets, overlap = drop_overlap(config, sets)
    tokenizer = read_tokenizer(config)
    prompts = {name: render_set(config, name, loaded, tokenizer) for name, loaded in sets.items()}
    check_prompts(model_config, tokenizer, prompts)
    warnings = prompt_warnings(prompts, config.data, config.reward.verifier, tokenizer)
    reward_functions = load_reward_functions(config.reward.functions)
    model_files = file_digests(config.model, model_config)
    train, train_set = sets.pop(TRAINING), prompts.pop(TRAINING)
    names = {name: name.removeprefix(EVALUATION) for name in sets}
    return Inputs(
        train,
        {names[name]: loaded for name, loaded in sets.items()},
        train_set,
        {names[name]: rendered for name, rendered in prompts.items()},
        overlap,
        reward_functions,
        model_files,
        tuple(warnings),
    )


# --- the checks, one for each thing that is read


def check_engine(config: RunConfig) -> None:
    """Raises: ConfigError if the rollout engine is not installed."""
    if config.rollout.engine.startswith("vllm") and not config.vllm.servers:
        check_vllm()


def check_width(config: RunConfig, num_ranks: int) -> None:
    """Raises: ConfigError if the engines of vLLM do not divide the ranks."""
    if config.rollout.engine == "vllm":
        check_ranks(config.vllm, num_ranks)


def check_settings(config: RunConfig) -> None:
    """Checks the packages, keys and functions that settings name. Raises: ConfigError."""
    check_trackers(config.run.trackers)
    if config.vllm.servers:
        read_key(config.vllm.key_file)
    check_verifier(config.reward.verifier)


def check_batches(config: RunConfig, num_ranks: int) -> None:
    """Raises: ConfigError if a rank would have no reply in an optimizer step."""
    replies = config.rollout.questions_per_step * config.rollout.group_size
    per_update = replies // config.policy.updates_per_step
    if per_update < num_ranks:
        raise ConfigError(
            f"{replies} replies a step in policy.updates_per_step = {config.policy.updates_per_step} updates are "
            f"{per_update} an update, fewer than the {num_ranks} ranks; lower updates_per_step, raise "
            f"rollout.questions_per_step, or take {per_update} ranks or fewer"
        )


def read_model_config(config: RunConfig) -> Any:
    """transformers' configuration of the model, after a check of its files. Raises: ConfigError."""
    check_model_files(config.model)
    model_config = load_model_config(config.model)
    check_context(model_config, config.data.max_prompt_tokens, config.rollout.max_new_tokens)
    return model_config


def sources(config: RunConfig) -> dict[str, str]:
    """The source of each question set by the config field that names it; the training set is the first."""
    return {TRAINING: config.data.train, **{EVALUATION + name: s for name, s in config.evaluation.sets.items()}}


def read_set(config: RunConfig, name: str) -> QuestionSet:
    """The gradable questions of the set that the field `name` names. Raises: ConfigError."""
    options = ReadOptions.of(config.data, needs_columns=name == TRAINING)
    loaded = load_questions(sources(config)[name], options)
    return only_gradable(loaded, config.data.skip_bad_answers, config.reward.verifier)


def drop_overlap(config: RunConfig, sets: Mapping[str, QuestionSet]) -> tuple[dict[str, QuestionSet], Overlap]:
    """The sets after data.drop_overlap, and the questions that the training set shares with the others."""
    evaluation = {name.removeprefix(EVALUATION): loaded for name, loaded in sets.items() if name != TRAINING}
    overlap = find_overlap(sets[TRAINING], evaluation)
    return {**sets, TRAINING: overlap.drop_from(sets[TRAINING], config.data.drop_overlap)}, overlap


def read_tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer, which has the stop tokens. Raises: ConfigError."""
    tokenizer = load_tokenizer(config.model)
    stop_ids(tokenizer, config.rollout.stop_tokens)
    return tokenizer


def render_set(config: RunConfig, name: str, loaded: QuestionSet, tokenizer: Any) -> list[Prompt]:
    """The prompts of a set. Raises: ConfigError if they are too long, or too few to train on."""
    if name != TRAINING:
        return render_whole_set(name, loaded.questions, config.data, tokenizer)
    prompts = render_prompts(loaded.questions, config.data, tokenizer)
    require_enough_questions(config, len(prompts))
    return prompts


def check_prompts(model_config: Any, tokenizer: Any, prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Raises: ConfigError if a prompt has a token that the model does not have."""
    check_token_ids(model_config, tokenizer, (prompt.prompt_ids for group in prompts.values() for prompt in group))


def require_enough_questions(config: RunConfig, num_questions: int) -> None:
    """Raises: ConfigError if a step draws more questions than there are; it names flags with which the run starts."""
    num_required, num_spare = config.rollout.questions_per_step, int(config.rollout.max_resamples > 0)
    if num_questions >= num_required + num_spare:
        return
    flags = _flags_for(config, num_questions - num_spare)
    if num_questions < num_required:
        raise ConfigError(
            f"rollout.questions_per_step = {num_required}, but {config.data.train} has {num_questions} usable "
            f"questions, and a step draws each question once at most; add {flags}"
        )
    other = "" if NO_RESAMPLES in flags else f", or {NO_RESAMPLES}"
    raise ConfigError(
        f"rollout.max_resamples = {config.rollout.max_resamples} finds no further questions: every step draws all "
        f"{num_required} questions of {config.data.train}; add {flags}{other}"
    )


def _flags_for(config: RunConfig, most: int) -> str:
    """Flags for at most that many questions in a step, whose replies divide among the updates of the step."""
    if most < 1:  # the only question leaves none to sample again
        return f"{_flags_for(config, 1)} {NO_RESAMPLES}"
    group_size, updates = config.rollout.group_size, config.policy.updates_per_step
    step = updates // math.gcd(updates, group_size)
    if most >= step:
        return f"--rollout.questions_per_step={most // step * step}"
    return f"--rollout.questions_per_step={most} --policy.updates_per_step={math.gcd(updates, most * group_size)}"


def record_data(inputs: Inputs, folder: RunFolder, display: Display) -> None:
    """Prints the size of each set and the number of questions left out, and writes them to data.json."""
    records = {}
    for name, loaded in inputs.sets.items():
        num_too_long = len(loaded.questions) - len(inputs.prompts[name])
        records[name] = set_record(loaded, num_too_long)
        for line in set_lines(loaded, num_too_long):
            display.line(line)
    for line in [*inputs.overlap.lines(), *inputs.warnings]:
        display.line(line)
    folder.write_json("data.json", {"sets": records, "overlap": inputs.overlap.to_json()})
