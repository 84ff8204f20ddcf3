"""TRL's own tests of GRPOTrainer, run with ExpoGRPOTrainer in its place and nothing else changed.

    git clone --branch v1.16.0 https://github.com/huggingface/trl CHECKOUT
    python -m benchmarks.trl_suite CHECKOUT plain [options of pytest]

"plain" sets rho="constant" and curriculum="uniform", "expo" the trainer's defaults, and "trl" runs TRL's trainer, which
says what fails without us. The tests read models and data sets from a hub. Small ones with random weights take their
names here, in a temporary cache, so that nothing is downloaded; tests that need others fail in all three modes. So do
those of a version of TRL other than the installed one where the two differ.
"""

import argparse
import importlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FILE = "tests/test_grpo_trainer.py"
OWNER = "trl-internal-testing"
ARCHITECTURES = ("Cohere2", "Gemma2", "Glm4Moe", "GptOss", "Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["Beautiful is better than", "Explicit is", "Simple is better than", "Flat is"]


def byte_tokenizer() -> Any:
    """A tokenizer of 256 bytes with ChatML's tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def save_models(test_file: str, cache: Path) -> list[str]:
    """Save a small model for each text model that the tests name, in the hub's layout of a cache; return the others."""
    import torch
    import transformers

    tokenizer, missing = byte_tokenizer(), []
    for name in sorted(set(re.findall(rf"{OWNER}/([\w.-]+)", test_file))):
        if name.startswith("zen"):
            continue
        parts = re.match(r"tiny-(\w+)For(CausalLM|SequenceClassification)", name)
        if parts is None or parts[1] not in ARCHITECTURES:
            missing.append(name)
            continue
        model_class = getattr(transformers, parts[0].removeprefix("tiny-"))
        repository = cache / f"models--{OWNER}--{name}"
        folder = repository / "snapshots" / "local"
        folder.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("local")
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
        known = {key: value for key, value in SIZES.items() if hasattr(model_class.config_class(), key)}
        torch.manual_seed(0)
        model_class(model_class.config_class(vocab_size=len(tokenizer), **known, **special)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return missing


def load_dataset(path: str, name: str, split: str | None = None, streaming: bool = False) -> Any:
    """In place of `datasets.load_dataset`: prompts of the kind that the name says."""
    from datasets import Dataset, DatasetDict

    if path != f"{OWNER}/zen":
        raise FileNotFoundError(f"{path} is not among the local data sets")
    is_chat = name.startswith("conversational")
    rows = [[{"role": "user", "content": prompt}] if is_chat else prompt for prompt in PROMPTS]
    splits = DatasetDict(train=Dataset.from_dict({"prompt": rows}), test=Dataset.from_dict({"prompt": rows[:2]}))
    if streaming:
        splits = {key: value.to_iterable_dataset() for key, value in splits.items()}
    return splits if split is None else splits[split]


def trainer_of(mode: str) -> Any:
    """The class that the tests get as `trl.GRPOTrainer`."""
    import trl

    from expo_kernels.integrations.trl import ExpoGRPOTrainer

    class Plain(ExpoGRPOTrainer):
        """GRPO."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{"rho": "constant", "curriculum": "uniform"} | options)

    return {"trl": trl.GRPOTrainer, "plain": Plain, "expo": ExpoGRPOTrainer}[mode]


def main() -> int:
    """Run the tests; return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder that contains TRL's tests/")
    parser.add_argument("mode", choices=("trl", "plain", "expo"))
    arguments, options = parser.parse_known_args()
    path = arguments.checkout.resolve() / FILE
    if not path.exists():
        parser.error(f"{path} does not exist; give a checkout of TRL's repository")
    with tempfile.TemporaryDirectory() as cache:
        # read when huggingface_hub is imported
        os.environ |= {"HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        import datasets
        import pytest
        import torch
        import trl

        missing = save_models(path.read_text(encoding="utf-8"), Path(cache))
        print(f"not available here: {', '.join(missing)}", file=sys.stderr)
        if not torch.cuda.is_available():
            # Liger's kernels need a GPU; once applied, they stay in transformers' classes for all later tests
            importlib.import_module("trl.import_utils").is_liger_kernel_available = lambda *_, **__: False
        datasets.load_dataset = load_dataset
        trl.GRPOTrainer = trainer_of(arguments.mode)
        return int(pytest.main([str(path), f"--rootdir={arguments.checkout}", "-p", "no:cacheprovider", *options]))


if __name__ == "__main__":
    sys.exit(main())
