"""Batch-invariant sampling: the replies to a question, and their log-probs, have the same bits whatever else is sampled
at once.

vLLM's batch-invariant mode fixes the order of every sum on a GPU. On a CPU the matrix products of both engines round by
the size of the batch; the transformers engine then samples one question at a time.
"""

import os

import torch

from expo.config import EngineConfig
from expo.errors import ConfigError

VARIABLE = "VLLM_BATCH_INVARIANT"  # vLLM reads it when it is imported
LEAST_CAPABILITY = (8, 0)  # of NVIDIA GPUs, for vLLM's mode


def check_exact(config: EngineConfig, *, on_gpu: bool) -> None:
    """Raises: ConfigError if rollout.exact is set and the engine cannot sample so."""
    if not config.rollout.exact:
        return
    engine = config.rollout.engine
    if engine == "transformers" and (on_gpu or config.policy.dtype != "float32"):
        place = "on a GPU" if on_gpu else f"with policy.dtype = {config.policy.dtype}"
        raise ConfigError(
            f"rollout.exact = true with rollout.engine = transformers is for a CPU and policy.dtype = float32, not "
            f"{place}; take rollout.engine = vllm on a GPU, or turn it off"
        )
    if engine != "transformers" and not on_gpu and not config.vllm.servers:
        raise ConfigError(
            f"rollout.exact = true with rollout.engine = {engine} needs an NVIDIA GPU: vLLM has no batch-invariant "
            f"mode on a CPU; take rollout.engine = transformers, or turn it off"
        )


def set_batch_invariant() -> None:
    """Has vLLM, once it is imported in this process, compute in its batch-invariant mode.

    Raises: ConfigError if the GPUs are too old or not NVIDIA's.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise ConfigError("rollout.exact = true with vLLM needs an NVIDIA GPU; turn it off")
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        raise ConfigError(
            f"rollout.exact = true with vLLM needs a GPU of compute capability {_text(LEAST_CAPABILITY)} or more, but "
            f"{torch.cuda.get_device_name()} has {_text(capability)}; turn it off"
        )
    os.environ[VARIABLE] = "1"


def _text(capability: tuple[int, int]) -> str:
    return ".".join(str(part) for part in capability)
