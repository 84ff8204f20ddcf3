"""pass@k on questions that are not trained on, with intervals: within a run, and of any model on any sets.

    python -m expo.evaluate MODEL --sets [NAME=]SOURCE ... --num-samples 64 --temperature 0.6 --out DIR
    python -m expo.evaluate compare A B

Replies are seeded by question and sample number alone: two evaluations use the same random numbers, and in float32 on
a CPU the order in which questions are prompts, or where an evaluation was interrupted, changes nothing. On GPUs or in
bfloat16 the shape of a batch moves the rounding of its log-probs, and so, now and then, a token.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from expo.config import EvaluationSection
from expo.errors import ExpoError, StopRequested
from expo.evaluation import compare
from expo.evaluation.config import PROGRAM, Invocation, parse_command_line
from expo.evaluation.protocol import REPLIES, RESULTS, read_replies
from expo.evaluation.scores import (
    by_question,
    majority_scores,
    mean_with_interval,
    num_correct,
    pass_at_k,
    powers_of_two,
    score_set,
)
from expo.evaluation.session import Evaluation, open_evaluation
from expo.evaluation.tables import scores_table
from expo.rewards.answers import judge_exactly
from expo.rewards.groups import GradedRollouts, Grader, grade
from expo.rollout import GenerationRequest, RolloutEngine, Sampling, request_seed
from expo.run.environment import describe_environment
from expo.runtime.cli import fail
from expo.runtime.distributed import leave_ranks
from expo.types import Prompt

__all__ = ["ask", "evaluate", "main", "measure", "pass_at_k"]

KS = (1, 8, 32)  # of evaluations within a run
PAIRS_AT_ONCE = 512  # stated answers compared between two looks at the clock and at signals
CHUNK_BATCHES = 4  # batches of replies between two writes: what an evaluation that dies has to make again, at most


def ask(
    engine: RolloutEngine,
    verifier: Grader,
    prompts: Sequence[Prompt],
    config: EvaluationSection,
    max_new_tokens: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> GradedRollouts:
    """evaluation.num_samples graded replies to each question."""
    requests = [
        GenerationRequest(
            prompt.prompt_ids,
            [request_seed(seed, "evaluate", prompt.question.id, i) for i in range(config.num_samples)],
        )
        for prompt in prompts
    ]
    sampling = Sampling(config.temperature, max_new_tokens, config.top_p)
    return grade(verifier, prompts, engine.generate(requests, sampling, on_progress))


def evaluate(
    engine: RolloutEngine,
    verifier: Grader,
    sets: Mapping[str, Sequence[Prompt]],
    config: EvaluationSection,
    max_new_tokens: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """pass@k for k = 1, 8, 32 (where n allows) of every set, as a whole and by level, and what was not answered.

    Replies are seeded as `ask` does, so the difference of two evaluations in a run is the policies'.
    """
    started = time.perf_counter()
    n = config.num_samples
    ks = [k for k in KS if k < n or k == n == 1]
    results = {}
    for name, prompts in sets.items():
        graded = ask(engine, verifier, prompts, config, max_new_tokens, seed, on_progress)
        results[name] = score_set(graded.rows(), n, ks, ks)
    return {
        "seconds": time.perf_counter() - started,
        "num_samples": n,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "sets": results,
    }


def measure(invocation: Invocation) -> Path:
    """Evaluates a model, from where an earlier attempt stopped, and returns the folder of results.

    Every rank calls it; each samples and grades its share of the replies.

    Raises:
        ConfigError: if the evaluation cannot be, or the folder holds another.
        CheckpointError: if the checkpoint prompts for is not there or not whole.
        GoldError: if a gold answer turned out to be one that replies cannot be graded against.
        SyncError: if the rollout engine's weights turned out not to be the model's.
        StopRequested: if it was prompts to stop; all whole questions are kept.
    """
    with open_evaluation(invocation) as parts:
        left = list(chunks_left(parts))
        if left:
            sample(parts, left)
        if parts.ranks.is_rank0:
            finish(parts)
        return parts.folder.path


def sample(parts: Evaluation, left: Sequence[tuple[str, Sequence[Prompt]]]) -> None:
    """Writes down the replies to what is left, portion by portion, and then where and how long that took."""
    started = time.perf_counter()
    config, n = parts.config, parts.config.evaluation.num_samples
    with parts.watchdog.phase("start", config.deadline.start):
        engine = parts.start_engine()
    total = n * sum(len(prompts) for prompts in parts.sets.values())
    with parts.display.bar("replies", total, done=n * sum(parts.done.values())) as bar:
        for name, chunk in left:
            with parts.watchdog.phase("evaluation", config.deadline.evaluation):
                graded = ask(
                    engine,
                    parts.verifier,
                    chunk,
                    config.evaluation,
                    config.rollout.max_new_tokens,
                    config.run.seed,
                    on_progress=bar.advance,
                )
            rows = enumerate(graded.rows())
            parts.folder.append(REPLIES, *({"set": name, "sample": index % n, **row} for index, row in rows))
    took = {"ranks": parts.ranks.size, "seconds": time.perf_counter() - started}
    parts.folder.write_json("environment.json", {**describe_environment(), **took})


def chunks_left(parts: Evaluation) -> Iterator[tuple[str, Sequence[Prompt]]]:
    """Set by set the questions that have no replies yet, in portions that are written down together."""
    replies = CHUNK_BATCHES * parts.config.rollout.batch_size * parts.ranks.size
    size = max(replies // parts.config.evaluation.num_samples, parts.ranks.size)
    for name, prompts in parts.sets.items():
        for start in range(parts.done.get(name, 0), len(prompts), size):
            yield name, prompts[start : start + size]


def finish(parts: Evaluation) -> None:
    """Writes results.json, the same bytes for evaluations of equal replies, and prints its table."""
    n = parts.config.evaluation.num_samples
    replies = read_replies(parts.folder.path / f"{REPLIES}.jsonl", list(parts.sets))
    scores = {name: summarise(rows, n, parts) for name, rows in replies.items()}
    parts.folder.write_json(RESULTS, {**parts.facts, "sets": scores})
    parts.display.line(scores_table(scores, n))
    parts.display.line(f"results: {parts.folder.path / RESULTS}")


def summarise(rows: Sequence[Mapping[str, Any]], n: int, parts: Evaluation) -> dict[str, Any]:
    """All that results.json says of a set: pass@k for every k up to n, the majority's score, lengths, each question."""
    groups = list(by_question(rows, n))
    majority = majority_scores(groups, lambda pairs: agreements(parts, pairs))
    found = score_set(rows, n, range(1, n + 1), powers_of_two(n))
    return {
        **found,
        "mean_at_n": found["pass_at"]["1"],
        "maj_at_n": mean_with_interval(majority),
        "mean_length": sum(row["num_tokens"] for row in rows) / len(rows),
        "questions": [
            {
                "id": group[0]["question_id"],
                "level": group[0]["level"],
                "correct": num_correct(group),
                "majority": score,
            }
            for group, score in zip(groups, majority, strict=True)
        ],
    }


def agreements(parts: Evaluation, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the two stated answers of each pair are one; each pair is looked at once.

    Formulas may take reward.timeout_s each, so those have a bar, and every portion of them a deadline.
    """
    same: dict[tuple[str, str], bool] = {}
    slow: list[tuple[str, str]] = []
    for pair in dict.fromkeys(pairs):
        is_same = judge_exactly(*pair)
        if is_same is None:
            slow.append(pair)
        else:
            same[pair] = is_same
    if not slow:
        return [same[pair] for pair in pairs]
    with parts.display.bar("answers compared", len(slow)) as bar:
        for start in range(0, len(slow), PAIRS_AT_ONCE):
            parts.switch.check()
            portion = slow[start : start + PAIRS_AT_ONCE]
            with parts.watchdog.phase("evaluation", parts.config.deadline.evaluation):
                same.update(zip(portion, parts.agree(portion), strict=True))
            bar.advance(len(portion))
    return [same[pair] for pair in pairs]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when the evaluation is done, 1 when it was stopped or could not go on, 2 when it cannot be.

    What is wrong is one line on stderr. 75 is the exit code of a phase that outlasted its deadline.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["compare"]:
        return compare.main(given[1:])
    invocation = parse_command_line(given)
    try:
        measure(invocation)
    except StopRequested as request:
        fail(PROGRAM, StopRequested(f"stopped by {request}; the same command goes on"))
    except ExpoError as error:
        fail(PROGRAM, error)
    leave_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
