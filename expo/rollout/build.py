"""Builds the rollout engine that a configuration names."""

from pathlib import Path
from typing import Any

from expo.config import EngineConfig
from expo.evaluation.frozen import FrozenPolicy
from expo.learner.lora import adapted_layers
from expo.learner.model import empty_copy
from expo.learner.model_files import check_model_path, hub_options
from expo.learner.policy import DeepSpeedPolicy
from expo.rollout import RolloutEngine, end_ids
from expo.rollout.data_parallel import DataParallelEngine
from expo.rollout.exact import check_exact
from expo.rollout.transformers import TransformersEngine
from expo.rollout.vllm.common import lora_settings, version, version_warning
from expo.rollout.vllm.in_process import VllmEngine
from expo.rollout.vllm.server import ServerEngine
from expo.runtime.console import Display
from expo.runtime.distributed import Ranks
from expo.runtime.signals import StopSwitch


def build_engine(
    config: EngineConfig,
    policy: DeepSpeedPolicy | FrozenPolicy,
    ranks: Ranks,
    switch: StopSwitch,
    display: Display,
    folder: Path,
) -> DataParallelEngine:
    """Builds the engine that rollout.engine names, on every rank. If `needs_weight_sync`, sync it before it samples."""
    width = config.vllm.tensor_parallel if config.rollout.engine == "vllm" else 1
    return DataParallelEngine(_build_rank_engine(config, policy, ranks, display, folder), ranks, switch, width)


def _build_rank_engine(
    config: EngineConfig, policy: DeepSpeedPolicy | FrozenPolicy, ranks: Ranks, display: Display, folder: Path
) -> RolloutEngine:
    check_exact(config, on_gpu=ranks.device.type == "cuda")
    stop_ids = end_ids(policy.model, policy.tokenizer, config.rollout.stop_tokens)
    if config.rollout.engine == "vllm-server":
        servers = ServerEngine(config, policy.tokenizer, stop_ids, ranks, folder)
        _warn_of_version(display, servers.version)
        return servers
    if config.rollout.engine == "vllm":
        _warn_of_version(display, version())
        lora: dict[str, Any] = {}
        if config.vllm.lora == "adapter":
            lora = lora_settings(config.policy.lora_rank, adapted_layers(policy.model))
        return VllmEngine(
            check_model_path(config.model),
            policy.tokenizer,
            stop_ids,
            config.vllm,
            engine_args=hub_options(config.model) | lora,
            dtype=policy.dtype,
            device=ranks.device,
            num_replies=config.rollout.batch_size,
            max_tokens=config.max_tokens,
            num_ranks=ranks.size,
            is_exact=config.rollout.exact,
        )
    model = policy.model if policy.is_unsharded else empty_copy(policy.model, policy.dtype, ranks.device)
    engine = TransformersEngine(
        model,
        policy.tokenizer,
        config.rollout.batch_size,
        policy.dtype,
        is_shared=policy.is_unsharded,
        stop_tokens=config.rollout.stop_tokens,
        is_exact=config.rollout.exact,
    )
    if policy.is_unsharded:  # otherwise the copy has no weights yet, and is checked with the first ones
        engine.check()
    return engine


def _warn_of_version(display: Display, vllm_version: str) -> None:
    """Prints a warning if this version of vLLM is not tested."""
    warning = version_warning(vllm_version)
    if warning is not None:
        display.line(warning)
