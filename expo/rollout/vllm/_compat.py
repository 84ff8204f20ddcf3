"""Every private API of vLLM that the adapters use; vLLM is imported when a function is called."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from expo.errors import ConfigError


def keep_process_group(llm: Any) -> None:
    """Has vLLM not destroy the process group of torch.distributed, which belongs to the run, when the engine is freed.

    The teardown would also have unfrozen the garbage collector, without which Triton's bindings report leaks at exit.
    """
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
        atexit.register(gc.unfreeze)


def pack_tied_head(model: Any) -> None:
    """Has an output head that shares the embedding's weight pack it again, on a CPU.

    There vLLM multiplies by a packed copy of each weight. A reload packs the layers that it loads, and a tied head is
    not one of them: without this it silently keeps the old weight (seen in 0.32).
    """
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    if method is not None and is_tied and next(model.parameters()).device.type == "cpu":
        method.process_weights_after_loading(head)


def require_batch_invariance() -> None:
    """Raises: ConfigError if vLLM was imported without its batch-invariant mode; its kernels keep what they read."""
    from vllm.v1.attention.ops import triton_unified_attention

    if not triton_unified_attention.is_batch_invariant:
        raise ConfigError(
            "rollout.exact = true, but this process has imported vLLM without its batch-invariant mode; set "
            "VLLM_BATCH_INVARIANT=1 in its environment"
        )


@contextmanager
def layerwise_reload(model: Any, model_config: Any) -> Iterator[None]:
    """Inside, `model.load_weights` takes weights in the checkpoint's form; on leaving, they get vLLM's form again."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    try:
        yield
    finally:
        finalize_layerwise_reload(model, model_config)


def abort_requests(llm: Any, request_ids: list[str]) -> None:
    """Removes requests from the engine, by the ids that `LLM.enqueue` returned."""
    llm.llm_engine.abort_request(request_ids, internal=True)


def share_port() -> None:
    """Has vLLM's HTTP server listen at a port that another process of the same user has reserved."""
    from vllm.entrypoints.launchers import launcher

    create = launcher.create_server_socket
    launcher.create_server_socket = lambda address, **options: create(address, **{**options, "reuse_port": True})
