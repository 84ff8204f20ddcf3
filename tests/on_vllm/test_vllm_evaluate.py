"""Evaluations with vLLM: the distribution that top_p cuts, and the scores of a model that both engines know."""

import json

import pytest
import torch

from expo import ledger
from expo.evaluate import measure
from expo.evaluation.options import parse_command_line
from expo.rollout import Request, Sampling, request_seed
from tests.on_vllm.conftest import PROMPTS


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_p_draws_from_the_likeliest_tokens_alone(pair, top_p):
    asked = [Request(prompt, [request_seed("top_p", row, n) for n in range(64)]) for row, prompt in enumerate(PROMPTS)]
    for request, group in zip(asked, pair.engine.generate(asked, Sampling(0.7, 1, top_p)), strict=True):
        with torch.no_grad():
            logits = pair.policy.model(torch.tensor([list(request.prompt_ids)])).logits[0, -1]
        likeliest, order = torch.softmax(logits / 0.7, -1).sort(descending=True)
        kept = set(order[likeliest.cumsum(0) - likeliest < top_p].tolist())
        drawn = {reply.token_ids[0] for reply in group}
        assert drawn <= kept
        assert len(drawn) > 1 or len(kept) == 1


def test_temperature_zero_takes_the_likeliest_token(pair):
    asked = [Request(prompt, [0, 1]) for prompt in PROMPTS]
    for request, group in zip(asked, pair.engine.generate(asked, Sampling(0.0, 1)), strict=True):
        with torch.no_grad():
            logits = pair.policy.model(torch.tensor([list(request.prompt_ids)])).logits[0, -1]
        assert {reply.token_ids[0] for reply in group} == {int(logits.argmax())}


def test_both_engines_give_the_same_pass_at_1_within_its_interval(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"question": q.question, "answer": q.answer} for q in ledger.held_out_questions()[::12]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for engine in ("transformers", "vllm"):
        argv = ["ledger", "--sets", str(path), "--num-samples=16", "--engine", engine, "--out", str(tmp_path / engine)]
        folder = measure(parse_command_line(argv))
        results = json.loads((folder / "results.json").read_text())
        assert results["protocol"]["engine"] == engine
        found[engine] = results["sets"]["sums"]["pass_at"]["1"]
    for one, other in (("transformers", "vllm"), ("vllm", "transformers")):
        assert found[one]["low"] < found[other]["mean"] < found[one]["high"]
