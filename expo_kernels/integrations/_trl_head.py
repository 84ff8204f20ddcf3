"""Apply the output head inside the forward of a transformers model, for `trl.py`.

Inside forward, the hooks of ZeRO 3 and FSDP2 gather the head and reduce its gradient, and DDP sees which parameters are
used. FSDP2 gathers it at the final norm; where accelerate finds none, as in PEFT models, it is gathered here.

Letters: B sequences, L positions of prompt and completion, V vocabulary, H hidden.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from expo_kernels._head_module import head_tensors
from expo_kernels.logps import linear_token_logps
from expo_kernels.objective import Objective

Head = Callable[[Tensor, Tensor, Tensor | None], Any]  # takes hidden states [B, L, H], weight [V, H] and bias [V]


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def logit_scale(text_config: Any) -> float:
    """Factor by which the model multiplies its logits before a softcap, from the fields that TRL reads."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if (factor := getattr(text_config, name, None)) is not None:
            return float(factor)
    if (scaling := getattr(text_config, "logits_scaling", None)) is None:
        return 1.0
    # Granite and MiniCPM3 divide by it
    return float(scaling) if text_config.model_type == "hyperclovax" else 1.0 / float(scaling)


def check_head(model: Any) -> None:
    """Refuse a head whose output is not that of a weight and a bias.

    Raises:
        NotImplementedError: it is such a head.
    """
    try:
        head_tensors(base_model(model).get_output_embeddings(), None)
    except (TypeError, ValueError) as error:
        raise NotImplementedError(f"lm_head is not supported: {error}") from error


def apply_head_in_forward(
    model: Any,
    objective: Objective,
    budget_mb: float | None,
    *,
    in_float32: bool,
    is_fsdp: bool,
    needs_entropies: Callable[[], bool],
) -> None:
    """Patch forward: `model(..., expo_head=f)` returns f(hidden states, weight, bias); log-probs use our head.

    TRL calls the model with `fused_lm_head=True` for log-probs, also under the old and the reference policy. Computing
    all of them with the same code keeps ratios exactly 1 and the KL exactly 0 before the first update. With
    `output_router_logits=True` the result has an entry `aux_loss` as well.

    Args:
        model: a transformers model that TRL has patched with its fused head.
        objective: its temperature and logit_softcap apply to the log-probs.
        budget_mb: MiB for the logits of one chunk; None: a default for the device.
        in_float32: exclude the head from autocast.
        is_fsdp: gather a head that FSDP2 has sharded over ranks of different tokens.
        needs_entropies: whether log-probs are wanted with entropies, asked in every call.
    """
    trls = model.forward

    # `generate` reads the signature
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        expo_head: Head | None = None,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if fused_lm_head and labels is not None:
            expo_head = _logps_head(labels, objective, budget_mb, needs_entropies())
        if expo_head is None:
            return trls(*args, labels=labels, **options)
        options["use_cache"] = False
        output = self.base_model(*args, **options)
        hidden = output.last_hidden_state
        # looked up in every call, because it may have been replaced; PEFT's `modules_to_save` has a copy to train
        weight, bias = head_tensors(self.get_output_embeddings(), None)
        if is_fsdp:
            weight, bias = _whole(weight), None if bias is None else _whole(bias)
        with maybe_gather_lm_head_ctx(weight, bias):
            if torch.is_autocast_enabled(hidden.device.type) and not in_float32:
                # autocast casts the inputs of a linear layer, but not those of our ops
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            made = expo_head(hidden, weight, bias)
        if options.get("output_router_logits"):
            made["aux_loss"] = _aux_loss(self, output, options)
        return made

    model.forward = types.MethodType(forward, model)


def _logps_head(labels: Tensor, objective: Objective, budget_mb: float | None, needs_entropies: bool) -> Head:
    """A head for the log-probs of labels [B, L]; each position predicts the next label; 0 if a label is -100."""
    ids = labels[:, 1:]

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedCausalLMOutput:
        made = linear_token_logps(
            hidden[:, :-1],
            weight,
            ids,
            bias=bias,
            mask=ids != -100,
            temperature=objective.temperature,
            logit_softcap=objective.logit_softcap,
            return_entropy=needs_entropies,  # type: ignore[call-overload]
            logits_budget_mb=budget_mb,
        )
        logps, entropies = made if needs_entropies else (made, None)
        return FusedCausalLMOutput(log_probs=logps, entropy=entropies)

    return head


def _whole(parameter: Tensor) -> Tensor:
    """The parameter itself, or all of a sharded one; its gradient is then the mean over the ranks, as FSDP2's is."""
    if not isinstance(parameter, DTensor):
        return parameter
    whole: Tensor = parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return whole


def _aux_loss(model: Any, output: Any, options: dict[str, Any]) -> Any:
    """The load-balancing loss of the routers, 0-dim (Switch Transformer, arXiv 2101.03961), as transformers has it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = config.num_experts, config.num_experts_per_tok
    aux_loss: Any = load_balancing_loss_func(output.router_logits, *experts, options.get("attention_mask"))
    return aux_loss
