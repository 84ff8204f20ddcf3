"""How hard the questions of a plan are for its initial models: `python -m expo.experiments.frontier.difficulty`.

It writes difficulty.json beside the results: pass@k before training, for every kind of question in a training pool and
in the held-out sets, n replies to each question. It is no result of the plan, but what the plan was made from.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expo.config import parse_command_line
from expo.experiments.frontier.analysis import pass_at_k
from expo.experiments.frontier.counts import count_correct
from expo.experiments.frontier.plan import BASELINE, FRONTIER, RunKey
from expo.experiments.frontier.warm_starts import warm_start_folder, weights_sha256
from expo.ledger import LedgerQuestion
from expo.runtime.atomic_io import write_bytes_whole

PROGRAM = "python -m expo.experiments.frontier.difficulty"
KS = (1, 8, 32, 128)


def difficulty(folder: Path, seed: int, num_replies: int) -> dict[str, dict[str, float]]:
    """pass@k of one initial model by kind of question, of the pool of `seed` and of the held-out sets."""
    flags = FRONTIER.run_flags(RunKey(BASELINE, FRONTIER.betas[0], seed), FRONTIER.betas[0])
    config = parse_command_line([*flags, "--data.train=ledger:train"], PROGRAM).config
    groups: dict[str, list[LedgerQuestion]] = {}
    for question in FRONTIER.train(seed):
        groups.setdefault(f"train, {question.level}", []).append(question)
    for name, draw in FRONTIER.sets.items():
        for question in draw():
            groups.setdefault(f"{name}, {question.level}", []).append(question)
    found = {name: count_correct(folder, config, group, num_replies) for name, group in groups.items()}
    return {
        name: {
            "questions": len(counts.correct),
            **_pass_at("pass", counts.correct, num_replies),
            **_pass_at("last_total", counts.last_total, num_replies),
        }
        for name, counts in found.items()
    }


def _pass_at(name: str, counts: Sequence[int], num_replies: int) -> dict[str, float]:
    correct = torch.tensor(counts)
    return {f"{name}@{k}": round(float(pass_at_k(correct, num_replies, k).mean()), 4) for k in KS}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Measure the initial models of the frontier plan.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/frontier"), metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(FRONTIER.warm_starts), help="of the models")
    parser.add_argument("--num-replies", type=int, default=256, metavar="N", help="to each question")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = options.results / "difficulty.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for seed in options.seeds:
        folder = warm_start_folder(options.results, seed)
        found[str(seed)] = {
            "weights_sha256": weights_sha256(folder),
            "num_replies": options.num_replies,
            "pass_at": difficulty(folder, seed, options.num_replies),
        }
        write_bytes_whole(path, (json.dumps(found, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
