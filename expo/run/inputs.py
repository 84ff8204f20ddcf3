"""The inputs of a run that are read before any model loads: questions, prompts and reward functions."""

from dataclasses import dataclass

from expo.config import RunConfig
from expo.data import (
    Overlap,
    QuestionSet,
    ReadOptions,
    find_overlap,
    load_questions,
    only_gradable,
    render_prompts,
    render_whole_set,
)
from expo.data.record import TRAINING, set_lines, set_record
from expo.errors import ConfigError
from expo.learner.model_checks import check_context, check_token_ids
from expo.learner.model_files import check_model_files, file_digests, load_model_config, load_tokenizer
from expo.rewards.build import check_verifier
from expo.rewards.compose import RewardFunction, load_reward_functions
from expo.rollout.engine import stop_ids
from expo.rollout.vllm.common import check_vllm
from expo.run.folder import RunFolder
from expo.run.trackers import check_trackers
from expo.runtime.console import Display
from expo.types import Prompt


@dataclass(frozen=True)
class Inputs:
    """Questions, prompts and reward functions of a run.

    train, evaluation: the question sets; train_set, evaluation_sets: their prompts; overlap: the questions that
    training and evaluation sets share; reward_functions: by their name in reward.functions; model_files: digests of the
    model's files, by name.
    """

    train: QuestionSet
    evaluation: dict[str, QuestionSet]
    train_set: list[Prompt]
    evaluation_sets: dict[str, list[Prompt]]
    overlap: Overlap
    reward_functions: dict[str, RewardFunction]
    model_files: dict[str, str]

    @property
    def sets(self) -> dict[str, QuestionSet]:
        """All question sets, by the config field that names them."""
        return {TRAINING: self.train, **{f"evaluation.sets.{name}": q for name, q in self.evaluation.items()}}

    @property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The prompts of all question sets, by the config field that names the set."""
        evaluation = {f"evaluation.sets.{name}": prompts for name, prompts in self.evaluation_sets.items()}
        return {TRAINING: self.train_set, **evaluation}


def load_inputs(config: RunConfig) -> Inputs:
    """Reads the questions with gradable answers, renders their prompts, and imports the reward functions.

    Raises: ConfigError naming the model folder, file, line, answer, prompts or function that is wrong.
    """
    check_model_files(config.model)
    model_config = load_model_config(config.model)
    check_context(model_config, config.data.max_prompt_tokens, config.rollout.max_new_tokens)
    check_trackers(config.run.trackers)
    if config.rollout.engine.startswith("vllm") and not config.vllm.servers:
        check_vllm()
    check_verifier(config.reward.verifier)
    skip, verifier = config.data.skip_bad_answers, config.reward.verifier
    train = only_gradable(load_questions(config.data.train, ReadOptions.of(config.data)), skip, verifier)
    options = ReadOptions.of(config.data, needs_columns=False)
    evaluation = {
        name: only_gradable(load_questions(source, options), skip, verifier)
        for name, source in config.evaluation.sets.items()
    }
    overlap = find_overlap(train, evaluation)
    train = overlap.drop_from(train, config.data.drop_overlap)
    tokenizer = load_tokenizer(config.model)
    stop_ids(tokenizer, config.rollout.stop_tokens)
    prompts = render_prompts(train.questions, config.data, tokenizer)
    _require_enough_questions(config, len(prompts))
    evaluation_prompts = {
        name: render_whole_set(f"evaluation.sets.{name}", loaded.questions, config.data, tokenizer)
        for name, loaded in evaluation.items()
    }
    all_prompts = [prompts, *evaluation_prompts.values()]
    check_token_ids(model_config, tokenizer, (prompt.prompt_ids for group in all_prompts for prompt in group))
    reward_functions = load_reward_functions(config.reward.functions)
    model_files = file_digests(config.model, model_config)
    return Inputs(train, evaluation, prompts, evaluation_prompts, overlap, reward_functions, model_files)


def _require_enough_questions(config: RunConfig, num_questions: int) -> None:
    num_required = config.rollout.questions_per_step
    if num_questions < num_required:
        raise ConfigError(
            f"rollout.questions_per_step = {num_required}, but {config.data.train} has {num_questions} usable "
            f"questions, and a step draws each question once at most; lower it to {num_questions} or less"
        )
    if num_questions == num_required and config.rollout.max_resamples:
        raise ConfigError(
            f"rollout.max_resamples = {config.rollout.max_resamples} finds no further questions: every step draws all "
            f"{num_required} questions of {config.data.train}; set it to 0, or lower rollout.questions_per_step"
        )


def record_data(inputs: Inputs, folder: RunFolder, display: Display) -> None:
    """Prints the size of each set and the number of questions left out, and writes them to data.json."""
    records = {}
    for name, loaded in inputs.sets.items():
        num_too_long = len(loaded.questions) - len(inputs.prompts[name])
        records[name] = set_record(loaded, num_too_long)
        for line in set_lines(loaded, num_too_long):
            display.line(line)
    for line in inputs.overlap.lines():
        display.line(line)
    folder.write_json("data.json", {"sets": records, "overlap": inputs.overlap.to_json()})
