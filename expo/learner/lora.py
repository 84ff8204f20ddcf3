"""LoRA adapters by peft, put into a model in place: the base weights are the frozen reference policy as well.

Source: Hu et al., arXiv 2106.09685. Adapted weights are W + (alpha / rank) B A, with B = 0 at the start.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expo.errors import ConfigError

ADAPTER = "default"


def add_adapters(model: Any, rank: int, alpha: int) -> None:
    """Puts an adapter on every linear layer of `model` but its head, and freezes everything else.

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
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Inside, `model` is its base."""
    layers = [module for module in model.modules() if _is_adapted(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """`state`, the named weights of an adapted `model`, as a model without adapters would hold them.

    Adapted weights are computed in float32 and returned in the base weight's dtype.
    """
    found = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if not _is_adapted(module) or f"{name}.base_layer.weight" not in state:
            continue
        down, up = (state[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
        base = state[f"{name}.base_layer.weight"]
        found[f"{name}.weight"] = torch.addmm(base.float(), up, down, alpha=module.scaling[ADAPTER]).to(base.dtype)
    return found


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "enable_adapters") and hasattr(module, "base_layer")
