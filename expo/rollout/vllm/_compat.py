"""Every private API of vLLM that the adapters use; vLLM is imported when a function is called."""

import atexit
import gc
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from expo.errors import ConfigError

ADAPTER_ID = 1  # the number of the policy's adapter in vLLM; the first that a server loads gets this one
ADAPTER_NAME = "policy"


def keep_process_group(llm: Any) -> None:
    """Has vLLM not destroy the process group of torch.distributed, which belongs to the run, when the engine is freed.

    The teardown would also have unfrozen the garbage collector, without which Triton's bindings report leaks at exit.
    """
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
        atexit.register(gc.unfreeze)


@contextmanager
def unshared_memory_names() -> Iterator[None]:
    """Inside, the ranks of this run build an engine on a CPU whose shared memory no other run can meet or inherit.

    vLLM names the memory of its collectives after the ranks alone (seen in 0.32), and a destructor removes the names: a
    second run on the machine, or the next one after a killed one, could not start. Here a run has names of its own, and
    they are removed on leaving, when all ranks have mapped the memory.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    shared, make_name = [uuid.uuid4().hex], _CPUSHMDistributed.make_group_name
    dist.broadcast_object_list(shared, src=0)

    def make_own_name(communicator: Any) -> str:
        return f"vllm-{shared[0]}-{make_name(communicator).strip('/')}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_own_name)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(make_name)
        for path in Path("/dev/shm").glob(f"vllm-{shared[0]}-*"):
            path.unlink(missing_ok=True)


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


def forget_layers(model: Any) -> None:
    """Removes what reloads have noted of a model's layers, which refers to the layers and would keep them for ever."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    for layer in model.modules():
        LAYERWISE_INFO.pop(layer, None)


def load_adapter(model: Any, matrices: Mapping[str, Tensor]) -> list[str]:
    """Loads a LoRA adapter in place of the one that a vLLM model has, on every worker.

    Args:
        model: of an engine with `enable_lora`.
        matrices: A [rank, inputs] and B [outputs, rank] of each layer, named "<layer>.lora_A.weight"; the product B A
            is added to the layer's weight.

    Returns: the layers that vLLM cannot adapt; if there are any, nothing is loaded.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager, mapper = model.lora_manager, getattr(model, "hf_to_vllm_mapper", None)
    rank = next(value.shape[0] for name, value in matrices.items() if name.endswith(".lora_A.weight"))
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        dict(matrices),
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    known = {part for name in manager.modules for part in _parts(manager, name)}
    unknown = [name for name in adapter.loras if name not in known]
    if not unknown:
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(adapter)
        manager.activate_adapter(ADAPTER_ID)
    return unknown


def adapter_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The matrices with which a vLLM model computes its adapter, named as in `load_adapter`; none without an adapter.

    With tensor parallelism they are this worker's shards.
    """
    manager: Any = getattr(model, "lora_manager", None)
    adapter = None if manager is None else manager.get_adapter(ADAPTER_ID)
    if adapter is None or ADAPTER_ID not in manager.lora_index_to_id:
        return
    slot = manager.lora_index_to_id.index(ADAPTER_ID)
    for name, layer in manager.modules.items():
        parts = _parts(manager, name)
        if len(parts) == len(layer.lora_a_stacked) == len(layer.lora_b_stacked):
            for part, down, up in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
                yield f"{part}.lora_A.weight", down[slot, 0, : adapter.rank]
                yield f"{part}.lora_B.weight", up[slot, 0, :, : adapter.rank]


def _parts(manager: Any, name: str) -> Sequence[str]:
    """The layers of the model in transformers that one layer of vLLM computes, such as q, k and v."""
    parts: Sequence[str] = manager.packed_modules.get(name, [name])
    return parts


def abort_requests(llm: Any, request_ids: list[str]) -> None:
    """Removes requests from the engine, by the ids that `LLM.enqueue` returned."""
    llm.llm_engine.abort_request(request_ids, internal=True)


def share_port() -> None:
    """Has vLLM's HTTP server listen at a port that another process of the same user has reserved."""
    from vllm.entrypoints.launchers import launcher

    create = launcher.create_server_socket
    launcher.create_server_socket = lambda address, **options: create(address, **{**options, "reuse_port": True})
