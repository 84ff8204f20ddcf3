"""Run folders written as the trainer writes them."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from expo import report

HOSTILE = "<script>alert('1 & 2')</script> </pre> \\boxed{12}"
CONFIG = {
    "run": {"seed": 3, "steps": 60},
    "model": {"path": "ledger"},
    "data": {"train": "ledger:train"},
    "rollout": {"group_size": 8, "temperature": 1.0},
    "curriculum": {"kind": "gcs", "mean": 0.5, "std": 0.35, "momentum": 0.9},
    "kl": {"beta": 0.02, "rho": "tanh", "estimator": "k3"},
    "policy": {"dtype": "float32"},
    "evaluation": {"num_samples": 64},
}
ENVIRONMENT = {
    "started": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789ab",
    "command": ["train.py", "--run.seed=3"],
    "versions": {"torch": "2.9.0", "transformers": "5.10.0", "absent": None},
    "machine": {"python": "3.11.7", "cpus": 2, "gpus": []},
}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def pass_at(skill: float, width: float = 0.05) -> dict[str, dict[str, float]]:
    """Estimates at k = 1, 8, 32 of questions that are each solved with probability `skill`."""
    means = {k: 1 - (1 - skill) ** (0.3 * k + 0.7) for k in (1, 8, 32)}
    return {
        str(k): {"mean": mean, "low": max(0, mean - width), "high": min(1, mean + width)} for k, mean in means.items()
    }


def scores(skill: float) -> dict[str, Any]:
    """Two sets: six levels that training uses and two that it does not."""

    def set_scores(levels: range, num_questions: int) -> dict[str, Any]:
        by_level = {
            f"steps-{level}": {"num_questions": 40, "pass_at": pass_at(skill ** (1 + 0.35 * level), 0.08)}
            for level in levels
        }
        overall = pass_at(skill ** (1 + 0.35 * sum(levels) / len(levels)))
        return {"num_questions": num_questions, "pass_at": overall, "by_level": by_level}

    return {"held_out": set_scores(range(1, 7), 240), "beyond": set_scores(range(7, 9), 80)}


def metrics_of(step: int, num_steps: int, rng: random.Random) -> dict[str, Any]:
    done = step / max(num_steps, 1)
    accuracy = min(1.0, max(0.0, 0.42 + 0.25 * (1 - math.exp(-3 * done)) + rng.gauss(0, 0.035)))
    record = {
        "step": step,
        "accuracy": accuracy,
        "beta_eff": 0.02 * (math.tanh(accuracy) + 1) / 2,
        "kl": 0.0 if step == 1 else 0.11 * (1 - math.exp(-2 * done)) + abs(rng.gauss(0, 0.006)),
        "entropy": 0.62 * math.exp(-1.1 * done) + rng.gauss(0, 0.01),
        "loss": rng.gauss(0, 0.01),
        "grad_norm": 0.5,
        "learning_rate": 2e-4,
        "completion_length": 17.2 + 1.4 * done + rng.gauss(0, 0.3),
        "tokens_per_second": 5200 + rng.gauss(0, 100),
        "clip_low_fraction": 0.004 * done,
        "clip_high_fraction": 0.009 * done + abs(rng.gauss(0, 0.001)),
        "ratio_mean": 1.0,
        "ratio_max": 1.2,
        "unparsed_fraction": 0.06 * math.exp(-6 * done),
        "timeout_fraction": 0.0,
        "truncated_fraction": 0.02 * math.exp(-4 * done),
        "zero_variance_fraction": 0.12 + 0.1 * done + rng.gauss(0, 0.02),
        "effective_sample_size": 900.0,
        "seconds/rollout": 0.42 + rng.gauss(0, 0.02),
        "seconds/reward": 0.03,
        "seconds/reference": 0.13,
        "seconds/old": 0.0,
        "seconds/update": 0.55 + rng.gauss(0, 0.02),
        "seconds/curriculum": 0.002,
    }
    if step % 20 == 0:
        record["seconds/checkpoint"] = 0.2
    record["seconds"] = 0.05 + sum(value for key, value in record.items() if key.startswith("seconds/"))
    return record


def histogram_at(done: float, rng: random.Random) -> list[int]:
    """Pass rates that all start at 0.5 and spread upwards."""
    counts = [0] * 20
    for question in range(1000):
        goal = (question / 1000) ** 0.5
        rate = 0.5 + (goal - 0.5) * min(1, 1.2 * done) + rng.gauss(0, 0.04 * done)
        counts[min(19, max(0, int(20 * rate)))] += 1
    return counts


def completion(step: int, question: int, *, is_correct: bool) -> dict[str, Any]:
    return {
        "step": step,
        "question_id": question,
        "question": f"{question}+5-2+8=",
        "answer": str(question + 11),
        "reply": f"{question + 5},{question + 3},\\boxed{{{question + 11 if is_correct else question + 1}}}",
        "verdict": "correct" if is_correct else "wrong",
        "reward": float(is_correct),
        "num_tokens": 15,
        "truncated": False,
        "level": "steps-3",
    }


def fake_run(folder: Path, num_steps: int = 60, *, is_finished: bool = True) -> Path:
    """A run folder as the trainer writes it; an unfinished run stopped before its last evaluation."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    steps = range(1, num_steps + 1)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    write_lines(folder / "metrics.jsonl", [metrics_of(step, num_steps, rng) for step in steps])
    histograms = [(step, histogram_at(step / num_steps, rng)) for step in steps if step % 2 == 0]
    rows = [{"step": s, "histogram": h, "visited": 900, "num_questions": 1000} for s, h in [(0, [0] * 20), *histograms]]
    rows[0]["histogram"] = [0] * 10 + [1000] + [0] * 9
    write_lines(folder / "curriculum.jsonl", rows)
    skills = [
        (step, 0.62 + 0.22 * (1 - math.exp(-3 * step / max(num_steps, 1)))) for step in range(0, num_steps + 1, 20)
    ]
    evaluations = [
        {"step": step, "seconds": 20.0, "num_samples": 64, "temperature": 1.0, "sets": scores(skill)}
        for step, skill in (skills if is_finished else skills[:1])
    ]
    write_lines(folder / "evaluations.jsonl", evaluations)
    replies = [completion(s, q, is_correct=(s + q) % 3 != 0) for s in steps if s % 10 == 1 for q in range(9)]
    write_lines(folder / "completions.jsonl", replies)
    if is_finished:
        sets = {"before": evaluations[0]["sets"], "after": evaluations[-1]["sets"]}
        summary = {"seed": 3, "commit": "0123456789ab", "seconds": 203.0, "steps": num_steps, **sets}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def one_set(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"held_out": {"num_questions": 240, "pass_at": {"1": {"mean": mean, "low": low, "high": high}}}}


def page_of(run: Path) -> str:
    return report.write_report(run).read_text(encoding="utf-8")


def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the page alone, since drawing takes most of a report's time."""
    monkeypatch.setattr(report, "draw_figures", lambda history: [])


def report_code(run: Path) -> int:
    """The exit code of the report's command line."""
    try:
        return report.main([str(run)])
    except SystemExit as end:
        return int(end.code or 0)
