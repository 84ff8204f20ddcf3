"""The memory of a run on a CPU: the estimate is within 15 % of the largest resident set that the run reaches."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from expo.config import parse_command_line
from expo.ledger import MODEL_PATH
from expo.planning.checks import check_run
from expo.planning.machine import bare_machine
from expo.planning.memory import GIB, Footprint
from tests import ROOT

pytestmark = pytest.mark.slow  # each case is a run of two steps

QUICK = ("--run.steps=2", "--optimizer.warmup_steps=1", "--evaluation.sets={}", "--run.threads=1")
BATCH = ("--rollout.questions_per_step=8", "--policy.micro_batch_tokens=1024")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of 46 million random weights with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(folder)
    return folder


def measured_bytes(arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "expo.train", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    *_, last = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return json.loads(last)["memory_peak_gib"] * GIB


def planned_bytes(arguments):
    invocation = parse_command_line([*arguments, "--dry-run"])
    config, machine = invocation.config, bare_machine(invocation)
    facts = check_run(config, machine)
    longest = max(facts.prompt_lengths)
    return Footprint(config, facts.shape, machine.num_ranks, longest, on_cpu=machine.is_cpu).peak()[1]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--policy.lora_rank=8",),
        ("--policy.dtype=bfloat16",),
        ("--rollout.questions_per_step=16", "--policy.gradient_checkpointing=true"),
    ],
)
def test_the_embedded_model(flags, tmp_path):
    arguments = [*QUICK, f"--run.dir={tmp_path / 'run'}", "--run.device=cpu", *flags]
    assert planned_bytes(arguments) == pytest.approx(measured_bytes(arguments, tmp_path), rel=0.15)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--policy.zero_stage=2",),
        ("--policy.lora_rank=8", "--policy.gradient_checkpointing=true"),
        ("--policy.dtype=bfloat16", "--policy.packing=true"),
    ],
)
def test_a_larger_model(flags, model, tmp_path):
    own = (f"--model.path={model}", f"--run.dir={tmp_path / 'run'}", "--run.device=cpu")
    arguments = [*QUICK, *BATCH, *own, *flags]
    assert planned_bytes(arguments) == pytest.approx(measured_bytes(arguments, tmp_path), rel=0.15)
