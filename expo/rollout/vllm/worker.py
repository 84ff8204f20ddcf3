"""What runs inside vLLM's worker processes: loading weights from a folder or from rank 0.

`expo/serve.py` starts a server with `--worker-extension-cls=expo.rollout.vllm.worker.WeightReader`, and for broadcasts
with `--weight-transfer-config={"backend": "expo"}`, the name of the receiver that is registered here.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from expo.rollout.vllm._compat import layerwise_reload, load_adapter, pack_tied_head
from expo.rollout.vllm.common import describe_model
from expo.rollout.vllm.key import read_key
from expo.rollout.vllm.transfer.buckets import empty_bucket
from expo.rollout.vllm.transfer.connection import GroupError
from expo.rollout.vllm.transfer.group import BACKEND, END_OF_UPDATE, Receiver, join
from expo.rollout.weight_samples import WeightDescription


class WeightReader:
    """Methods that vLLM adds to its worker class; `collective_rpc` calls them by name."""

    def read_weights(self, folder: str) -> None:
        """Loads the weights in a folder's safetensors files, one tensor at a time."""
        worker: Any = self
        worker.reload_weights(weights_iterator=_tensors(Path(folder)))

    def read_adapter(self, folder: str) -> list[str]:
        """Loads the LoRA adapter in a folder's safetensors files; returns the layers that vLLM cannot adapt."""
        worker: Any = self
        return load_adapter(worker.get_model(), dict(_tensors(Path(folder))))

    def use_received_adapter(self) -> list[str]:
        """Loads the LoRA adapter that rank 0 has sent last; returns the layers that vLLM cannot adapt."""
        worker: Any = self
        return load_adapter(worker.get_model(), worker.weight_transfer_engine.take_adapter())

    def pack_tied_head(self) -> None:
        """See `pack_tied_head` in `_compat.py`."""
        worker: Any = self
        pack_tied_head(worker.get_model())

    def describe_weights(self) -> dict[str, WeightDescription]:
        """The weights that this worker holds."""
        worker: Any = self
        return describe_model(worker.get_model())


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                yield name, file.get_tensor(name)


@dataclass
class Rendezvous:
    """How to join rank 0's group: host and port at which it listens, size and backend, deadline in seconds."""

    host: str
    port: int
    size: int
    backend: str
    timeout_s: float


@dataclass
class Update:
    """An update that rank 0 is about to send; its first message is the version.

    is_adapter: whether it is a LoRA adapter, which `WeightReader.use_received_adapter` loads when the update has ended.
    """

    version: str
    is_adapter: bool = False


class WeightReceiver(WeightTransferEngine):  # type: ignore[misc,unused-ignore]  # vLLM is not seen by mypy
    """Receives the weights that rank 0 broadcasts, all of them in one `update_weights`.

    The model is reloaded within that one call, so no request ever runs on a model in parts. After a transfer that was
    interrupted it holds invalid weights under its old version, until it is sent weights again.
    """

    init_info_cls = Rendezvous
    update_info_cls = Update
    _group: Receiver | None = None
    _adapter: dict[str, Tensor] | None = None

    def init_transfer_engine(self, init_info: Rendezvous) -> None:
        """Joins a new group in place of the old one."""
        self.shutdown()
        info, rank = init_info, 1 + self.parallel_config.rank
        self._group = join((info.host, info.port), read_key(None), rank, info.size, info.backend, info.timeout_s)
        self._device = self.device if info.backend == "nccl" else torch.device("cpu")

    def start_weight_update(self) -> None:
        """Does nothing: the reload begins in `update_weights`."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads all weights of an update."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def receive_weights(self, update_info: Update) -> None:
        """Loads them, or keeps an adapter. Raises: GroupError if they do not all come, having left the group."""
        received = self._received(update_info.version)
        with nullcontext() if update_info.is_adapter else layerwise_reload(self.model, self.model_config):
            try:
                if update_info.is_adapter:
                    self._adapter = dict(received)
                else:
                    self.model.load_weights(received)
            except BaseException:
                self.shutdown()  # so that rank 0 and the other workers do not wait for this one
                raise

    def take_adapter(self) -> dict[str, Tensor]:
        """The adapter that was received last, once. Raises: GroupError if there is none."""
        adapter, self._adapter = self._adapter, None
        if adapter is None:
            raise GroupError("rank 0 has sent no adapter")
        return adapter

    def _received(self, version: str) -> Iterator[tuple[str, Tensor]]:
        if self._group is None:
            raise GroupError("rank 0 sends weights, but this worker has not joined its group")
        if self._group.read_message() != version:
            raise GroupError("rank 0 sends another update than the one that it announced")
        while (manifest := self._group.read_message()) != END_OF_UPDATE:
            bucket = empty_bucket(manifest, self._device)
            self._group.receive(bucket.data)
            yield from bucket.tensors()

    def finish_weight_update(self) -> None:
        """Does nothing: the reload ended in `update_weights`."""

    def shutdown(self) -> None:
        """Leaves the group."""
        if self._group is not None:
            self._group.close()
        self._group = None


WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
