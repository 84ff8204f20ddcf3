"""The interface of both weight transfers: what a supervisor calls, and how a server switches to new weights."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from expo.rollout.vllm.client import Server, ServerUnavailable
from expo.rollout.vllm.common import refuse_unadaptable

BUCKET_BYTES = 2**28  # weights that are packed and sent together


class WeightTransfer(Protocol):
    """The policy's current weights, in a form that can be sent to a server at any time."""

    def keep_base(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Keeps the weights to which LoRA adapters are applied, for servers that lack them; all further weights are
        adapters, and their names begin with that of the base weights.
        """

    @property
    def version(self) -> str | None:
        """The name of the current weights; None: there are none that could be sent now."""

    def send(self, server: Server, version: str) -> None:
        """Has the server load them. Raises: ServerUnavailable if it fails; EngineError if it cannot be repeated."""


def send_adapter(
    server: Server, base: str, version: str, send_base: Callable[[], None], send_matrices: Callable[[], Any]
) -> None:
    """Has a server load a LoRA adapter, and before it the base weights that it lacks, and use it.

    Args:
        server: the server.
        base: name of the base weights, with which that of the adapter begins.
        version: name of the adapter.
        send_base: has the server load the base weights and use them under their name.
        send_matrices: has the server load the adapter; returns the answer of /collective_rpc.

    Raises: ServerUnavailable; EngineError, also if vLLM cannot apply the adapter.
    """
    if not weight_version(server).startswith(base):
        send_base()
    answer = send_matrices()
    with server.understand("/collective_rpc"):
        unknown = {str(layer) for layers in answer["results"] for layer in layers}
    refuse_unadaptable(unknown)
    activate(server, version)


def activate(server: Server, version: str) -> None:
    """Has a server that received weights rebuild a tied head, drop cached results of older weights, and name them.

    Raises: ServerUnavailable, EngineError.
    """
    server.post("/collective_rpc", {"method": "pack_tied_head"})
    reset_prefix_cache(server)
    server.post("/update_weight_version", {"new_version": version})


def reset_prefix_cache(server: Server) -> None:
    """Drops the prefix cache; running requests are computed anew. Raises: ServerUnavailable, EngineError."""
    answer = server.post("/reset_prefix_cache?reset_running_requests=true")
    with server.understand("/reset_prefix_cache"):
        is_reset = answer["success"]
    if not is_reset:
        raise ServerUnavailable("it kept its prefix cache, computed with older weights")


def weight_version(server: Server) -> str:
    """The name of the weights that a server uses. Raises: ServerUnavailable, EngineError."""
    answer = server.get("/weight_info")
    with server.understand("/weight_info"):
        return str(answer["weight_version"])
