"""The weight and bias of an output head that is given as a module, the layers of PEFT included.

The `weight` attribute of a layer that PEFT adapted is its frozen base weight: a loss computed from it leaves the
adapters out and trains none of them, without an error. PEFT is recognized by its attributes and never imported.

Letters: V vocabulary, H hidden, r rank.
"""

import gc
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_ADVICE = "merge it (merge_and_unload()), or leave lm_head out of target_modules and modules_to_save"
# parameters of which it is known that no adapted layer has them as its base weight
_PLAIN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def head_tensors(weight: Tensor | nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight [V, H] and bias [V] of the head, differentiable in all that the head trains.

    Args:
        weight: [V, H], or a module: `nn.Linear`, or such a layer with PEFT's plain LoRA or in `modules_to_save`. Where
            gradients are enabled, a tensor must not be the base weight of an adapted layer.
        bias: [V], or None; given with a tensor only.

    Raises:
        ValueError: the module's output is not that of a weight and a bias, or `bias` is given with a module.
        TypeError: a module of another kind.
    """
    if isinstance(weight, nn.Module):
        if bias is not None:
            raise ValueError("bias is given, but weight is a module, which has its own; leave bias out")
        return _of_module(weight)
    if isinstance(weight, nn.Parameter) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _check_not_adapted(weight)
    return weight, bias


def _of_module(head: Any) -> tuple[Tensor, Tensor | None]:
    if _is_adapted(head):
        return _of_adapted(head)
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        return _of_module(_active_copy(head))
    if not isinstance(head, nn.Linear):
        raise TypeError(f"weight is a {_kind(head)}; expected a tensor [V, H] or an nn.Linear")
    if type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"weight is a {_kind(head)}, whose forward is its own; give the weight [V, H] and the bias that it applies"
        )
    return head.weight, head.bias


def _active_copy(wrapper: Any) -> Any:
    """The module that PEFT's ModulesToSaveWrapper runs: the trained copy, or the original without adapters."""
    trained = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    if wrapper.disable_adapters or not trained:
        return wrapper.original_module
    return wrapper.modules_to_save[trained[0]]


def _of_adapted(layer: Any) -> tuple[Tensor, Tensor | None]:
    """W + the sum of scaling * B A over the active adapters, [V, H], and the bias (Hu et al., arXiv 2106.09685)."""
    names = _active_adapters(layer)
    if layer.merged and (layer.disable_adapters or _trains(layer)):
        raise ValueError(
            f"weight is a {_kind(layer)} with merged adapters, which would not train; call unmerge_adapter()"
        )
    weight, bias = _of_module(layer.base_layer)
    if layer.merged:
        return weight, bias
    _check_plain_lora(layer, names)
    for name in names:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        # in the wider of the two dtypes: rounded to bfloat16, most small updates of the adapters would vanish
        dtype = torch.promote_types(weight.dtype, up.dtype)
        weight = torch.addmm(weight.to(dtype), up.to(dtype), down.to(dtype), alpha=layer.scaling[name])
    return weight, bias


def _active_adapters(layer: Any) -> list[str]:
    if layer.disable_adapters:
        return []
    of_layer = {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}
    return [name for name in layer.active_adapters if name in of_layer]


def _check_plain_lora(layer: Any, names: list[str]) -> None:
    if not names:
        return
    kind, what = _kind(layer), ""
    if not all(name in getattr(layer, "lora_A", ()) for name in names):
        what = "whose adapters are not LoRA's"
    elif variants := [type(layer.lora_variant[name]).__name__ for name in names if name in layer.lora_variant]:
        what = f"with the LoRA variant {variants[0]}"
    elif any(layer.lora_B[name].bias is not None for name in names):
        what = "with lora_bias"
    elif getattr(layer, "fan_in_fan_out", False):
        what = "with fan_in_fan_out"
    elif rates := [rate for name in names if (rate := getattr(layer.lora_dropout[name], "p", 0.0)) and layer.training]:
        what = f"with lora_dropout={rates[0]:g}, which acts on hidden states (set it to 0)"
    if what:
        raise ValueError(f"weight is a {kind} {what}: only plain LoRA on the head is supported; {_ADVICE}")


def _check_not_adapted(weight: nn.Parameter) -> None:
    """`weight` is not the base weight of an adapted layer, whose adapters a loss would silently leave out.

    A parameter does not know its layer: the first call with each searches Python's objects, once, and only if PEFT is
    loaded.

    Raises:
        ValueError: it is, and the adapters of the layer are active.
    """
    if "peft" not in sys.modules or weight in _PLAIN:
        return
    for layer in gc.get_objects():
        # not isinstance: it would ask a proxy for its class, which may run code
        if not issubclass(type(layer), nn.Module) or not _is_adapted(layer):
            continue
        # an adapted embedding may share its weight with a head that is not adapted
        if isinstance(layer.base_layer, nn.Linear) and layer.base_layer.weight is weight:
            if _active_adapters(layer):
                raise ValueError(
                    f"weight is the base weight of a {_kind(layer)}, without its adapters, which would not train; "
                    "give the module itself in place of its weight, such as model.get_output_embeddings()"
                )
            return
    _PLAIN[weight] = None


def _is_adapted(module: Any) -> bool:
    """Whether the module is a layer with PEFT's adapters."""
    # looked up in the class: the attributes of a module would be searched for in what it wraps
    return hasattr(type(module), "adapter_layer_names") and hasattr(type(module), "merged")


def _trains(layer: Any) -> bool:
    """Whether a gradient is expected for an adapter."""
    adapters = (value for name, value in layer.named_parameters() if not name.startswith("base_layer."))
    return torch.is_grad_enabled() and any(value.requires_grad for value in adapters)


def _kind(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
