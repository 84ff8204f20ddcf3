"""Rollouts by transformers: seeds, the sampled distribution, log-probs, and rows that finish early."""

import pytest
import torch

from expo.rollout import GenerationRequest, Sampling, request_seed
from expo.rollout.transformers import TransformersEngine, _draw
from expo_kernels import token_logps

SAMPLING = Sampling(temperature=1.0, max_new_tokens=24)
QUESTIONS = ("3+8-2+7=", "1+1=", "9+9+9-3-4+2=", "5-5=")


@pytest.fixture(scope="module")
def engine(ledger_model):
    return TransformersEngine(*ledger_model, batch_size=64)


def requests(tokenizer, samples=4):
    return [
        GenerationRequest(tokenizer(text)["input_ids"], [request_seed("test", text, n) for n in range(samples)])
        for text in QUESTIONS
    ]


def test_a_reply_depends_only_on_its_seed_and_prompt(engine, ledger_model):
    batch = requests(ledger_model[1])
    together = engine.generate(batch, SAMPLING)
    alone = [engine.generate([request], SAMPLING)[0] for request in batch]
    small = TransformersEngine(*ledger_model, batch_size=3).generate(batch, SAMPLING)
    tokens = [[reply.token_ids for reply in group] for group in together]
    assert tokens == [[reply.token_ids for reply in group] for group in alone]
    assert tokens == [[reply.token_ids for reply in group] for group in small]
    assert len({tuple(ids) for ids in tokens[2]}) > 1, "four seeds gave one reply"


def test_logps_equal_those_of_a_full_forward_pass(engine, ledger_model):
    model, tokenizer = ledger_model
    for temperature in (0.6, 1.0, 1.3):
        sampling = Sampling(temperature, 24)
        batch = requests(tokenizer)
        for request, group in zip(batch, engine.generate(batch, sampling), strict=True):
            for reply in group:
                ids = torch.tensor([[*request.prompt_ids, *reply.token_ids]])
                with torch.no_grad():
                    logits = model(ids).logits[:, len(request.prompt_ids) - 1 : -1]
                expected = token_logps(logits, torch.tensor([reply.token_ids]), temperature=temperature)
                torch.testing.assert_close(torch.tensor([reply.logps]), expected, atol=5e-5, rtol=0)


def test_replies_end_at_the_end_token_or_are_truncated(engine, ledger_model):
    _, tokenizer = ledger_model
    for group in engine.generate(requests(tokenizer), Sampling(1.0, 3)):
        for reply in group:
            assert len(reply.token_ids) == len(reply.logps) <= 3
            assert tokenizer.eos_token_id not in reply.token_ids[:-1]
            assert reply.is_truncated == (reply.token_ids[-1] != tokenizer.eos_token_id)
            assert tokenizer.eos_token not in reply.text


def test_progress_counts_every_reply(engine, ledger_model):
    counts = []
    engine.generate(requests(ledger_model[1], samples=40), SAMPLING, counts.append)
    assert sum(counts) == 160
    assert len(counts) == 3


def test_generation_restores_the_training_mode(engine, ledger_model):
    model, tokenizer = ledger_model
    for mode in (True, False):
        model.train(mode)
        engine.generate(requests(tokenizer, samples=1), SAMPLING)
        assert model.training == mode


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([[1.0, -1.0, 0.5, -torch.inf, 2.0]])
    uniforms = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    drawn, logps = _draw(logits.expand(len(uniforms), -1), uniforms, Sampling(0.7, 1))
    expected = torch.softmax(logits[0] / 0.7, 0)
    counts = torch.bincount(drawn, minlength=5)
    possible = expected > 0
    chi_square = ((counts - 2e5 * expected)[possible] ** 2 / (2e5 * expected)[possible]).sum()
    assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001
    assert counts[3] == 0
    torch.testing.assert_close(logps, expected.log()[drawn])


def test_the_largest_uniform_number_draws_a_token_of_nonzero_probability():
    logits = torch.full((1, 1003), -torch.inf)
    logits[0, :7] = torch.linspace(-3, 3, 7)
    almost_one = torch.nextafter(torch.ones(1), torch.zeros(1))
    drawn, _ = _draw(logits, almost_one, SAMPLING)
    assert drawn.item() == 6
    drawn, _ = _draw(logits, torch.zeros(1), SAMPLING)
    assert drawn.item() == 0


def test_top_p_draws_from_the_nucleus_in_proportion():
    # at temperature 0.5 the weights are 16, 1, 4, 9: the two largest are the nucleus of probability 0.8
    logits = torch.tensor([[4.0, 1.0, 2.0, 3.0]]).log()
    uniforms = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    drawn, logps = _draw(logits.expand(len(uniforms), -1), uniforms, Sampling(0.5, 1, top_p=0.8))
    expected = torch.tensor([16 / 25, 0.0, 0.0, 9 / 25])
    shares = torch.bincount(drawn, minlength=4) / 1e5
    assert (shares - expected).abs().max() < 0.005  # three standard deviations
    torch.testing.assert_close(logps, expected.log()[drawn])


def test_top_p_keeps_at_least_one_token_and_all_at_one():
    logits = torch.zeros(1, 5)
    assert {int(_draw(logits, torch.tensor([u]), Sampling(1.0, 1, 1e-6))[0]) for u in (0.0, 0.5, 0.99)} == {0}
    assert {int(_draw(logits, torch.tensor([u]), Sampling(1.0, 1, 1.0))[0]) for u in (0.1, 0.3, 0.5, 0.7, 0.9)} == set(
        range(5)
    )


def test_temperature_zero_is_greedy_for_every_seed(engine, ledger_model):
    batch = requests(ledger_model[1], samples=3)
    for request, group in zip(batch, engine.generate(batch, Sampling(0.0, 24)), strict=True):
        assert len({tuple(reply.token_ids) for reply in group}) == 1
        ids = torch.tensor([[*request.prompt_ids, *group[0].token_ids]])
        with torch.no_grad():
            logits = ledger_model[0](ids).logits[0, len(request.prompt_ids) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == group[0].token_ids


def test_a_seed_depends_on_every_part():
    seeds = {request_seed(run, step, q, n) for run in (0, 1) for step in (1, 2) for q in ("a", "b") for n in (0, 1)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
