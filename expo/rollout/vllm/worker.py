"""What runs inside vLLM's worker processes: weights from a folder or from rank 0, and the repair of a tied head.

A server is started with `--worker-extension-cls=expo.rollout.vllm.worker.WeightReader`; `expo/serve.py` does so. With
`--weight-transfer-config={"backend": "expo"}` it also takes them from rank 0, by the receiver that is registered here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from expo.rollout.vllm.common import describe_model, pack_tied_head
from expo.rollout.vllm.transfer.group import BACKEND, END, Group, GroupError, empty_bucket, join
from expo.rollout.weight_samples import Described


class WeightReader:
    """Methods that vLLM adds to its worker, for `collective_rpc` to call."""

    def read_weights(self, folder: str) -> None:
        """Takes the weights in a folder's safetensors files, one tensor at a time."""
        worker: Any = self
        worker.reload_weights(weights_iterator=_tensors(Path(folder)))

    def pack_tied_head(self) -> None:
        """See `pack_tied_head` in `common.py`."""
        worker: Any = self
        pack_tied_head(worker.get_model())

    def describe_weights(self) -> dict[str, Described]:
        """What this worker holds."""
        worker: Any = self
        return describe_model(worker.get_model())


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                yield name, file.get_tensor(name)


@dataclass
class Rendezvous:
    """Where rank 0 is found: host and port of its store, the group's size and backend, seconds of every wait."""

    host: str
    port: int
    size: int
    backend: str
    timeout_s: float


@dataclass
class Update:
    """Weights that rank 0 is about to send, by the name under which it announces each bucket."""

    version: str


class WeightReceiver(WeightTransferEngine):  # type: ignore[misc,unused-ignore]  # vLLM is not seen by mypy
    """Takes the weights that rank 0 broadcasts, all of them in one `update_weights`.

    The model is taken apart and put together in that one call, so that no request ever meets it in parts, not even
    after a transfer that broke off: then it holds nonsense, under its old version, until it is given weights again.
    """

    init_info_cls = Rendezvous
    update_info_cls = Update
    _group: Group | None = None

    def init_transfer_engine(self, init_info: Rendezvous) -> None:
        """Joins a new group in place of the old."""
        self.shutdown()
        place = init_info
        number = self.parallel_config.rank
        self._group = join(place.host, place.port, 1 + number, place.size, place.backend, place.timeout_s)
        self._device = self.device if place.backend == "nccl" else torch.device("cpu")

    def start_weight_update(self) -> None:
        """Nothing yet."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes all weights of an update."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def receive_weights(self, update_info: Update) -> None:
        """Takes them. Raises: GroupError if they do not all come, having left the group."""
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(self._received(update_info.version))
        except BaseException:
            self.shutdown()  # rank 0, and the workers beside this one, need not wait for it
            raise
        finally:
            finalize_layerwise_reload(self.model, self.model_config)

    def _received(self, version: str) -> Iterator[tuple[str, Tensor]]:
        if self._group is None:
            raise GroupError("rank 0 sends weights, but this worker has not been told where it is")
        number = 0
        while (manifest := self._group.read(f"{version}/{number}")) != END:
            bucket = empty_bucket(manifest, self._device)
            self._group.start(bucket.data)
            self._group.wait()
            yield from bucket.tensors()
            number += 1

    def finish_weight_update(self) -> None:
        """Nothing more."""

    def shutdown(self) -> None:
        """Leaves the group."""
        if self._group is not None:
            self._group.close()
        self._group = None


WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
