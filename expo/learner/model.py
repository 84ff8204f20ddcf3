"""The language model: found, loaded, and read up to its last hidden states, which the head turns into logits.

Parameters are float32 whatever `policy.dtype`: at a learning rate of 1e-6 a bfloat16 parameter would round every update
away. The transformer's products run in `policy.dtype` by autocast; logits are always float32.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from expo import ledger
from expo.config import ModelSection
from expo.errors import ConfigError
from expo.learner._compat_deepspeed import is_partitioned
from expo.learner.batch import Batch
from expo_kernels import Objective, linear_expo_loss, linear_token_logps


def check_model_path(config: ModelSection) -> str:
    """Where the model lies: a folder, or a hub id as given.

    Raises: ConfigError if it reads as a folder and holds no model.
    """
    path = str(ledger.MODEL_PATH) if config.path == "ledger" else config.path
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if (Path(path) / "config.json").is_file() or (is_hub_id and not Path(path).exists()):
        return path
    what = "has no config.json" if Path(path).is_dir() else "does not exist"
    raise ConfigError(f'model.path = {config.path} {what}; give a transformers folder, a hub id, or "ledger"')


def load_tokenizer(config: ModelSection) -> Any:
    """The tokenizer that `model.path` names, without its model.

    Raises: ConfigError if there is none.
    """
    path = check_model_path(config)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"model.path = {config.path} has no tokenizer that loads: {str(error).splitlines()[0]}"
        ) from error


def load_model(config: ModelSection, device: torch.device) -> tuple[Any, Any]:
    """The causal language model, with float32 parameters, and the tokenizer that `model.path` names.

    Raises: ConfigError if there is no such model, its tokenizer cannot end a reply, or it scales its logits.
    """
    path = check_model_path(config)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # its bars would break into ours
    tokenizer = load_tokenizer(config)
    try:
        chosen = {} if config.attention == "auto" else {"attn_implementation": config.attention}
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **chosen)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.path = {config.path} does not load: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of model.path = {config.path} has no end-of-sequence token; set eos_token")
    logit_softcap(model)
    _turn_off_dropout(model)
    if not any(is_partitioned(parameter) for parameter in model.parameters()):  # ZeRO 3 has placed those
        model = model.to(device)
    return model, tokenizer


def empty_copy(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of the same shape, with parameters of `dtype` that are yet to be filled."""
    with torch.device(device):
        copy: Any = AutoModelForCausalLM.from_config(model.config, dtype=dtype)  # type: ignore[no-untyped-call]
    copy.generation_config = model.generation_config
    return copy.eval().requires_grad_(False)


def _turn_off_dropout(model: Any) -> None:
    """Old, reference and present log-probs must come from one function, not from one drawn anew at each pass."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


class PolicyModule(torch.nn.Module):
    """A language model whose forward goes from ids to log-probs or to the loss.

    Hidden states and head meet inside this one forward, so that ZeRO 3, which gathers the parameters a module touches,
    has the head's at hand.

    Args:
        model: a causal language model with a linear head.
        objective: the loss; its temperature and softcap hold for the log-probs too.
        dtype: of the transformer's products and the head's inputs.
        logits_budget_mb: memory for one chunk of logits in MiB; None: chosen by expo_kernels.
    """

    def __init__(self, model: Any, objective: Objective, dtype: torch.dtype, logits_budget_mb: float | None) -> None:
        super().__init__()
        self.model, self.objective, self.dtype, self.logits_budget_mb = model, objective, dtype, logits_budget_mb

    def forward(self, batch: Batch, **loss: Any) -> Any:
        """Log-probs of `batch`'s replies in nats, 0 elsewhere; or with loss=..., (loss, metrics, detached log-probs).

        `loss` holds what linear_expo_loss takes besides: advantages, beta, old_logps and so on. Log-probs are [B, S],
        or [N] for a packed batch.
        """
        hidden = hidden_states(self.model, batch, self.dtype)
        weight, bias = _head(self.model, self.dtype)
        shared: dict[str, Any] = {"bias": bias, "logits_budget_mb": self.logits_budget_mb}
        if loss:
            output = linear_expo_loss(
                hidden,
                weight,
                batch.completion_ids,
                batch.completion_mask,
                cu_seqlens=batch.cu_seqlens,
                objective=self.objective,
                return_entropy=True,
                **shared,
                **loss,
            )
            return output.loss, output.metrics, output.logps
        return linear_token_logps(
            hidden,
            weight,
            batch.completion_ids,
            mask=batch.completion_mask,
            temperature=self.objective.temperature,
            logit_softcap=self.objective.logit_softcap,
            **shared,
        )


def _head(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)


def hidden_states(model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Last hidden states [B, S, H] of a padded batch, [N, H] of a packed one, with products in `dtype`; no cache."""
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    output = run_transformer(model, dtype, input_ids=batch.input_ids, use_cache=False, **positions)
    hidden: Tensor = output.last_hidden_state.to(dtype)
    return hidden if batch.cu_seqlens is None else hidden[0]


def run_transformer(model: Any, dtype: torch.dtype, **inputs: Any) -> Any:
    """Output of the model below its head, with products in `dtype`."""
    # no cache: a matrix is used once a pass, and narrowed ones would be held until the end of it
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        return model.base_model(**inputs)


def head_logits(model: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 logits [B, V] of hidden states [B, H], as the loss makes them, before the temperature."""
    weight, bias = _head(model, dtype)
    logits = torch.nn.functional.linear(
        hidden.to(dtype).float(), weight.float(), None if bias is None else bias.float()
    )
    softcap = logit_softcap(model)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_softcap(model: Any) -> float | None:
    """The cap that the model puts on its logits after the head, or None.

    Raises: ConfigError if the model scales its logits, which the loss would not reproduce.
    """
    text_config = model.config.get_text_config()
    for name in ("logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in (None, 1, 1.0):
            raise ConfigError(f"the model scales its logits ({name}), which is not supported; choose another model")
    softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
    return softcap
