"""Evaluates a model on question sets that are not trained on: pass@k with intervals.

    python -m expo.evaluate MODEL --sets [NAME=]SOURCE ... --num-samples 64 --temperature 0.6 --out DIR
    python -m expo.evaluate compare A B

The seed of a reply depends on the question and the number of the sample alone, so two evaluations use the same random
numbers. In float32 on a CPU, results do not depend on batches or interruptions. On GPUs or in bfloat16, the shape of a
batch changes the rounding of its log-probs and so, occasionally, a sampled token.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from expo.config import EvaluationSection
from expo.errors import StopRequested
from expo.evaluation import compare
from expo.evaluation.config import PROGRAM, EvalArguments, parse_command_line
from expo.evaluation.protocol import RESULTS
from expo.evaluation.replies import REPLIES, read_replies, reply_rows, rows_of_set
from expo.evaluation.results import summarise
from expo.evaluation.scores import pass_at_k, score_set
from expo.evaluation.session import open_evaluation
from expo.evaluation.tables import scores_table
from expo.rewards.groups import GradedRollouts, Grader, grade
from expo.rollout import GenerationRequest, RolloutEngine, Sampling, request_seed
from expo.run.advice import first_unparsed, set_advice
from expo.run.environment import describe_environment
from expo.runtime.distributed import leave_ranks
from expo.runtime.endings import errors_on_one_line, run_and_exit
from expo.runtime.signals import raise_reason
from expo.types import Prompt

__all__ = ["evaluate", "evaluate_model", "main", "pass_at_k", "sample_and_grade"]

KS = (1, 8, 32)  # of evaluations within a run
BATCHES_PER_CHUNK = 4  # batches of replies that are written together; an interruption loses at most these


def sample_and_grade(
    engine: RolloutEngine,
    verifier: Grader,
    prompts: Sequence[Prompt],
    config: EvaluationSection,
    max_new_tokens: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> GradedRollouts:
    """Samples evaluation.num_samples replies to each question and grades them."""
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
    on_scores: Callable[[str, dict[str, Any], GradedRollouts], None] | None = None,
) -> dict[str, Any]:
    """Evaluates the policy of a run.

    All evaluations of a run use the same random numbers, so they differ by the policies alone. `on_scores` is called
    with the name of each set, its scores and its replies.

    Returns: pass@k for k = 1, 8, 32 (where n allows) of every set and of its levels, and the fractions of replies that
        were truncated, unparsed or timed out.
    """
    started = time.perf_counter()
    n = config.num_samples
    ks = [k for k in KS if k < n or k == n == 1]
    scores = {}
    for name, prompts in sets.items():
        graded = sample_and_grade(engine, verifier, prompts, config, max_new_tokens, seed, on_progress)
        scores[name] = score_set(graded.rows(), n, ks, ks)
        if on_scores is not None:
            on_scores(name, scores[name], graded)
    return {
        "seconds": time.perf_counter() - started,
        "num_samples": n,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "sets": scores,
    }


def evaluate_model(arguments: EvalArguments) -> Path:
    """Evaluates a model, or resumes its evaluation, and returns the folder of results.

    Every rank calls it; each rank samples and grades its share of the replies.

    Raises:
        ConfigError: if the evaluation cannot run, or the folder holds another one.
        CheckpointError: if the checkpoint does not exist or is incomplete.
        GoldError: if replies cannot be graded against a gold answer.
        SyncError: if the rollout engine's weights differ from the model's.
        StopRequested: if a signal asked to stop; questions with all their replies are kept.
    """
    with open_evaluation(arguments) as evaluation:
        config, ranks, folder = evaluation.config, evaluation.ranks, evaluation.folder
        display, watchdog, num_done = evaluation.display, evaluation.watchdog, evaluation.num_done
        n = config.evaluation.num_samples
        chunk_size = questions_per_chunk(config.rollout.batch_size, n, ranks.size)
        chunks = remaining_chunks(evaluation.sets, num_done, chunk_size)
        if chunks:
            started = time.perf_counter()
            with watchdog.phase("start", config.deadline.start):
                engine = evaluation.start_engine()
            total = n * sum(len(prompts) for prompts in evaluation.sets.values())
            with display.bar("replies", total, done=n * sum(num_done.values())) as bar:
                for name, prompts in chunks:
                    with watchdog.phase("evaluation", config.deadline.evaluation):
                        graded = sample_and_grade(
                            engine,
                            evaluation.verifier,
                            prompts,
                            config.evaluation,
                            config.rollout.max_new_tokens,
                            config.run.seed,
                            on_progress=bar.advance,
                        )
                    folder.append(REPLIES, *reply_rows(name, graded, n))
            cost = {"ranks": ranks.size, "seconds": time.perf_counter() - started}
            folder.write_json("environment.json", {**describe_environment(), **cost})
        if ranks.is_rank0:
            replies = read_replies(folder.path / f"{REPLIES}.jsonl", list(evaluation.sets))
            scores = summarise(replies, n, evaluation.comparer)
            # equal replies give an equal file, byte for byte
            folder.write_json(RESULTS, {**evaluation.metadata, "sets": scores})
            display.line(scores_table(scores, n))
            for name, found in scores.items():
                unparsed = first_unparsed(partial(rows_of_set, folder.path / f"{REPLIES}.jsonl", name))
                warning = set_advice(name, found, unparsed, evaluation.verifier.why_unparsed, config)
                if warning is not None:
                    display.line(warning)
            display.line(f"results: {folder.path / RESULTS}")
        return folder.path


def questions_per_chunk(batch_size: int, num_samples: int, num_ranks: int) -> int:
    """Questions whose replies are sampled and then written together: BATCHES_PER_CHUNK batches on every rank."""
    return max(BATCHES_PER_CHUNK * batch_size * num_ranks // num_samples, num_ranks)


def remaining_chunks(
    sets: Mapping[str, Sequence[Prompt]], num_done: Mapping[str, int], chunk_size: int
) -> list[tuple[str, Sequence[Prompt]]]:
    """The questions without replies, in chunks of one set each.

    Args:
        num_done: questions at the start of each set that have all their replies.
        chunk_size: questions in a chunk, at most.
    """
    return [
        (name, prompts[start : start + chunk_size])
        for name, prompts in sets.items()
        for start in range(num_done.get(name, 0), len(prompts), chunk_size)
    ]


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`. An error is one line on stderr.

    Exit codes: 0 if the evaluation is complete, 1 if it was stopped or failed, 2 if it cannot start, 75 if a phase
    outlasted its deadline, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:], f"{prog} compare")
    parsed = parse_command_line(arguments, prog)
    with errors_on_one_line(prog):
        try:
            evaluate_model(parsed)
        except StopRequested as request:
            text = f"stopped by {request}; the same command goes on"
            raise_reason(str(request), text)
            raise StopRequested(text) from None
    leave_ranks()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
