"""Evaluations with vLLM: top_p, temperature 0, and the same scores as with the transformers engine."""

import json

import pytest
import torch

from expo import ledger
from expo.config import load_config
from expo.evaluate import evaluate_model
from expo.evaluation.config import parse_command_line
from expo.evaluation.frozen import FrozenPolicy
from expo.rollout import GenerationRequest, Sampling, request_seed
from expo.train import train
from tests.trainer.evaluation.test_evaluate import LAYOUTS, in_layout
from tests.vllm.conftest import PROMPTS


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_p_draws_from_the_nucleus_only(pair, top_p):
    batch = [
        GenerationRequest(prompt, [request_seed("top_p", row, n) for n in range(64)])
        for row, prompt in enumerate(PROMPTS)
    ]
    for request, group in zip(batch, pair.engine.generate(batch, Sampling(0.7, 1, top_p)), strict=True):
        with torch.no_grad():
            logits = pair.policy.model(torch.tensor([list(request.prompt_ids)])).logits[0, -1]
        likeliest, order = torch.softmax(logits / 0.7, -1).sort(descending=True)
        kept = set(order[likeliest.cumsum(0) - likeliest < top_p].tolist())
        drawn = {reply.token_ids[0] for reply in group}
        assert drawn <= kept
        assert len(drawn) > 1 or len(kept) == 1


def test_temperature_zero_is_greedy(pair):
    batch = [GenerationRequest(prompt, [0, 1]) for prompt in PROMPTS]
    for request, group in zip(batch, pair.engine.generate(batch, Sampling(0.0, 1)), strict=True):
        with torch.no_grad():
            logits = pair.policy.model(torch.tensor([list(request.prompt_ids)])).logits[0, -1]
        assert {reply.token_ids[0] for reply in group} == {int(logits.argmax())}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The last checkpoint of a run of three steps."""
    values = {
        "run.dir": str(tmp_path_factory.mktemp("trained") / "run"), "run.steps": 3, "run.checkpoint_every": 3,
        "rollout.questions_per_step": 8, "optimizer.warmup_steps": 1, "evaluation.sets": {},
    }  # fmt: skip
    return train(load_config(None, list(values.items()))) / "checkpoints" / "step-000003"


def test_both_engines_give_a_checkpoint_the_same_pass_at_1_within_its_interval(trained, tmp_path):
    """The sets are its held-out set, and the same questions in the column layout of each published benchmark."""
    sets = ["ledger:held_out"]
    for path in LAYOUTS:
        like = json.loads(path.read_text().splitlines()[0])
        rows = [in_layout(like, question, index) for index, question in enumerate(ledger.held_out_questions()[::12])]
        (tmp_path / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets.append(str(tmp_path / path.name))
    results = {}
    for engine in ("transformers", "vllm"):
        argv = [str(trained), "--sets", *sets, "--num-samples=8", "--engine", engine, "--out", str(tmp_path / engine)]
        folder = evaluate_model(parse_command_line(argv))
        results[engine] = json.loads((folder / "results.json").read_text())
        assert results[engine]["protocol"]["engine"] == engine
    models = [found["model"] for found in results.values()]
    assert models[0] == models[1]
    assert models[0]["checkpoint"] == "step-000003"
    config = load_config(None)
    start = FrozenPolicy(config.model, config.policy, torch.device("cpu"))
    assert models[0]["weights_sha256"] != start.checksum(), "three steps have moved the weights"
    assert set(results["vllm"]["sets"]) == {"held_out", *(path.stem for path in LAYOUTS)}
    for one, other in (("transformers", "vllm"), ("vllm", "transformers")):
        for name, found in results[one]["sets"].items():
            interval, theirs = found["pass_at"]["1"], results[other]["sets"][name]["pass_at"]["1"]
            assert interval["low"] < theirs["mean"] < interval["high"], name
