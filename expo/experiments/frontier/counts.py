"""Counts correct replies to held-out questions: n for each, of which pass@k is estimated without bias."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from expo.config import RunConfig
from expo.learner.model import load_model
from expo.ledger import LedgerQuestion
from expo.ledger.questions import running_totals
from expo.ledger.tokenizer import BOXED
from expo.rewards.build import build_verifier
from expo.rollout import GenerationRequest, Sampling, request_seed
from expo.rollout.transformers import TransformersEngine


@dataclass(frozen=True)
class Counts:
    """For each question, how many of its replies are correct, with every running total right, and how many have the
    right last total, which may be a guess."""

    correct: list[int]
    last_total: list[int]


def count_correct(folder: Path, config: RunConfig, questions: Sequence[LedgerQuestion], num_replies: int) -> Counts:
    """Correct replies among `num_replies` to each question, graded as in training, and those whose last total is right.

    Args:
        folder: a model and its tokenizer.
        config: of the run; its seed, temperature, reply length and verifier are used. Runs of one seed use the same
            random numbers, so they differ by the models alone.
        questions: shown to the model as they are.
        num_replies: n, replies to each question.
    """
    section = config.model.model_copy(update={"path": str(folder)})
    model, tokenizer = load_model(section, torch.device("cpu"))
    engine = TransformersEngine(model, tokenizer, config.rollout.batch_size)
    requests = [
        GenerationRequest(
            tokenizer.encode(question.question, add_special_tokens=False),
            [request_seed(config.run.seed, "count", question.question, sample) for sample in range(num_replies)],
        )
        for question in questions
    ]
    groups = engine.generate(requests, Sampling(config.rollout.temperature, config.rollout.max_new_tokens))
    counts = Counts([], [])
    with build_verifier(config.reward, questions[0].question) as verifier:
        for question, group in zip(questions, groups, strict=True):
            texts = [reply.text for reply in group]
            distinct = sorted(set(texts))
            verdicts = verifier.grade(distinct, [question.answer] * len(distinct))
            is_correct = {text: verdict.kind == "correct" for text, verdict in zip(distinct, verdicts, strict=True)}
            counts.correct.append(sum(is_correct[text] for text in texts))
            boxed = f"{BOXED}{running_totals(question.question)[-1]}}}"
            counts.last_total.append(sum(text.strip().endswith(boxed) for text in texts))
    return counts
