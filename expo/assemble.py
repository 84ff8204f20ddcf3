"""A run put together from its configuration: inputs, folder, and the parts that the algorithm in train.py moves.

Whatever can be found wrong without loading a model is found before one loads.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expo.config import ConfigError, RunConfig, load_config
from expo.data import Prompted, QuestionSet, load_questions, render_prompts
from expo.metrics import Display, RunFolder, describe_environment
from expo.model import check_model_path, load_model
from expo.policy import Policy, TorchPolicy
from expo.rewards import Verifier, check_answers
from expo.rollout import RolloutEngine, request_seed
from expo.rollout.transformers import TransformersEngine
from expo_kernels import CurriculumTable

RUNS = Path("runs")
MAY_CHANGE_ON_RESUME = ("run.dir", "run.checkpoint_every", "run.keep_checkpoints", "run.completions_per_step")


@dataclass(frozen=True)
class Inputs:
    """What is read before any model loads: the training questions and the evaluation sets by name."""

    train: QuestionSet
    evaluation: dict[str, QuestionSet]


@dataclass(frozen=True)
class Parts:
    """The objects of a run; each can be replaced by another of the same interface."""

    config: RunConfig
    policy: Policy
    engine: RolloutEngine
    verifier: Verifier
    curriculum: CurriculumTable
    generator: torch.Generator  # draws questions
    train_set: list[Prompted]
    evaluation_sets: dict[str, list[Prompted]]
    tokenizer: Any
    folder: RunFolder
    display: Display


def load_inputs(config: RunConfig) -> Inputs:
    """Questions with gradable answers.

    Raises: ConfigError naming the model folder, file, line or answer that is wrong.
    """
    check_model_path(config.model)
    train_set = load_questions(config.data.train)
    evaluation = {name: load_questions(source) for name, source in config.evaluation.sets.items()}
    for questions in (train_set, *evaluation.values()):
        try:
            check_answers([question.answer for question in questions.questions])
        except ValueError as error:
            raise ConfigError(f"{questions.source}: {error}") from error
    _require_enough(config, len(train_set.questions))
    return Inputs(train_set, evaluation)


def _require_enough(config: RunConfig, num_questions: int) -> None:
    wanted = config.rollout.questions_per_step
    if num_questions < wanted:
        raise ConfigError(
            f"rollout.questions_per_step = {wanted}, but {config.data.train} has {num_questions} usable questions, "
            f"and no question comes twice in a step; lower it to {num_questions} or less"
        )


def open_folder(config: RunConfig, resume: bool) -> RunFolder:
    """The run's folder with its config.yaml and environment.json.

    Raises: ConfigError if it holds a run that was not asked to go on, or a run of another configuration.
    """
    path = config.run.dir or (_newest_run() if resume else None) or _new_run(config.run.seed)
    saved = path / "config.yaml"
    if saved.exists():
        if not resume:
            raise ConfigError(f"run.dir = {path} already holds a run; add --resume to go on, or choose another folder")
        _require_same_run(config, saved)
    folder = RunFolder(path)
    folder.write_text("config.yaml", config.to_yaml())
    folder.write_json("environment.json", describe_environment())
    return folder


def _new_run(seed: int) -> Path:
    return RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}"


def _newest_run() -> Path | None:
    runs = sorted(RUNS.glob("*/config.yaml"))
    return runs[-1].parent if runs else None


def _require_same_run(config: RunConfig, saved: Path) -> None:
    before, now = load_config(saved).model_dump(), config.model_dump()
    differing = [
        f"{section}.{field} ({before[section][field]} -> {value})"
        for section, fields in now.items()
        for field, value in fields.items()
        if before[section][field] != value and f"{section}.{field}" not in MAY_CHANGE_ON_RESUME
    ]
    if differing:
        raise ConfigError(
            f"--resume would change the run in {saved.parent}: {', '.join(differing)}; leave these as they were"
        )


def build_parts(config: RunConfig, inputs: Inputs, folder: RunFolder, display: Display) -> Parts:
    """Loads the model, copies it as the reference, and renders every prompt; sets PyTorch's number of threads."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    model, tokenizer = load_model(config.model, _device(config.run.device))
    reference = copy.deepcopy(model) if config.kl.beta > 0 else None
    train_set = render_prompts(inputs.train.questions, config.data, tokenizer)
    _require_enough(config, len(train_set))
    num_long = len(inputs.train.questions) - len(train_set)
    display.line(
        f"{inputs.train.source}: {len(train_set)} questions "
        f"({inputs.train.num_duplicates} duplicates and {num_long} with too long a prompt left out)"
    )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Parts(
        config=config,
        policy=TorchPolicy(config, model, reference, pad_id),
        engine=TransformersEngine(model, tokenizer, config.rollout.batch_size, getattr(torch, config.policy.dtype)),
        verifier=Verifier(config.reward.workers, config.reward.timeout_s),
        curriculum=_curriculum(config, len(train_set)),
        generator=torch.Generator().manual_seed(request_seed(config.run.seed, "questions")),
        train_set=train_set,
        evaluation_sets={
            name: render_prompts(source.questions, config.data, tokenizer) for name, source in inputs.evaluation.items()
        },
        tokenizer=tokenizer,
        folder=folder,
        display=display,
    )


def _curriculum(config: RunConfig, num_questions: int) -> CurriculumTable:
    section = config.curriculum
    return CurriculumTable(
        num_questions,
        mean=section.mean,
        std=section.std,
        momentum=section.momentum,
        initial_pass_rate=section.initial_pass_rate,
        device="cpu",
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"run.device = {name} cannot be used here: {str(error).splitlines()[0]}") from error
