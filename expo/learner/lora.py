"""LoRA adapters by peft, injected into a model in place; its frozen base weights also serve as the reference policy.

Source: Hu et al., arXiv 2106.09685. Adapted weights are W + (alpha / rank) B A, with B = 0 at the start.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from expo.errors import ConfigError
from expo.learner.model_folder import make_readable

ADAPTER = "default"


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
    head = model.get_output_embeddings()
    targets = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


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
    weights = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if not _is_adapted(module) or f"{name}.base_layer.weight" not in state:
            continue
        down, up = (state[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
        base = state[f"{name}.base_layer.weight"]
        weights[f"{name}.weight"] = torch.addmm(base.float(), up, down, alpha=module.scaling[ADAPTER]).to(base.dtype)
    return weights


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
        if ".lora_" in name
    }
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    make_readable(folder, "adapter_config.json")


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "enable_adapters") and hasattr(module, "base_layer")
