"""The interface of both weight transfers: what a supervisor calls, and how a server switches to new weights."""

from typing import Protocol

from expo.rollout.vllm.client import Server, ServerUnavailable

BUCKET_BYTES = 2**28  # of weights held on their way


class Weights(Protocol):
    """The policy's present weights, as they can be brought to a server."""

    @property
    def version(self) -> str | None:
        """What they are called; None: there are none that could be brought now."""

    def bring(self, server: Server, version: str) -> None:
        """Has the server load them. Raises: ServerUnavailable if it fails; EngineError if they cannot be sent again."""


def settle(server: Server, version: str) -> None:
    """Has a server that was given weights repair a tied head, forget what it computed with older ones, and name them.

    Raises: ServerUnavailable, EngineError.
    """
    server.post("/collective_rpc", {"method": "pack_tied_head"})
    reset_cache(server)
    server.post("/update_weight_version", {"new_version": version})


def reset_cache(server: Server) -> None:
    """Drops the prefix cache; what runs meanwhile is computed anew."""
    if not server.post("/reset_prefix_cache?reset_running_requests=true")["success"]:
        raise ServerUnavailable("it kept its prefix cache, made by older weights")
