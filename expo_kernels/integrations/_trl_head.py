"""The output head inside a transformers model's forward, for `trl.py`.

There ZeRO 3's hooks are armed, so that a head can be gathered and its gradient is reduced, and DDP sees what is used.

Letters: B sequences, L positions of prompt and completion, V vocabulary, H hidden.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from expo_kernels.logps import linear_token_logps
from expo_kernels.objective import Objective

Head = Callable[[Tensor, Tensor, Tensor | None], Any]  # of hidden states [B, L, H], weight [V, H] and bias [V]


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def apply_head_in_forward(model: Any, objective: Objective, budget_mb: float | None, *, in_float32: bool) -> None:
    """Make `model(..., expo_head=f)` return f(hidden states, head weight, head bias), and score labels by our head.

    TRL asks for log-probs by `fused_lm_head=True`, under the old and the reference policy too; answered here, all
    log-probs of a run come from one code, so that ratios are 1 and KL 0 while nothing has changed.

    Args:
        model: of transformers, already given its fused head by TRL.
        objective: its temperature and logit_softcap are those of the log-probs.
        budget_mb: MiB for the logits of one chunk; None: a default for the device.
        in_float32: keep the head out of autocast.
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
            expo_head = _logps_head(labels, objective, budget_mb)
        if expo_head is None:
            return trls(*args, labels=labels, **options)
        options["use_cache"] = False
        hidden = self.base_model(*args, **options).last_hidden_state
        head = self.get_output_embeddings()  # each time: it may have been replaced since
        with maybe_gather_lm_head_ctx(head.weight, head.bias):
            weight = head.weight
            if torch.is_autocast_enabled(hidden.device.type) and not in_float32:
                # what autocast does to a linear layer; the loss itself is outside its reach
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            return expo_head(hidden, weight, head.bias)

    model.forward = types.MethodType(forward, model)


def _logps_head(labels: Tensor, objective: Objective, budget_mb: float | None) -> Head:
    """Log-probs of the labels [B, L], each predicted by the position before it; 0 where a label is -100."""
    ids = labels[:, 1:]

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedCausalLMOutput:
        logps = linear_token_logps(
            hidden[:, :-1],
            weight,
            ids,
            bias=bias,
            mask=ids != -100,
            temperature=objective.temperature,
            logit_softcap=objective.logit_softcap,
            logits_budget_mb=budget_mb,
        )
        return FusedCausalLMOutput(log_probs=logps)

    return head
