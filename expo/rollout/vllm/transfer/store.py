"""The key-value store through which NCCL's processes find each other: kept by rank 0, used over connections.

NCCL's identifier of a group, without which nobody can join it, goes through this store. Rank 0 uses its own store in
memory; a worker uses a `RemoteStore`, whose calls rank 0 answers in a thread.
"""

import json
import threading
from base64 import b64decode, b64encode
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from expo.errors import first_line
from expo.rollout.vllm.transfer.connection import Connection, GroupError

STORE: Any = dist.Store  # type: ignore[attr-defined]


def new_store() -> Any:
    """A store in the memory of this process; no port is opened."""
    return dist.HashStore()  # type: ignore[attr-defined]


def serve_store(store: Any, connection: Connection) -> None:
    """Answers the calls of a `RemoteStore` in a thread, until its connection closes."""

    def serve() -> None:
        try:
            while True:
                connection.send(json.dumps(_answer(store, json.loads(connection.receive()))).encode())
        except GroupError:
            connection.close()

    threading.Thread(target=serve, name="store of a weight transfer", daemon=True).start()


def _answer(store: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The result of a call, or its error."""
    keys = call["keys"]
    try:
        match call["method"]:
            case "set":
                store.set(keys[0], b64decode(call["value"]))
                return {}
            case "get":
                return {"result": b64encode(store.get(keys[0])).decode()}
            case "add":
                return {"result": store.add(keys[0], call["amount"])}
            case "check":
                return {"result": store.check(keys)}
            case "delete":
                return {"result": store.delete_key(keys[0])}
            case "wait":
                store.wait(keys, timedelta(seconds=call["seconds"]))
                return {}
            case other:
                return {"error": f"unknown method {other}"}
    except (RuntimeError, ValueError) as error:
        return {"error": first_line(error)}


class RemoteStore(STORE):  # type: ignore[misc,unused-ignore]
    """Rank 0's store, as a worker's process groups use it; PyTorch calls the methods by these names.

    Args:
        connection: to rank 0, which serves its store there.
        timeout_s: of `get` and `wait`.
    """

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        super().__init__()
        self._connection, self._timeout_s = connection, timeout_s
        self._lock = threading.Lock()  # PyTorch calls from several threads

    def _call(self, method: str, keys: list[str], **more: Any) -> Any:
        with self._lock:
            self._connection.send(json.dumps({"method": method, "keys": keys, **more}).encode())
            answer = json.loads(self._connection.receive())
        if "error" in answer:
            raise RuntimeError(f"the store of rank 0: {answer['error']}")
        return answer.get("result")

    def set(self, key: str, value: bytes | str) -> None:
        """Sets the value of a key."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._call("set", [key], value=b64encode(data).decode())

    def get(self, key: str) -> bytes:
        """The value of a key; waits until it has one."""
        self._call("wait", [key], seconds=self._timeout_s)
        return b64decode(self._call("get", [key]))

    def add(self, key: str, amount: int) -> int:
        """Adds to a number, and returns the sum."""
        return int(self._call("add", [key], amount=amount))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have a value."""
        return bool(self._call("check", keys))

    def delete_key(self, key: str) -> bool:
        """Deletes a key, and returns whether it was there."""
        return bool(self._call("delete", [key]))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits until all keys have a value."""
        seconds = self._timeout_s if timeout is None else min(timeout.total_seconds(), self._timeout_s)
        self._call("wait", keys, seconds=seconds)

    def has_extended_api(self) -> bool:
        """False: there are no calls for several keys at once."""
        return False
