"""The class with Liger's signature, compared with liger-kernel itself and used inside TRL's trainer."""

import inspect

import pytest
import torch
from trl import GRPOTrainer

from expo_kernels import linear_token_logps
from expo_kernels.integrations._trl_loss import LOSS_TYPES, WINDOW_LOSS_TYPES
from expo_kernels.integrations.liger import LigerFusedLinearGRPOLoss
from tests.integrations.trl_runs import assert_same, make_trainer, run

B, T, H, V = 4, 6, 8, 17


@pytest.fixture(scope="module")
def liger():
    module = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="liger-kernel needs Linux on x86-64")
    return module.LigerFusedLinearGRPOLoss


def make_call(dtype=torch.float32):
    """Arguments of a call with completions of different lengths; ratios leave the clip range on both sides."""
    torch.manual_seed(5)
    hidden, weight = torch.randn(B, T, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    ids = torch.randint(V, (B, T))
    mask = torch.arange(T) < torch.tensor([[6], [3], [1], [5]])
    logps = linear_token_logps(hidden, weight, ids)
    return {
        "_input": hidden,
        "lin_weight": weight,
        "selected_token_ids": ids,
        "attention_mask": mask.long(),
        "advantages": torch.tensor([1.0, -0.5, 0.7, -1.2]),
        "bias": torch.randn(V, dtype=dtype),
        "ref_per_token_logps": logps + 0.3 * torch.randn(B, T),
        "old_per_token_logps": logps + 0.3 * torch.randn(B, T),
    }


def ratio_of_valid_tokens():
    """An importance sampling ratio as TRL computes it: 1 at padding, 0 where it is masked."""
    ratio = 0.5 + torch.rand(B, T, generator=torch.Generator().manual_seed(2))
    ratio[0, 2] = 0.0
    return torch.where(torch.arange(T) < torch.tensor([[6], [3], [1], [5]]), ratio, 1.0)


def results(loss_class, call, **settings):
    """Loss, metrics and gradients of one call; without the clipped share if Liger counts other tokens than we do."""
    names = ("_input", "lin_weight", "bias")
    leaves = {name: call[name].clone().requires_grad_() for name in names if call.get(name) is not None}
    loss, metrics = loss_class(compiled=False, **settings)(**call | leaves)
    (3 * loss).backward()
    if settings.get("loss_type") == "cispo" or "delta" in settings:
        metrics = metrics[:-1]
    return [loss.detach(), *metrics, *(leaf.grad for leaf in leaves.values())]


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.to(mine.dtype), rtol=1e-5, atol=1e-6)


def settings_for(loss_type):
    """The settings that every loss type needs, with the loss type."""
    length = T if loss_type == "dr_grpo" else None
    return {"loss_type": loss_type, "max_completion_length": length, "epsilon_high": 1.3}


def test_the_signatures_are_ligers(liger):
    def parameters(function):
        return [
            (name, p.default) for name, p in inspect.signature(function).parameters.items() if p.kind < p.KEYWORD_ONLY
        ]

    assert parameters(LigerFusedLinearGRPOLoss.__init__) == parameters(liger.__init__)
    assert parameters(LigerFusedLinearGRPOLoss.forward) == parameters(liger.forward)


# Liger's "luspo" counts padding unless the ratio is per sequence; TRL's and ours do not
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "luspo"])
@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {"beta": 0.04, "use_bias_correction_kl": True, "temperature": 0.7},
        {"beta": 0.04, "epsilon_low": 0.1},
    ],
    ids=["no-penalty", "weighted-penalty", "penalty"],
)
def test_loss_metrics_and_gradients_are_ligers(liger, loss_type, settings):
    settings = settings_for(loss_type) | settings
    call = make_call()
    assert_close(results(LigerFusedLinearGRPOLoss, call, **settings), results(liger, call, **settings))


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {}),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0}, {}),
        ({"loss_type": "dapo", "delta": 1.5}, {}),
        ({"loss_type": "dapo", "delta": 1.1}, {}),
        ({"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5}, {}),
        ({"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 1.2}, {}),
        ({"loss_type": "vespo", "vespo_k_neg": 0.9, "vespo_lambda_neg": 2.5, "beta": 0.0}, {}),
        ({"loss_type": "vespo"}, {"vllm_is_ratio": ratio_of_valid_tokens()}),
        ({"loss_type": "dapo"}, {"num_items_in_batch": torch.tensor(40)}),
        ({"loss_type": "dapo"}, {"num_items_in_batch": 40.0}),
        ({"loss_type": "bnpo"}, {"vllm_is_ratio": torch.rand(B, T)}),
        ({"loss_type": "grpo"}, {"vllm_is_ratio": torch.rand(B, 1)}),
        ({"loss_type": "grpo"}, {"old_per_token_logps": None}),
        ({"loss_type": "grpo"}, {"bias": None}),
        ({"loss_type": "grpo", "use_ref_model": False, "beta": 0.0}, {"ref_per_token_logps": None}),
    ],
)
def test_each_argument_does_what_ligers_does(liger, settings, arguments):
    call = make_call() | arguments
    assert_close(results(LigerFusedLinearGRPOLoss, call, **settings), results(liger, call, **settings))


def test_reference_hidden_states_stand_for_their_logps(liger):
    call = make_call() | {"ref_per_token_logps": None}
    near = {name: call[name] + 0.1 * torch.randn(call[name].shape) for name in ("_input", "lin_weight", "bias")}
    call |= dict(zip(("ref_input", "ref_weight", "ref_bias"), near.values(), strict=True))
    assert_close(results(LigerFusedLinearGRPOLoss, call), results(liger, call))
    with pytest.raises(ValueError, match="both given"):
        results(LigerFusedLinearGRPOLoss, call | {"ref_per_token_logps": torch.zeros(B, T)})
    with pytest.raises(ValueError, match="without ref_weight"):
        results(LigerFusedLinearGRPOLoss, call | {"ref_weight": None})


def test_vespo_refuses_a_correction_that_it_cannot_take_in():
    call = make_call()
    for arguments in (
        {"vllm_is_ratio": torch.rand(B, 1)},
        {"vllm_is_ratio": torch.rand(B, T), "old_per_token_logps": None},
    ):
        with pytest.raises(ValueError, match="takes an importance sampling ratio per token"):
            results(LigerFusedLinearGRPOLoss, call | arguments, loss_type="vespo")


def test_masked_garbage_changes_nothing():
    call = make_call() | {"vllm_is_ratio": torch.rand(B, T)}
    padding = call["attention_mask"] == 0
    spoiled = {name: call[name].masked_fill(padding, torch.nan) for name in call if name.endswith(("_logps", "_ratio"))}
    spoiled["selected_token_ids"] = call["selected_token_ids"].masked_fill(padding, -100)
    spoiled["_input"] = call["_input"].masked_fill(padding.unsqueeze(-1), torch.inf)
    for mine, other in zip(
        results(LigerFusedLinearGRPOLoss, call | spoiled), results(LigerFusedLinearGRPOLoss, call), strict=True
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "gpg"}, "supported here"),
        ({"chunk_size": 4}, "chunk_size is 4"),
        ({"use_ref_model": False}, "beta=0.04 has no effect"),
        ({"vespo_k_pos": 1.0}, "vespo_k_pos would be ignored"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"loss_type": "cispo", "epsilon_high": -0.2}, "epsilon_high is -0.2; expected a bound > 0"),
    ],
)
def test_what_would_be_ignored_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**settings)


class LigerTrainer(GRPOTrainer):
    """TRL's Liger path until 1.16, with the normalizer that it omitted."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.liger_grpo_loss = LigerFusedLinearGRPOLoss(
            beta=self.beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            temperature=self.temperature,
            use_ref_model=self.beta != 0.0,
            loss_type=self.loss_type,
            max_completion_length=self.max_completion_length,
            use_bias_correction_kl=self.args.use_bias_correction_kl,
        )

    def _compute_loss(self, model, inputs):
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        model = self.accelerator.unwrap_model(model)
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        hidden = model.base_model(
            input_ids=torch.cat([inputs["prompt_ids"], ids], dim=1),
            attention_mask=torch.cat([inputs["prompt_mask"], mask], dim=1),
            use_cache=False,
        ).last_hidden_state[:, :-1][:, -ids.shape[1] :]
        loss, metrics = self.liger_grpo_loss(
            _input=hidden,
            lin_weight=model.lm_head.weight,
            selected_token_ids=ids,
            attention_mask=mask,
            advantages=inputs["advantages"],
            bias=model.lm_head.bias,
            old_per_token_logps=inputs.get("old_per_token_logps"),
            ref_per_token_logps=inputs.get("ref_per_token_logps"),
            num_items_in_batch=inputs["num_items_in_batch"],
        )
        if self.beta != 0.0:
            self._metrics["train"]["kl"].append(metrics[0].item())
        is_window = self.loss_type in WINDOW_LOSS_TYPES
        return loss if is_window else loss / self.current_gradient_accumulation_steps


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("accumulation", "beta", "lora"), [(1, 0.02, True), (4, 0.0, False)])
def test_in_trls_trainer_it_gives_trls_numbers(tiny_model, loss_type, accumulation, beta, lora):
    settings = {"gradient_accumulation_steps": accumulation, "beta": beta, "lora": lora, "loss_type": loss_type}
    settings |= {"num_iterations": 2, "epsilon_high": 1.5 if loss_type == "cispo" else 0.28}
    ours = run(make_trainer(LigerTrainer, tiny_model, **settings))
    theirs = run(make_trainer(GRPOTrainer, tiny_model, **settings))
    for entry in theirs.history:
        entry.pop("entropy")  # Liger's signature returns no entropy
    assert_same(ours, theirs)


def test_a_gradient_tolerance_reaches_the_loss():
    call = make_call(torch.float64)
    call["lin_weight"] = 8 * torch.randn(2000, H, dtype=torch.float64)  # most probability is on few columns
    call["bias"] = torch.zeros(2000, dtype=torch.float64)
    exact = results(LigerFusedLinearGRPOLoss, call)
    near = results(LigerFusedLinearGRPOLoss, call, gradient_tolerance=1e-2)
    assert torch.equal(near[0], exact[0])
    for grad, truth in zip(near[3:5], exact[3:5], strict=True):
        assert not torch.equal(grad, truth)
        assert (grad - truth).norm() <= 1e-2 * truth.norm()
    with pytest.raises(ValueError, match=r"gradient_tolerance is 2\.0"):
        results(LigerFusedLinearGRPOLoss, call, gradient_tolerance=2.0)
