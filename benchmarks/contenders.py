"""All implementations that are compared, behind one interface: from inputs to a callable that computes the loss.

A contender describes what it computes and how it differs, and why it cannot run on a device. Peers are imported when
they are first prepared, so that this module needs none of them.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.inputs import BETA, CLIP, Inputs, cross_entropy, policy_loss
from expo_kernels import LossOutput, Objective, expo_loss, linear_expo_loss, linear_token_logps

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One implementation of the loss and its gradients.

    prepare: from inputs to a callable that returns the loss, ready for backward; includes all one-time work.
    logps: from inputs to log-probs [B, T] in nats; None if the contender does not return them.
    computes: what it computes, and how it differs from the others.
    module: the module that it imports; None for none.
    loss_of: the loss that it is checked against.
    is_everywhere: whether it is measured at every shape or, on a CPU, only at one; on a GPU `is_everywhere_on_gpu`.
    formula_bound: largest relative error of its float32 results; larger for peers that approximate by design.
    """

    name: str
    computes: str
    prepare: Callable[[Inputs], Run]
    logps: Callable[[Inputs], Tensor] | None = None
    module: str | None = None
    needs_gpu: bool = False
    loss_of: Callable[[Tensor, Inputs], Tensor] = policy_loss
    is_everywhere: bool = True
    is_everywhere_on_gpu: bool | None = None  # None: as on a CPU
    formula_bound: float = 1e-4

    def is_at_every_shape(self, device: str) -> bool:
        """Whether it is measured at every shape on "cpu" or "cuda"."""
        on_gpu = self.is_everywhere if self.is_everywhere_on_gpu is None else self.is_everywhere_on_gpu
        return on_gpu if device == "cuda" else self.is_everywhere

    def obstacle(self, device: torch.device) -> str | None:
        """The reason why it cannot run on `device`; None if it can."""
        if self.needs_gpu and device.type != "cuda":
            return "runs on GPUs only"
        return None if self.module is None else _import_error(self.module)


def _import_error(module: str) -> str | None:
    """The reason why a module cannot be imported; None if it can."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{package} cannot be imported: {error}"
    return None


# --- ours


def our_linear_loss(
    inputs: Inputs,
    beta: float | Tensor = BETA,
    function: Any = linear_expo_loss,
    **options: float,
) -> LossOutput:
    """Our loss from hidden states; `function` may be a compiled linear_expo_loss; `options` are further arguments."""
    arguments = {**_loss_arguments(inputs), "beta": beta, "objective": _objective(inputs), **options}
    return function(inputs.hidden, inputs.weight, inputs.ids, inputs.mask, **arguments)


def _on_logits(inputs: Inputs) -> LossOutput:
    return _loss_on(inputs.hidden @ inputs.weight.T, inputs, inplace=True)


def _loss_on(logits: Tensor, inputs: Inputs, *, inplace: bool) -> LossOutput:
    arguments, objective = _loss_arguments(inputs), _objective(inputs)
    return expo_loss(logits, inputs.ids, inputs.mask, **arguments, objective=objective, inplace=inplace)


def our_loss_on(logits: Tensor, inputs: Inputs) -> Tensor:
    """Our loss on existing logits [B, T, V], which are not changed."""
    return _loss_on(logits, inputs, inplace=False).loss


def our_inplace_loss_on(logits: Tensor, inputs: Inputs) -> Tensor:
    """Our loss on existing logits [B, T, V], which its gradient overwrites."""
    return _loss_on(logits.view_as(logits), inputs, inplace=True).loss


def _loss_arguments(inputs: Inputs) -> dict[str, Tensor | float]:
    return {
        "advantages": inputs.advantages,
        "old_logps": inputs.old_logps,
        "ref_logps": inputs.ref_logps,
        "beta": BETA,
    }


def _objective(inputs: Inputs) -> Objective:
    return Objective(clip_low=CLIP, clip_high=CLIP, aggregation="sequence", ratio=inputs.case.ratio)


# --- plain PyTorch


def _log_softmax(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _logsumexp(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def _compiled(inputs: Inputs) -> Run:
    # a graph for one static shape is the fastest form of torch.compile
    logps_of = torch.compile(_log_softmax, dynamic=False)
    return lambda: policy_loss(logps_of(inputs.hidden, inputs.weight, inputs.ids), inputs)


def _from_logps(logps_of: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Run]:
    return lambda inputs: lambda: policy_loss(logps_of(inputs), inputs)


def log_softmax_logps(inputs: Inputs) -> Tensor:
    """Log-probs [B, T] in eager PyTorch, all logits at once."""
    return _log_softmax(inputs.hidden, inputs.weight, inputs.ids)


def _logsumexp_logps(inputs: Inputs) -> Tensor:
    return _logsumexp(inputs.hidden, inputs.weight, inputs.ids)


# --- peers


def _liger_linear(inputs: Inputs, *, compiled: bool) -> Run:
    return lambda: liger_linear_loss(inputs, compiled=compiled)


def liger_linear_loss(inputs: Inputs, *, compiled: bool, beta: float = BETA) -> Tensor:
    """Liger's fused loss; beta is a Python number, an argument of its constructor."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=beta,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="grpo",
        importance_sampling_level=inputs.case.ratio,
        compiled=compiled,
    )
    others = {"ref_per_token_logps": inputs.ref_logps, "old_per_token_logps": inputs.old_logps}
    return loss(inputs.hidden, inputs.weight, inputs.ids, inputs.mask, inputs.advantages, **others)[0]


def _liger_triton(inputs: Inputs) -> Run:
    return lambda: liger_triton_loss(one_position_more(inputs), inputs)


def one_position_more(inputs: Inputs) -> Tensor:
    """Logits [B, T + 1, V] for Liger's Triton loss, which drops the last position."""
    return pad(inputs.hidden, (0, 0, 0, 1)) @ inputs.weight.T


def liger_triton_loss(logits: Tensor, inputs: Inputs, beta: float = BETA) -> Tensor:
    """Liger's loss on logits [B, T + 1, V]; its backward overwrites them with the gradient."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss(
        logits,
        inputs.old_logps,
        inputs.ref_logps,
        inputs.ids,
        inputs.advantages,
        inputs.mask.int(),
        temperature=1.0,
        beta=beta,
        eps_low=CLIP,
        eps_high=CLIP,
        loss_type="grpo",
        importance_sampling_level=inputs.case.ratio,
        reduce=True,
    )[0]


def _liger_logps(inputs: Inputs) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(inputs.hidden, inputs.weight, inputs.ids)


def _trl(inputs: Inputs, requested: tuple[str, ...]) -> tuple[Tensor, ...]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, ids = inputs.hidden.flatten(0, 1), inputs.ids.flatten()
    if hidden.device.type == "cuda":  # as in TRL; on other devices it scores every position
        hidden, ids = hidden[inputs.mask.flatten()], ids[inputs.mask.flatten()]
    outputs = ChunkedLogProbFunction.apply(
        hidden, inputs.weight, None, ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, requested
    )
    return tuple(None if values is None else _pad(values, inputs) for values in outputs[:2])


def _pad(values: Tensor, inputs: Inputs) -> Tensor:
    if len(values) == inputs.mask.numel():
        return values.view(inputs.mask.shape)
    return values.new_zeros(inputs.mask.shape).masked_scatter(inputs.mask, values)


def _trl_logps(inputs: Inputs) -> Tensor:
    return _trl(inputs, ())[0]


def _cce_logps(inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.ids_or_ignored, reduction="none")


def _quack(inputs: Inputs) -> Run:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, ids = inputs.hidden.flatten(0, 1), inputs.ids_or_ignored.flatten()
    return lambda: chunked_linear_cross_entropy(hidden, inputs.weight, ids, reduction="mean")


OURS = "expo_kernels"
CONTENDERS = (
    Contender(
        OURS,
        "linear_expo_loss: loss and gradients in one pass over chunks of tokens, 6NHV; unmasked tokens only",
        lambda inputs: lambda: our_linear_loss(inputs).loss,
        lambda inputs: our_linear_loss(inputs).logps,
    ),
    Contender(
        "expo_kernels on logits",
        "expo_loss(inplace=True) on logits computed by PyTorch, for trainers that have them; stores all logits",
        lambda inputs: lambda: _on_logits(inputs).loss,
        lambda inputs: _on_logits(inputs).logps,
        is_everywhere=False,
    ),
    Contender(
        "eager log_softmax", "float32 log_softmax of all logits", _from_logps(log_softmax_logps), log_softmax_logps
    ),
    Contender(
        "eager logsumexp",
        "chosen logit minus logsumexp, as TRL's selective_log_softmax",
        _from_logps(_logsumexp_logps),
        _logsumexp_logps,
        is_everywhere=False,
    ),
    Contender("torch.compile", "eager log_softmax compiled by Inductor for one static shape", _compiled),
    Contender(
        "Liger fused linear",
        "LigerFusedLinearGRPOLoss(compiled=False): vocabulary slices, computes the logits twice, 8NHV",
        lambda inputs: _liger_linear(inputs, compiled=False),
        _liger_logps,
        module="liger_kernel.chunked_loss",
    ),
    Contender(
        "Liger fused linear, compiled",
        "the same with compiled=True, its default: computes the loss of the log-probs with torch.compile",
        lambda inputs: _liger_linear(inputs, compiled=True),
        _liger_logps,
        module="liger_kernel.chunked_loss",
        is_everywhere=False,
    ),
    Contender(
        "Liger Triton",
        "triton_grpo_loss on a model's logits, overwrites them with the gradient; stores all logits",
        _liger_triton,
        module="liger_kernel.transformers.grpo_loss",
        needs_gpu=True,
    ),
    Contender(
        "TRL chunked",
        "ChunkedLogProbFunction, the head of TRL's GRPOTrainer, then the loss in eager PyTorch: computes the logits "
        "twice, 8NHV; on a GPU with Triton kernels over tiles of logits, and for unmasked tokens only",
        _from_logps(_trl_logps),
        _trl_logps,
        module="trl.trainer.utils",
        is_everywhere=False,  # on a CPU by far the slowest: other shapes would take a tenth of the total time
        is_everywhere_on_gpu=True,
    ),
    Contender(
        "Apple CCE",
        "cut_cross_entropy (reduction none), then the loss in eager PyTorch: its default filter drops small gradients",
        _from_logps(_cce_logps),
        _cce_logps,
        module="cut_cross_entropy",
        needs_gpu=True,
        formula_bound=1e-2,  # because of its filter; a missing term of the loss causes an error a hundred times larger
    ),
    Contender(
        "quack",
        "chunked_linear_cross_entropy: a mean cross-entropy, not a policy loss, which needs a weight per token",
        _quack,
        module="quack.linear_cross_entropy",
        needs_gpu=True,
        loss_of=cross_entropy,
    ),
)


def _with(label: str, computes: str, *, formula_bound: float = 1e-4, **options: float) -> Contender:
    """Ours with further arguments of linear_expo_loss."""
    return Contender(
        f"{OURS}, {label}",
        computes,
        lambda inputs: lambda: our_linear_loss(inputs, **options).loss,
        lambda inputs: our_linear_loss(inputs, **options).logps,
        formula_bound=formula_bound,
    )


CHUNK_BUDGETS = (2, 4, 8, 16, 64)  # MiB of logits_budget_mb
CHUNKED = tuple(
    _with(f"{mib} MiB", f"linear_expo_loss(logits_budget_mb={mib})", logits_budget_mb=mib) for mib in CHUNK_BUDGETS
)
TOLERANCES = (2e-3, 1e-4)  # the first is the bound on gradients of bfloat16 inputs
TOLERANT = {
    tolerance: _with(
        f"tolerance {tolerance:g}",
        f"linear_expo_loss(gradient_tolerance={tolerance:g}): the gradient products of the columns that matter",
        formula_bound=tolerance,
        gradient_tolerance=tolerance,
    )
    for tolerance in TOLERANCES
}


def contender(name: str) -> Contender:
    """The contender of that name."""
    return next(candidate for candidate in (*CONTENDERS, *CHUNKED, *TOLERANT.values()) if candidate.name == name)


def logps_and_entropies(name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [B, T] in nats, without gradients, of a contender that computes both."""
    with torch.no_grad():
        if name == OURS:
            return linear_token_logps(inputs.hidden, inputs.weight, inputs.ids, mask=inputs.mask, return_entropy=True)
        if name == "TRL chunked":
            return _trl(inputs, ("entropy",))
        log_softmax = (inputs.hidden @ inputs.weight.T).float().log_softmax(-1)
        logps = log_softmax.gather(-1, inputs.ids.unsqueeze(-1)).squeeze(-1)
        return logps, -(log_softmax.exp() * log_softmax).sum(-1)
