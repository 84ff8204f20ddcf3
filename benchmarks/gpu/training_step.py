"""Training steps with random weights: one update by hand, replies sampled by vLLM, and this project's trainer."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.check import Check, Measure, Measures, Place, require_package
from expo_kernels import akl_beta, linear_expo_loss, linear_token_logps

# of Qwen2.5, from the models' own config.json
SIZES = {
    "0.5B": {
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, "num_key_value_heads": 2},
    },
    "1.5B": {
        **{"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
        **{"num_attention_heads": 12, "num_key_value_heads": 2},
    },
}
TINY_SIZE = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}
VOCAB_SIZE, TINY_VOCAB_SIZE = 151_936, 512
REPLIES, GROUP_SIZE = 8, 4
VLLM_LOGP_BOUND = 0.1  # nats: two implementations of a bfloat16 model


def make_model(size: dict[str, int], vocab_size: int, device: torch.device) -> Any:
    """A Qwen2 model with random bfloat16 weights."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocab_size, tie_word_embeddings=True, max_position_embeddings=4096, **size)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _check_step(place: Place, name: str) -> Measures:
    """One GRPO update as a trainer makes it: log-probs of old policy and reference, loss, backward, AdamW."""
    require_package("transformers")
    size, vocab_size = place.size((SIZES[name], VOCAB_SIZE), (TINY_SIZE, TINY_VOCAB_SIZE))
    length, prompt_length = place.size((1024, 256), (16, 4))
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
    model = make_model(size, vocab_size, place.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(vocab_size, (REPLIES, length), device=place.device)
    mask = torch.ones_like(ids, dtype=torch.bool)[:, 1:]
    mask[:, : prompt_length - 1] = False
    mask[0, length // 2 :] = False  # a shorter reply
    rewards = torch.arange(REPLIES, device=place.device).remainder(2).float()
    before = model.lm_head.weight.detach()[:1000].clone()

    def hidden_states() -> torch.Tensor:
        states: torch.Tensor = model.model(input_ids=ids).last_hidden_state
        return states[:, :-1]

    with torch.no_grad():
        ref_logps = linear_token_logps(hidden_states(), model.lm_head.weight, ids[:, 1:], mask=mask)
    seconds: list[float] = []
    ratios, losses = [], []
    for _ in range(place.size(3, 1)):
        _wait(place)
        started = time.perf_counter()
        with torch.no_grad():
            old_logps = linear_token_logps(hidden_states(), model.lm_head.weight, ids[:, 1:], mask=mask)
        given = {"rewards": rewards, "group_size": GROUP_SIZE, "old_logps": old_logps, "ref_logps": ref_logps}
        hidden, weight = hidden_states(), model.lm_head.weight
        output = linear_expo_loss(hidden, weight, ids[:, 1:], mask, **given, beta=akl_beta(rewards))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(place)
        seconds.append(time.perf_counter() - started)
        ratios.append(float(output.metrics["ratio_mean"]))
        losses.append(float(output.loss.detach()))
    yield Measure("steps with a loss that is not finite", float(sum(not abs(loss) < 1e6 for loss in losses)), 0.0)
    yield Measure("distance of the first step's mean ratio from 1", abs(ratios[0] - 1), 1e-3)
    changed = (model.lm_head.weight.detach()[:1000] != before).any()
    yield Measure("weights changed", float(changed), 1.0, is_minimum=True)
    place.require_gpu("times of a step, and its peak memory")
    yield Measure("a step", min(seconds), unit="s")
    yield Measure("tokens per second", float(mask.sum()) / min(seconds), unit="1/s")
    yield Measure("peak memory", torch.cuda.max_memory_allocated(place.device) / 2**30, unit="GiB")


def _wait(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def check_small_step(place: Place) -> Measures:
    """An update of the 0.5B shape."""
    return _check_step(place, "0.5B")


def check_large_step(place: Place) -> Measures:
    """An update of the 1.5B shape."""
    return _check_step(place, "1.5B")


def check_vllm(place: Place) -> Measures:
    """Replies that vLLM samples from a model with random weights, and our log-probs of them."""
    require_package("vllm")
    from vllm import LLM, SamplingParams

    model = make_model({**TINY_SIZE, "hidden_size": 256, "num_attention_heads": 4}, TINY_VOCAB_SIZE, place.device)
    prompts = torch.randint(TINY_VOCAB_SIZE, (4, 8)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        limits = {"gpu_memory_utilization": 0.2, "max_model_len": 64, "max_num_seqs": 4}
        engine = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, seed=0, **limits)
        sampling = SamplingParams(temperature=1.0, max_tokens=16, logprobs=0, detokenize=False, ignore_eos=True)
        replies = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    ids = torch.tensor([[*p, *r.outputs[0].token_ids] for p, r in zip(prompts, replies, strict=True)])
    ids = ids.to(place.device)
    reported = [
        [logps[token].logprob for token, logps in zip(r.outputs[0].token_ids, r.outputs[0].logprobs, strict=True)]
        for r in replies
    ]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[:, 7:-1]
        logps = linear_token_logps(hidden, model.lm_head.weight, ids[:, 8:])
    error = float((logps.cpu() - torch.tensor(reported)).abs().max())
    yield Measure("log-probs of vLLM and ours differ by", error, VLLM_LOGP_BOUND, "nats")


def check_trainer(place: Place) -> Measures:
    """Two steps of `python -m expo.train` with its embedded model."""
    for package in ("deepspeed", "pydantic", "transformers", "datasets", "math_verify"):
        require_package(package)
    small = {"rollout.questions_per_step": 4, "rollout.group_size": 4, "evaluation.num_samples": 1}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.steps": 2,
            "run.dir": Path(folder) / "run",
            "run.device": place.device.type,
            "optimizer.warmup_steps": 0,
            **place.size({}, small),
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "expo.train", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
    yield Measure("exit code of two steps", float(done.returncode), 0.0)


CHECKS = {
    "training-step-0.5B": Check("a GRPO update of a 0.5B model runs, on-policy ratios are 1", check_small_step, 90),
    "training-step-1.5B": Check("a GRPO update of a 1.5B model runs, on-policy ratios are 1", check_large_step, 120),
    "vllm": Check("our log-probs of vLLM's replies are vLLM's within 0.1 nats", check_vllm, 180),
    "trainer": Check("two steps of python -m expo.train", check_trainer, 180),
}
