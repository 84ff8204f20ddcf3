"""What runs inside vLLM's worker processes: weights from a folder, and the repair of a tied head.

A server is started with `--worker-extension-cls=expo.rollout.vllm_worker.WeightReader`; `expo/serve.py` does so.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from expo.rollout.weight_samples import Described, describe


class WeightReader:
    """Methods that vLLM adds to its worker, for `collective_rpc` to call."""

    def read_weights(self, folder: str) -> None:
        """Takes the weights in a folder's safetensors files, one tensor at a time."""
        worker: Any = self
        worker.reload_weights(weights_iterator=_tensors(Path(folder)))

    def pack_tied_head(self) -> None:
        """See `pack_tied_head` below."""
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


def describe_model(model: Any) -> dict[str, Described]:
    """What a model of vLLM's holds: on a CPU linear layers hold nothing, once their weights are packed."""
    return describe(model.named_parameters())


def pack_tied_head(model: Any) -> None:
    """Has a head that shares the embedding's weight pack it anew, on a CPU.

    There vLLM multiplies by a packed copy of each weight. A reload packs anew the layers that it loads, and a tied head
    is not one: without this it stays as it was, silently (seen in 0.32).
    """
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    if method is not None and is_tied and next(model.parameters()).device.type == "cpu":
        method.process_weights_after_loading(head)
