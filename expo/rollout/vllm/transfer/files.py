"""Weights on their way to servers through safetensors files, in memory where the machine has such a folder."""

import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from expo.errors import ConfigError, EngineError
from expo.rollout.vllm.client import Server
from expo.rollout.vllm.transfer.interface import BUCKET_BYTES, settle

SHARED_MEMORY = Path("/dev/shm")


class WeightFiles:
    """The policy's weights as files, kept until the next ones come, so that a server can be given them again.

    Args:
        parent: folder in which to make the folder; None: /dev/shm, or where there is none, that for temporary files.

    Raises: ConfigError if it cannot be made there.
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

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Writes new weights in place of the old. Raises: EngineError if there is no room for them."""
        self.version = None
        try:
            for path in self.folder.iterdir():
                path.unlink()
            for number, bucket in enumerate(_buckets(weights)):
                save_file(bucket, self.folder / f"{number:05}.safetensors")
        except OSError as error:
            raise EngineError(
                f"cannot write the weights to {self.folder}: {error}; make room there, or set vllm.weights_folder to a "
                f"folder with more, then go on with --resume"
            ) from error
        self.version = uuid.uuid4().hex

    def bring(self, server: Server, version: str) -> None:
        """Has the server read the files and use what they hold. Raises: ServerUnavailable, EngineError."""
        server.post("/collective_rpc", {"method": "read_weights", "args": [str(self.folder)]})
        settle(server, version)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The weights on the CPU, as many at once as BUCKET_BYTES holds."""
    bucket: dict[str, Tensor] = {}
    held = 0
    for name, value in weights:
        size = value.numel() * value.element_size()
        if bucket and held + size > BUCKET_BYTES:
            yield bucket
            bucket, held = {}, 0
        bucket[name] = value.detach().to(torch.device("cpu")).contiguous()
        held += size
    if bucket:
        yield bucket
