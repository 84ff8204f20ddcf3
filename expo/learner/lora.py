"""LoRA adapters by peft, injected into a model in place; its frozen base weights also serve as the reference policy.

Source: Hu et al., arXiv 2106.09685. Adapted weights are W + (alpha / rank) B A, with B = 0 at the start.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from expo.errors import ConfigError
from expo.learner.model_folder import make_readable

ADAPTER = "default"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's files


def add_adapters(model: Any, rank: int, alpha: int, seed: int = 0) -> None:
    """Adds an adapter to every linear layer of `model` except its head, and freezes all other parameters.

    The adapters are drawn from `seed`, so that every start of a run draws the same; PyTorch's own generators keep their
    states.

    Raises: ConfigError if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError('policy.lora_rank > 0 needs peft: pip install "expo-rl[lora]"') from error
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=linear_layers(model))
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def linear_layers(model: Any) -> list[str]:
    """The names of the layers that `add_adapters` adapts, of a model without adapters."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]


def adapted_layers(model: Any) -> list[str]:
    """The names of the layers that have adapters."""
    return [name for name, module in model.named_modules() if _is_adapted(module)]


def is_adapter(name: str) -> bool:
    """Whether the parameter of that name is one of an adapter's two matrices."""
    return ".lora_" in name


@contextmanager
def disabled_adapters(model: Any) -> Iterator[None]:
    """Disables the adapters inside: `model` computes what its base weights give."""
    layers = [module for module in model.modules() if _is_adapted(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_adapters(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Merges the adapters into the base weights: the weights of a model without adapters, by name.

    Args:
        state: the named weights of `model`, adapters included.
        model: names the adapted modules and their scaling.

    Merged weights are computed in float32 and have the dtype of the base weight.
    """
    weights = dict(base_weights(state.items()))
    for name in adapted_layers(model):
        if f"{name}.base_layer.weight" not in state:
            continue
        module = model.get_submodule(name)
        down, up = (state[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
        base = state[f"{name}.base_layer.weight"]
        weights[f"{name}.weight"] = torch.addmm(base.float(), up, down, alpha=module.scaling[ADAPTER]).to(base.dtype)
    return weights


def base_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights under the adapters, by their names in a model without adapters."""
    return ((name.replace(".base_layer.", "."), value) for name, value in weights if not is_adapter(name))


def scaled_adapters(
    adapters: Iterable[tuple[str, Tensor]], model: Any, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The matrices A [rank, inputs] and (alpha / rank) B [outputs, rank] of every adapter, rounded to `dtype`.

    Args:
        adapters: the named parameters of the adapters of `model`, float32.
        model: has their scaling.
        dtype: of the result.

    Their names are those of PEFT's files without its prefix: "model.layers.0.mlp.up_proj.lora_A.weight".
    """
    for name, value in adapters:
        layer, matrix = name.removesuffix(f".{ADAPTER}.weight").rsplit(".lora_", 1)
        scaling = model.get_submodule(layer).scaling[ADAPTER] if matrix == "B" else 1.0
        yield f"{layer}.lora_{matrix}.weight", (value * scaling).to(dtype)


def write_adapter(folder: Path, state: dict[str, Tensor], model: Any, base: str, revision: str | None) -> None:
    """Writes the adapters as peft does: adapter_config.json and adapter_model.safetensors, in an existing folder.

    Args:
        folder: to write into.
        state: the named weights of `model`, adapters included.
        model: with adapters; its own weights are not used.
        base: folder or hub id of the model under the adapters.
        revision: of it on the hub.
    """
    config = copy.copy(model.peft_config[ADAPTER])
    config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    config.base_model_name_or_path, config.revision, config.task_type = base, revision, "CAUSAL_LM"
    config.inference_mode = True
    config.save_pretrained(folder)
    adapters = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value.contiguous()
        for name, value in state.items()
        if is_adapter(name)
    }
    save_file(adapters, folder / WEIGHTS, metadata={"format": "pt"})
    make_readable(folder, CONFIG)


def write_zero_adapter(folder: Path, model: Any, rank: int) -> None:
    """Writes an adapter that changes nothing, as peft does: B = 0, on the first layer that can have one.

    Args:
        folder: to write into; it exists.
        model: without adapters; its weights are not used.
        rank: of the adapter.
    """
    name = linear_layers(model)[0]
    layer = model.get_submodule(name)
    zeros = {
        f"base_model.model.{name}.lora_A.weight": torch.zeros(rank, layer.in_features),
        f"base_model.model.{name}.lora_B.weight": torch.zeros(layer.out_features, rank),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [name.rpartition(".")[2]]}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(zeros, folder / WEIGHTS, metadata={"format": "pt"})


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "enable_adapters") and hasattr(module, "base_layer")
