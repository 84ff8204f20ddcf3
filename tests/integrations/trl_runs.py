"""Small real runs of TRL's GRPOTrainer on the CPU for tests to compare; model, data, rollouts and seed are equal."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from trl import GRPOConfig, GRPOTrainer

from expo_kernels.integrations.trl import ExpoGRPOTrainer

LEDGER_MODEL = Path(__file__).parents[2] / "expo" / "ledger" / "model"
QUESTIONS = ["3+8=", "9-2=", "4+4=", "7-5=", "1+6=", "8-3=", "5+5=", "6-6="]
GROUP_SIZE, MAX_LENGTH, STEPS = 4, 8, 5
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


class Run(NamedTuple):
    history: list[dict[str, float]]  # the values that the trainer logged at each step
    parameters: dict[str, torch.Tensor]


def save_model(folder: Path, config_class: Any = Qwen3Config, **settings: Any) -> Path:
    """A causal language model of two layers with random weights, and the ledger's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(LEDGER_MODEL, padding_side="left")
    torch.manual_seed(1)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config_class(vocab_size=len(tokenizer) + 5, **SIZES | ids | settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def roll_out(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Random replies of 1 to MAX_LENGTH tokens, equal at the same step of every run."""
    tokenizer = trainer.processing_class
    draws = torch.Generator().manual_seed(1000 + trainer.state.global_step)
    eos, replies = tokenizer.eos_token_id, []
    for _ in prompts:
        length = int(torch.randint(1, MAX_LENGTH + 1, (), generator=draws))
        reply = torch.randint(3, len(tokenizer), (length,), generator=draws).tolist()
        replies.append(reply if length == MAX_LENGTH else [*reply[:-1], eos])
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    logprobs = [torch.randn(len(reply), generator=draws).sub(3.0).tolist() for reply in replies]
    return {"prompt_ids": prompt_ids, "completion_ids": replies, "logprobs": logprobs}


def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 if the sum of a reply's ids is even, which holds for half of the replies."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


SETTINGS = {
    "per_device_train_batch_size": GROUP_SIZE,
    "num_generations": GROUP_SIZE,
    "max_completion_length": MAX_LENGTH,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    # with 1e-8 a gradient near 0, whose sign is rounding, moves its parameter by a whole learning rate
    "adam_epsilon": 1e-4,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 3,
}


def make_trainer(trainer_class: Any, folder: Path, *, lora: bool = False, extra: dict | None = None, **settings: Any):
    """The trainer; `extra` goes to its constructor, `settings` to its GRPOConfig."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="gaussian")
    options = {
        "reward_funcs": score,
        "rollout_func": roll_out,
        "train_dataset": Dataset.from_dict({"prompt": QUESTIONS}),
        "processing_class": AutoTokenizer.from_pretrained(folder, padding_side="left"),
        "peft_config": adapter if lora else None,
    }
    arguments = GRPOConfig(**SETTINGS | {"output_dir": str(folder.parent / "run")} | settings)
    return trainer_class(str(folder), args=arguments, **options | (extra or {}))


PLAIN = {"rho": "constant", "curriculum": "uniform"}
EPSILON_HIGH = {"cispo": 1.5}  # for "cispo" the upper bound of the ratio itself


def compare(folder: Path, *, extra: dict | None = None, tolerance: float = 1e-5, **settings: Any) -> Run:
    """Run TRL's trainer and ours as plain GRPO with these settings of TRL, check that both are equal, return ours."""
    settings.setdefault("epsilon_high", EPSILON_HIGH.get(settings.get("loss_type"), 0.28))
    theirs = run(make_trainer(GRPOTrainer, folder, extra=extra, **settings))
    ours = run(make_trainer(ExpoGRPOTrainer, folder, extra=PLAIN | (extra or {}), **settings))
    assert_same(ours, theirs, tolerance)
    return ours


def run(trainer: Any) -> Run:
    """Train, and return the logged values and the final parameters."""
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return Run(history, {name: value.detach().clone() for name, value in model.named_parameters()})


def assert_same(ours: Run, theirs: Run, tolerance: float = 1e-5) -> None:
    """Compare the losses, KL, entropy, gradient norm of every step, and the final parameters, to `tolerance`."""
    assert len(ours.history) == len(theirs.history) > 0
    for mine, other in zip(ours.history, theirs.history, strict=True):
        for name in ("loss", "kl", "entropy", "grad_norm", "reward", "policy_loss", "entropy_coef", "aux_loss"):
            assert (name in mine) == (name in other)
            if name in mine:
                assert abs(mine[name] - other[name]) <= tolerance * max(1.0, abs(other[name])), (name, mine, other)
    for name, value in theirs.parameters.items():
        assert (ours.parameters[name] - value).abs().max() <= tolerance, name
