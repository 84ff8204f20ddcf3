"""The table of shapes: its parameter counts are the hub's, and those of transformers' own modules."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from expo.learner.flops import ModelShape
from expo.planning.models import KNOWN, known_config

# parameters that the hub shows for the safetensors of each model, without a second copy of a tied head
ON_THE_HUB = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-Coder-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "HuggingFaceTB/SmolLM-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
}


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_parameters_are_those_that_the_hub_shows(name):
    assert ModelShape.from_config(known_config(name)).num_parameters == ON_THE_HUB[name]


def distinct_shapes():
    """One name for each shape of the table."""
    return list({str({**values, "max_position_embeddings": 0}): name for name, values in KNOWN.items()}.values())


@pytest.mark.parametrize("name", distinct_shapes())
def test_parameters_are_those_of_transformers_modules(name):
    config = known_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert ModelShape.from_config(config).num_parameters == sum(value.numel() for value in model.parameters())


def test_ids_are_found_in_any_case_and_others_are_not():
    assert known_config("qwen/qwen2.5-0.5b-instruct").hidden_size == 896
    assert known_config("someone/Qwen2.5-0.5B") is None
    assert known_config("Qwen/Qwen3-8B-Base").max_position_embeddings == 32768
