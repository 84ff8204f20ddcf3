"""The checks of a run's start, made by --dry-run on what is on this machine; what is not here is named, not guessed.

They are the run's own functions: what they refuse, the run refuses with the same words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from expo.config import ModelSection, RunConfig
from expo.data import QuestionSet, prompt_warnings
from expo.data.hub import find_named
from expo.data.record import TRAINING, require_same_questions, set_lines
from expo.errors import ConfigError, HubError
from expo.learner.flops import ModelShape
from expo.learner.model import PolicyModule, check_dtype, load_model, require_own_logits
from expo.learner.model_checks import check_context, check_finite, check_packing
from expo.learner.model_files import WEIGHTS, check_model_path, hub_options, load_error
from expo.planning.machine import Machine
from expo.planning.models import known_config
from expo.rewards.compose import load_reward_functions
from expo.rollout.exact import check_exact
from expo.rollout.transformers import TransformersEngine
from expo.run.folder import check_folder
from expo.run.inputs import (
    check_batches,
    check_engine,
    check_prompts,
    check_settings,
    drop_overlap,
    read_model_config,
    read_set,
    read_tokenizer,
    render_set,
    require_enough_questions,
    sources,
)
from expo.runtime.distributed import use_device
from expo.runtime.hub import is_offline, offline_hub
from expo.runtime.logging_filters import errors_only
from expo.types import Prompt

MOST_WEIGHTS_READ = 2**30  # bytes; the values of larger models are read by the run alone
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Facts:
    """What the checks found.

    shape, shape_source: of the model; folder: of the run; num_questions: of each set that could be counted, by the
    field that names it; prompt_lengths: tokens of the training prompts, empty if they could not be made; lines: what
    the run prints about its sets; unchecked: what the run will check and this could not.
    """

    shape: ModelShape
    shape_source: str
    folder: Path
    num_questions: dict[str, int] = field(default_factory=dict)
    prompt_lengths: tuple[int, ...] = ()
    lines: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


def check_run(config: RunConfig, machine: Machine, *, resume: bool = False) -> Facts:
    """Makes the checks of the start of a run for which everything needed is on this machine.

    Raises: ConfigError as the run would, or if the shape of the model cannot be found or counted.
    """
    unchecked: list[str] = []
    with offline_hub():
        here = _ModelHere.find(config.model)
        if here.has_config:
            model_config, source = read_model_config(config), f"{here.where}/config.json"
    if not here.has_config:
        model_config, source = find_config(config.model)
        check_context(model_config, config.data.max_prompt_tokens, config.rollout.max_new_tokens)
    _check_engine(config, machine, unchecked)
    check_exact(config, on_gpu=not machine.is_cpu)
    check_batches(config, machine.num_ranks)
    check_settings(config)
    load_reward_functions(config.reward.functions)
    folder = check_folder(config, resume)
    with offline_hub():
        sets = _read_sets(config, unchecked)
        lines: list[str] = []
        if TRAINING in sets:
            sets, overlap = drop_overlap(config, sets)
            lines = overlap.lines()
        if resume and sets:
            require_same_questions(folder / "data.json", sets)
        prompts, warnings = _render(config, here, model_config, sets, unchecked)
        check_weights(config, machine, here, unchecked)
    counts = _count(config, sets, prompts)
    if TRAINING in counts:
        require_enough_questions(config, counts[TRAINING])
    left_out = {name: len(sets[name].questions) - len(group) for name, group in prompts.items()}
    lines = [line for name, loaded in sets.items() for line in set_lines(loaded, left_out.get(name, 0))] + lines
    lines += warnings
    lengths = tuple(len(prompt.prompt_ids) for prompt in prompts.get(TRAINING, ()))
    shape = ModelShape.from_config(model_config)
    return Facts(shape, source, folder, counts, lengths, tuple(lines), tuple(unchecked))


def _check_engine(config: RunConfig, machine: Machine, unchecked: list[str]) -> None:
    try:
        check_engine(config)
    except ConfigError:
        if machine.is_here:
            raise
        unchecked.append("vLLM: not installed here")


# --- the model


@dataclass(frozen=True)
class _ModelHere:
    """Which files of the model are on this machine; where: their folder."""

    where: Path | None
    has_tokenizer: bool = False
    has_weights: bool = False

    @property
    def has_config(self) -> bool:
        return self.where is not None

    @classmethod
    def find(cls, config: ModelSection) -> "_ModelHere":
        path = check_model_path(config)
        if Path(path).exists():
            return cls(Path(path), has_tokenizer=True, has_weights=True)
        cached = try_to_load_from_cache(path, "config.json", revision=config.revision)
        if not isinstance(cached, str):
            return cls(None)
        folder = Path(cached).parent
        has_tokenizer = any((folder / name).exists() for name in TOKENIZERS)
        return cls(folder, has_tokenizer, has_weights=has_tokenizer and _weight_bytes(folder) > 0)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)


def find_config(config: ModelSection) -> tuple[Any, str]:
    """transformers' configuration of a model that is not on this machine, and its source: the table, or the hub.

    Raises: ConfigError if it is in neither.
    """
    known = None if config.revision else known_config(config.path)
    if known is not None:
        return known, "the table in expo/planning/models.py"
    if is_offline():
        raise ConfigError(
            f"the shape of model.path = {config.path} is unknown: it is neither on this machine nor in the table of "
            f"known models, and HF_HUB_OFFLINE forbids to download its config.json; give a folder with that file"
        )
    try:
        return AutoConfig.from_pretrained(config.path, **hub_options(config)), "the hub's config.json"
    except Exception as error:  # the hub's libraries raise many types
        raise load_error(config, "the config.json", error) from error


def check_weights(config: RunConfig, machine: Machine, here: _ModelHere, unchecked: list[str]) -> None:
    """Checks the model's weights as far as they are here; the values only of a small one, on the run's own device."""
    path = config.model.path
    if not here.has_weights or here.where is None:
        unchecked.append(f"the weights{'' if here.has_tokenizer else ' and the tokenizer'} of {path}: not here")
        return
    section, device = config.model, torch.device("meta")
    if not machine.is_here:  # its packages and its GPUs are not known
        section = section.model_copy(update={"attention": "auto"})
    elif _weight_bytes(here.where) <= MOST_WEIGHTS_READ:
        device = use_device(config.run.device)
    model, tokenizer = load_model(section, device)
    if device.type == "meta":
        unchecked.append(f"the values of the weights of {path}, and what the model computes: the run reads them")
        return
    check_finite(path, model)
    if config.policy.zero_stage < 3:  # the run does not compare sharded ones either
        require_own_logits(model)
    if config.policy.packing:
        module = PolicyModule(model, config.loss_objective(), check_dtype(model), config.policy.logits_budget_mb)
        with torch.no_grad():
            check_packing(model, lambda batch: module(batch, returns_hidden=True), check_dtype(model))
    if config.rollout.engine == "transformers":
        TransformersEngine(
            model,
            tokenizer,
            config.rollout.batch_size,
            getattr(torch, config.policy.dtype),
            is_shared=True,
            stop_tokens=config.rollout.stop_tokens,
        ).check()


# --- the questions


def _read_sets(config: RunConfig, unchecked: list[str]) -> dict[str, QuestionSet]:
    sets = {}
    for name, source in sources(config).items():
        try:
            with errors_only():
                sets[name] = read_set(config, name)
        except HubError:
            unchecked.append(f"{name} = {source}: on the hub, not on this machine")
    return sets


def _render(
    config: RunConfig,
    here: _ModelHere,
    model_config: Any,
    sets: Mapping[str, QuestionSet],
    unchecked: list[str],
) -> tuple[dict[str, Sequence[Prompt]], list[str]]:
    """The prompts of each set, and the warnings about them."""
    if not here.has_tokenizer:
        if sets:
            unchecked.append("the lengths of the prompts: they need the tokenizer")
        return {}, []
    tokenizer = read_tokenizer(config)
    prompts: dict[str, Sequence[Prompt]] = {
        name: render_set(config, name, loaded, tokenizer) for name, loaded in sets.items()
    }
    check_prompts(model_config, tokenizer, prompts)
    return prompts, prompt_warnings(prompts, config.data, config.reward.verifier, tokenizer)


def _count(
    config: RunConfig, sets: Mapping[str, QuestionSet], prompts: Mapping[str, Sequence[Prompt]]
) -> dict[str, int]:
    """Questions of each set: those with a prompt that fits, or all that are here, or those of a set known by name."""
    counts = {}
    for name, source in sources(config).items():
        named = find_named(source)
        if name in prompts:
            counts[name] = len(prompts[name])
        elif name in sets:
            counts[name] = len(sets[name].questions)
        elif named is not None:
            counts[name] = named.num_distinct
    return counts
