"""Pass@k on questions that are not trained on, with intervals.

Source: the unbiased estimator of Chen et al. (arXiv 2107.03374, eq. 1), pass@k = 1 - C(n - c, k) / C(n, k).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from expo.config import EvaluationSection
from expo.data import Prompted
from expo.graded import Graded, Grader, grade
from expo.rollout import Request, RolloutEngine, Sampling, request_seed

KS = (1, 8, 32)
NUM_RESAMPLES = 2000  # of the bootstrap: the ends of a 95 % interval then move by under 5 % of its width


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k replies, drawn without replacement from n of which c are correct, is correct.

    Source: arXiv 2107.03374, eq. 1, as a running product: exact counts overflow no float.

    Raises: ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k got n = {n}, c = {c}, k = {k}; expected 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over questions and the 95 % percentile-bootstrap interval of it, as mean, low, high."""
    data = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(values), (NUM_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = data[draws].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(data.mean()), "low": low, "high": high}


def evaluate(
    engine: RolloutEngine,
    verifier: Grader,
    sets: Mapping[str, Sequence[Prompted]],
    config: EvaluationSection,
    max_new_tokens: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """pass@k for k = 1, 8, 32 (where n allows) of every set, as a whole and by level, and what was not answered.

    Replies are seeded by question and sample number alone, so two evaluations in a run use the same random numbers
    and their difference is the policies'.
    """
    started = time.perf_counter()
    sampling, n = Sampling(config.temperature, max_new_tokens), config.num_samples
    results = {}
    for name, asked in sets.items():
        requests = [
            Request(
                prompted.prompt_ids,
                [request_seed(seed, "evaluate", prompted.question.id, i) for i in range(n)],
            )
            for prompted in asked
        ]
        graded = grade(verifier, asked, engine.generate(requests, sampling, on_progress))
        results[name] = _summarise_set(graded, n)
    return {
        "seconds": time.perf_counter() - started,
        "num_samples": n,
        "temperature": config.temperature,
        "sets": results,
    }


def _summarise_set(graded: Graded, n: int) -> dict[str, Any]:
    correct = [sum(verdict.kind == "correct" for verdict in group) for group in graded.verdicts]
    by_level: dict[str, list[int]] = {}
    for prompted, count in zip(graded.asked, correct, strict=True):
        by_level.setdefault(prompted.question.level, []).append(count)
    return {
        **_pass_at(correct, n),
        **graded.fractions(),
        "by_level": {level: _pass_at(counts, n) for level, counts in sorted(by_level.items()) if level},
    }


def _pass_at(correct: Sequence[int], n: int) -> dict[str, Any]:
    ks = [k for k in KS if k < n or k == n == 1]
    estimates = {str(k): mean_with_interval([pass_at_k(n, c, k) for c in correct]) for k in ks}
    return {"num_questions": len(correct), "pass_at": estimates}
