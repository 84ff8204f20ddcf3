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
from expo.config import ConfigError, ModelSection


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


def load_model(config: ModelSection, device: torch.device) -> tuple[Any, Any]:
    """The causal language model, with float32 parameters, and the tokenizer that `model.path` names.

    Raises: ConfigError if there is no such model, its tokenizer cannot end a reply, or it scales its logits.
    """
    path = check_model_path(config)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # its bars would break into ours
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = {config.path} does not load: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of model.path = {config.path} has no end-of-sequence token; set eos_token")
    logit_softcap(model)
    return model.to(device), tokenizer


def hidden_states(model: Any, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Last hidden states [B, S, H] of input_ids [B, S], with products in `dtype`; no cache."""
    hidden: Tensor = run_transformer(model, dtype, input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def run_transformer(model: Any, dtype: torch.dtype, **inputs: Any) -> Any:
    """Output of the model below its head, with products in `dtype`."""
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model.base_model(**inputs)


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Float32 logits [B, V] of hidden states [B, H], as the loss makes them, before the temperature."""
    head = model.get_output_embeddings()
    logits = torch.nn.functional.linear(hidden.float(), head.weight, head.bias)
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
