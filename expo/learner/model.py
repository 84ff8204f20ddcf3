"""The language model: loading it, its last hidden states, and the log-probs and loss computed from them.

Parameters are float32 for every `policy.dtype`: at a learning rate of 1e-6 a bfloat16 parameter would round updates to
zero. The matrix products of the transformer run in `policy.dtype` by autocast; logits are always float32.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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
    """The folder of the model, or its hub id.

    Raises: ConfigError if model.path is neither a hub id nor a folder that holds a model.
    """
    path = str(ledger.MODEL_PATH) if config.path == "ledger" else config.path
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if (Path(path) / "config.json").is_file() or (is_hub_id and not Path(path).exists()):
        return path
    problem = "has no config.json" if Path(path).is_dir() else "does not exist"
    raise ConfigError(f'model.path = {config.path} {problem}; give a transformers folder, a hub id, or "ledger"')


def load_tokenizer(config: ModelSection) -> Any:
    """Loads the tokenizer of `model.path`.

    Raises: ConfigError if it does not load.
    """
    path = check_model_path(config)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"the tokenizer of model.path = {config.path} does not load: {str(error).splitlines()[0]}"
        ) from error


def load_model(config: ModelSection, device: torch.device) -> tuple[Any, Any]:
    """Loads the causal language model of `model.path`, with float32 parameters, and its tokenizer.

    Raises: ConfigError if either does not load, the tokenizer has no end-of-sequence token, or the model scales its
        logits.
    """
    path = check_model_path(config)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # its progress bars would break ours
    tokenizer = load_tokenizer(config)
    try:
        options = {} if config.attention == "auto" else {"attn_implementation": config.attention}
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.path = {config.path} does not load: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of model.path = {config.path} has no end-of-sequence token; set eos_token")
    logit_softcap(model)
    _turn_off_dropout(model)
    if not any(is_partitioned(parameter) for parameter in model.parameters()):  # ZeRO 3 has placed those
        model = model.to(device)
    return model, tokenizer


def empty_copy(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of the same architecture whose parameters, of `dtype`, are not those of `model`: load weights into it."""
    with torch.device(device):
        copy: Any = AutoModelForCausalLM.from_config(model.config, dtype=dtype)  # type: ignore[no-untyped-call]
    copy.generation_config = model.generation_config
    return copy.eval().requires_grad_(False)


def _turn_off_dropout(model: Any) -> None:
    """Removes the randomness of forward passes: old, reference and current log-probs must agree at equal weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


class PolicyModule(torch.nn.Module):
    """A language model whose forward pass returns log-probs or the loss.

    The head is applied inside this forward pass, so that ZeRO 3, which gathers the parameters of the module that runs,
    gathers the head's too.

    Args:
        model: a causal language model with a linear head.
        objective: the loss; its temperature and softcap apply to the log-probs too.
        dtype: of the transformer's matrix products and of the head's inputs.
        logits_budget_mb: memory for one chunk of logits in MiB; None: chosen by expo_kernels.
    """

    def __init__(self, model: Any, objective: Objective, dtype: torch.dtype, logits_budget_mb: float | None) -> None:
        super().__init__()
        self.model, self.objective, self.dtype, self.logits_budget_mb = model, objective, dtype, logits_budget_mb

    def forward(self, batch: Batch, **loss: Any) -> Any:
        """Log-probs of the reply tokens, nats, 0 elsewhere; with `loss` arguments (loss, metrics, detached log-probs).

        `loss` are further arguments of linear_expo_loss: advantages, beta, old_logps and so on. Log-probs are [B, S],
        or [N] for a packed batch.
        """
        hidden = hidden_states(self.model, batch, self.dtype)
        head = self.model.get_output_embeddings()
        shared: dict[str, Any] = {
            "bias": None if head.bias is None else head.bias.to(self.dtype),
            "logits_budget_mb": self.logits_budget_mb,
            "completion_lengths": batch.completion_lengths,
        }
        if loss:
            output = linear_expo_loss(
                hidden,
                head.weight,
                batch.completion_ids,
                batch.completion_mask,
                cu_seqlens=batch.cu_seqlens,
                objective=self.objective,
                return_entropy=True,
                weight_dtype=self.dtype,  # and the gradient is float32, as the weight is
                **shared,
                **loss,
            )
            return output.loss, output.metrics, output.logps
        return linear_token_logps(
            hidden,
            head.weight.to(self.dtype),
            batch.completion_ids,
            mask=batch.completion_mask,
            temperature=self.objective.temperature,
            logit_softcap=self.objective.logit_softcap,
            **shared,
        )


def hidden_states(model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Last hidden states [B, S, H] of a padded batch, [N, H] of a packed one; products in `dtype`, no KV cache."""
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    output = run_transformer(model, dtype, input_ids=batch.input_ids, use_cache=False, **positions)
    hidden: Tensor = output.last_hidden_state.to(dtype)
    return hidden if batch.cu_seqlens is None else hidden[0]


def run_transformer(model: Any, dtype: torch.dtype, **inputs: Any) -> Any:
    """Output of the model without its head; matrix products in `dtype`."""
    # no cache of cast weights: each is used once a pass, and would be kept in memory until its end
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        return model.base_model(**inputs)


def head_logits(model: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 logits [B, V] of hidden states [B, H], as the loss computes them, before the temperature."""
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.to(dtype).float()
    logits = torch.nn.functional.linear(hidden.to(dtype).float(), head.weight.to(dtype).float(), bias)
    softcap = logit_softcap(model)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_softcap(model: Any) -> float | None:
    """The model's final logit softcap, or None.

    Raises: ConfigError if the model scales its logits, which the loss would not reproduce.
    """
    text_config = model.config.get_text_config()
    for name in ("logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in (None, 1, 1.0):
            raise ConfigError(f"the model scales its logits ({name}), which is not supported; choose another model")
    softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
    return softcap
