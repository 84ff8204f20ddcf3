"""The language model: loading it, its last hidden states, and the log-probs and loss computed from them.

Parameters are float32 for every `policy.dtype`: at a learning rate of 1e-6 a bfloat16 parameter would round updates to
zero. The matrix products of the transformer run in `policy.dtype` by autocast; logits are always float32.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from expo.config import ModelSection
from expo.errors import ConfigError
from expo.learner._compat_deepspeed import is_partitioned
from expo.learner.batch import Batch
from expo.learner.model_checks import check_complete, check_logits
from expo.learner.model_files import check_model_path, hub_options, load_error, load_model_config, load_tokenizer
from expo.runtime.logging_filters import errors_only
from expo_kernels import Objective, linear_expo_loss, linear_token_logps

OPTIONAL = ("position_ids",)  # inputs that some families compute themselves, from the attention mask


def load_model(config: ModelSection, device: torch.device) -> tuple[Any, Any]:
    """Loads the causal language model of `model.path`, with float32 parameters, and its tokenizer.

    On the device "meta" the weights are compared with the architecture by name and shape, and not read.

    Raises: ConfigError if either does not load, tensors are missing or have other shapes, the tokenizer has no
        end-of-sequence token, or the model scales its logits.
    """
    path = check_model_path(config)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # its progress bars would break ours
    tokenizer = load_tokenizer(config)
    options: dict[str, Any] = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    if device.type == "meta":
        options["device_map"] = "meta"
    try:
        with errors_only():  # its report of the loading, which `check_complete` turns into one line
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **hub_options(config),
                **options,
            )
    except Exception as error:  # damaged files raise many unrelated types
        raise load_error(config, "the model", error) from error
    model, loading_info = loaded
    if getattr(model, "peft_config", None):
        raise ConfigError(
            f"model.path = {config.path} holds an adapter of PEFT, which would not be trained as it is; merge it "
            f"(merge_and_unload, save_pretrained), or give the base model and policy.lora_rank"
        )
    check_complete(config.path, loading_info)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of model.path = {config.path} has no end-of-sequence token; set eos_token")
    logit_softcap(model)
    _turn_off_dropout(model)
    _make_savable(model)
    if not any(is_partitioned(parameter) for parameter in model.parameters()):  # ZeRO 3 has placed those
        model = model.to(device)
    return model, tokenizer


def _make_savable(model: Any) -> None:
    """Corrects a generation config that transformers loads but refuses to save with the trained model.

    Llama 2 and Vicuna have a temperature without do_sample, which their authors meant to be true.
    """
    config = model.generation_config
    if _is_savable(config):
        return
    config.do_sample = True
    if not _is_savable(config):  # of the rest, only the special tokens matter to this trainer
        special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = type(config)(**{name: ids for name, ids in special.items() if ids != -1})


def _is_savable(generation_config: Any) -> bool:
    try:
        with errors_only():
            generation_config.validate(strict=True)
    except ValueError:
        return False
    return True


def empty_copy(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of the same architecture whose parameters, of `dtype`, are not those of `model`: load weights into it."""
    with torch.device(device):
        # the code of a loaded model is trusted already
        copy: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            model.config, dtype=dtype, trust_remote_code=hasattr(model.config, "auto_map")
        )
    copy.generation_config = model.generation_config
    return copy.eval().requires_grad_(False)


def architecture(config: ModelSection) -> Any:
    """The model of `model.path` without weights, on the device "meta"; only its configuration is read.

    Raises: ConfigError if that does not load.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            load_model_config(config), dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )


def _turn_off_dropout(model: Any) -> None:
    """Removes the randomness of forward passes: old, reference and current log-probs must agree at equal weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            # probabilities that a module passes to a function: attention_dropout, OPT's dropout, layerdrop; Mixtral's
            # jitter_noise of its router
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


class PolicyModule(torch.nn.Module):
    """A language model whose forward pass returns log-probs or the loss.

    The head is applied inside this forward pass, so that ZeRO 3, which gathers the parameters of the module that runs,
    gathers the head's too.

    Args:
        model: a causal language model with a linear head.
        objective: the loss; its temperature and softcap apply to the log-probs too.
        dtype: of the transformer's matrix products and of the head's inputs.
        logits_budget_mb: memory for one chunk of logits in MiB; None: chosen by expo_kernels.
        gradient_tolerance: of the loss's gradients, as in linear_expo_loss.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        dtype: torch.dtype,
        logits_budget_mb: float | None,
        gradient_tolerance: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.dtype, self.logits_budget_mb = model, objective, dtype, logits_budget_mb
        self.gradient_tolerance = gradient_tolerance

    def forward(self, batch: Batch, *, returns_hidden: bool = False, **loss: Any) -> Any:
        """Log-probs of the reply tokens, nats, 0 elsewhere; with `loss` arguments (loss, metrics, detached log-probs).

        `loss` are further arguments of linear_expo_loss: advantages, beta, old_logps and so on. Log-probs are [B, S],
        or [N] for a packed batch. With `returns_hidden`, the hidden states [B, S, H], or [N, H], and nothing else.
        """
        hidden = hidden_states(self.model, batch, self.dtype)
        if returns_hidden:
            return hidden
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
                gradient_tolerance=self.gradient_tolerance,
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
    inputs = {name: value for name, value in inputs.items() if name not in OPTIONAL or takes_input(model, name)}
    with _autocast(model, dtype):
        return model.base_model(**inputs)


def _autocast(model: Any, dtype: torch.dtype) -> torch.autocast:
    # no cache of cast weights: each is used once a pass, and would be kept in memory until its end
    is_enabled = dtype == torch.bfloat16
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=is_enabled, cache_enabled=False)


def takes_input(model: Any, name: str) -> bool:
    """Whether the model without its head has an input of that name."""
    return name in inspect.signature(model.base_model.forward).parameters


def check_dtype(model: Any) -> torch.dtype:
    """The dtype in which computations are compared: float32, but flash attention has only narrower types."""
    is_flash = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    return torch.bfloat16 if is_flash else torch.float32


def require_own_logits(model: Any) -> None:
    """Raises: ConfigError, which names the family, if the logits that the loss computes are not the model's own."""
    dtype = check_dtype(model)

    def own_logits(ids: Tensor) -> Tensor:
        model.eval()
        with _autocast(model, dtype):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    def logits(ids: Tensor) -> Tensor:
        model.train()
        hidden = run_transformer(model, dtype, input_ids=ids, use_cache=False).last_hidden_state
        return head_logits(model, hidden, dtype)

    was_training = model.training
    try:
        check_logits(model, own_logits, logits, dtype)
    finally:
        model.train(was_training)


def head_logits(model: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 logits [..., V] of hidden states [..., H], as the loss computes them, before the temperature."""
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
