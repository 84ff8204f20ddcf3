"""ExpoGRPOTrainer compared with TRL's trainer on prompts with images."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen3Config,
)

from tests.integrations.trl_runs import LEDGER_MODEL, QUESTIONS, SIZES, compare

SIDE, PATCH = 8, 4  # pixels
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """A folder with a LLaVA of random weights, and its processor."""
    folder = tmp_path_factory.mktemp("vision") / "model"
    tokenizer = AutoTokenizer.from_pretrained(LEDGER_MODEL, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = Qwen3Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SIZES)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(1)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder, processor


@pytest.mark.parametrize("beta", [0.0, 0.02])
def test_prompts_with_images_give_trls_numbers(vision_model, beta):
    folder, processor = vision_model
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    images = [Image.new("RGB", (SIDE, SIDE), (30 * index, 99, 255 - 30 * index)) for index in range(len(QUESTIONS))]
    extra = {
        "rollout_func": None,
        "train_dataset": Dataset.from_dict({"prompt": prompts, "image": images}),
        "processing_class": processor,
    }
    compare(folder, extra=extra, beta=beta, gradient_accumulation_steps=2)
