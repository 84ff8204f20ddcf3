"""Weight transfer through safetensors files, in /dev/shm if the machine has it."""

import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from expo.errors import ConfigError, EngineError
from expo.rollout.vllm.client import Server
from expo.rollout.vllm.transfer.interface import BUCKET_BYTES, activate, send_adapter

SHARED_MEMORY = Path("/dev/shm")


class WeightFiles:
    """The policy's weights as files, kept until the next weight sync so that a restarted server can load them again.

    Weights of several steps can be stored at once, each in a folder of its own; the servers use those of `version`.
    After `keep_base`, all others are LoRA adapters.

    Args:
        parent: folder in which to create the folder; None: /dev/shm, or the system's temporary folder without one.

    Raises: ConfigError if the folder cannot be created.
    """

    def __init__(self, parent: Path | None) -> None:
        if parent is None and SHARED_MEMORY.is_dir():
            parent = SHARED_MEMORY
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="expo-weights-", dir=parent))
        except OSError as error:
            raise ConfigError(
                f"cannot make a folder for weights in {parent}: {error.strerror}; set vllm.weights_folder"
            ) from error
        self.version: str | None = None
        self._staged: list[str] = []
        self._base: str | None = None

    def keep_base(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Writes the weights to which adapters are applied; they stay. Raises: EngineError if the disk is full."""
        base = uuid.uuid4().hex
        self._write(base, weights)
        self._base = base

    def publish(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Writes new weights in place of the old. Raises: EngineError if the disk is full."""
        self._remove_used()
        self.use(self.stage(weights))

    def stage(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Writes weights for a later `use`, and returns their name. Raises: EngineError if the disk is full."""
        version = f"{self._base or ''}{uuid.uuid4().hex}"
        self._staged.append(version)
        self._write(version, weights)
        return version

    def _write(self, version: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        try:
            (self.folder / version).mkdir()
            for number, bucket in enumerate(_buckets(weights)):
                save_file(bucket, self.folder / version / f"{number:05}.safetensors")
        except OSError as error:
            raise EngineError(
                f"cannot write the weights to {self.folder}: {error}; free some space there, or set "
                f"vllm.weights_folder to a folder with more, then go on with --resume"
            ) from error

    def use(self, version: str) -> None:
        """Makes staged weights the current ones, and removes those staged before them."""
        self._remove_used()
        while (earlier := self._staged.pop(0)) != version:
            shutil.rmtree(self.folder / earlier, ignore_errors=True)
        self.version = version

    def _remove_used(self) -> None:
        version, self.version = self.version, None
        if version is not None:
            shutil.rmtree(self.folder / version, ignore_errors=True)

    def send(self, server: Server, version: str) -> None:
        """Has the server read the files and use the weights. Raises: ServerUnavailable, EngineError."""
        base = self._base
        if base is None:
            self._send_weights(server, version)
            return
        send_adapter(
            server,
            base,
            version,
            send_base=lambda: self._send_weights(server, base),
            send_matrices=lambda: self._read(server, "read_adapter", version),
        )

    def _send_weights(self, server: Server, version: str) -> None:
        self._read(server, "read_weights", version)
        activate(server, version)

    def _read(self, server: Server, method: str, version: str) -> Any:
        return server.post("/collective_rpc", {"method": method, "args": [str(self.folder / version)]})

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The weights on the CPU, in parts of at most BUCKET_BYTES; a larger weight is a part of its own."""
    bucket: dict[str, Tensor] = {}
    used = 0
    for name, value in weights:
        size = value.numel() * value.element_size()
        if bucket and used + size > BUCKET_BYTES:
            yield bucket
            bucket, used = {}, 0
        bucket[name] = value.detach().to(torch.device("cpu")).contiguous()
        used += size
    if bucket:
        yield bucket
