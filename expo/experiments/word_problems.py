"""A real language model on arithmetic word problems and on two families of reasoning-gym.

    python -m expo.experiments.word_problems write runs/words
    expo-rl train runs/words/config.yaml --run.dir=runs/words/expo-0 --run.seed=0
    expo-rl train runs/words/config.yaml --run.dir=runs/words/grpo-0 --run.seed=0 --curriculum.kind=uniform \\
        --kl.rho=constant
    python -m expo.experiments.word_problems report runs/words/expo-0 runs/words/grpo-0 ...

`write` makes questions and a configuration; it needs expo-rl[reasoning]. `report` copies the scores of finished runs,
named ARM-SEED, into small files, and prints their table.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from expo.data.reasoning import reasoning_rows
from expo.errors import ConfigError
from expo.experiments.ablation.page import markdown
from expo.experiments.ablation.paired import mean_over_seeds
from expo.reporting.figures import draw_lines
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.endings import errors_on_one_line
from expo.runtime.parser import OneLineParser

PROGRAM = "python -m expo.experiments.word_problems"
NUM_TRAIN, NUM_HELD_OUT = 16, 24  # questions of each kind
PEOPLE, THINGS = ("Mia", "Tom", "Ana", "Ben", "Lea"), ("apples", "books", "coins", "shells", "cards")
FAMILIES = ("chain_sum", "products")  # of reasoning-gym, at level 0: one-digit numbers
CONFIG = """\
# The settings of expo/recipes/laptop.yaml, with longer replies to longer questions.
run:
  steps: 60
  checkpoint_every: 20
model:
  path: models/smollm2-135m
data:
  train: {folder}/train.jsonl
  chat_template: false
  max_prompt_tokens: 100
  template: |
    Lou has 2 pens, gets 6 more and gives away 3. How many pens does Lou have now?
    Answer: 2 + 6 - 3 = 5

    {{question}}
rollout:
  questions_per_step: 4 # 32 replies: half of the recipe's, for prompts of twice the length
  max_new_tokens: 16
  stop_tokens: ["\\n", "\\n\\n"]
  batch_size: 64
objective:
  clip_high: 0.2
  dual_clip: null
policy:
  dtype: float32
  micro_batch_tokens: 2048
  updates_per_step: 1
optimizer:
  lr: 1.0e-5
  weight_decay: 0.0
  warmup_steps: 2
evaluation:
  every: 20
  num_samples: 8
  sets:
{sets}
"""

Question = tuple[str, int]  # text and answer


def word_problem(rng: random.Random) -> Question:
    """A problem of one or two operations on numbers below 20."""
    name, things, a, b = rng.choice(PEOPLE), rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 9)
    end = f"How many {things} does {name} have now?"
    kind = rng.randrange(3)
    if kind == 0:
        return f"{name} has {a} {things} and gets {b} more. {end}", a + b
    c = rng.randint(1, a + b - 1)
    if kind == 1:
        return f"{name} has {a + b} {things} and gives away {c}. {end}", a + b - c
    return f"{name} has {a} {things}, gets {b} more and gives away {c}. {end}", a + b - c


def word_problems(num: int, seed: int = 0) -> list[Question]:
    """Different problems, the same for the same seed."""
    rng = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < num:
        text, answer = word_problem(rng)
        found[text] = answer
    return list(found.items())


def family_questions(family: str, num: int) -> list[Question]:
    """Different questions of a family of reasoning-gym, in random order.

    Raises: ConfigError if reasoning-gym is not installed.
    """
    rows = reasoning_rows(f"reasoning-gym:{family}?level=0&size=500")
    found = {row.text: int(row.answer) for row in rows}
    questions = sorted(found.items())
    random.Random(0).shuffle(questions)
    if len(questions) < num:
        raise ConfigError(f"{family} has {len(questions)} different questions; expected {num}")
    return questions[:num]


def write(folder: Path) -> None:
    """Writes train.jsonl, a file of held-out questions of each kind, and config.yaml."""
    num = NUM_TRAIN + NUM_HELD_OUT
    sets = {"word_problems": word_problems(num), **{family: family_questions(family, num) for family in FAMILIES}}
    folder.mkdir(parents=True, exist_ok=True)
    _write_questions(folder / "train.jsonl", [found for each in sets.values() for found in each[NUM_HELD_OUT:]])
    for name, questions in sets.items():
        _write_questions(folder / f"{name}.jsonl", questions[:NUM_HELD_OUT])
    lines = "\n".join(f"    {name}: {folder}/{name}.jsonl" for name in sets)
    write_bytes_whole(folder / "config.yaml", CONFIG.format(folder=folder, sets=lines).encode())


def _write_questions(path: Path, questions: Iterable[Question]) -> None:
    rows = (json.dumps({"question": text, "answer": answer}) + "\n" for text, answer in questions)
    write_bytes_whole(path, "".join(rows).encode())


def small_result(run: Path) -> dict[str, Any]:
    """Scores, accuracy and cost of a finished run.

    Raises: ConfigError if the run is not finished, or its name is not ARM-SEED.
    """
    arm, _, seed = run.name.rpartition("-")
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        evaluations, metrics = (_rows(run / f"{name}.jsonl") for name in ("evaluations", "metrics"))
        return {
            "arm": arm,
            "seed": int(seed),
            "steps": summary["steps"],
            "reply_tokens": summary["reply_tokens"],
            "seconds": round(summary["seconds"], 1),
            "commits": summary["commits"],
            "accuracy": [round(row["accuracy"], 4) for row in metrics],
            "no_signal": [row["zero_variance_fraction"] for row in metrics],
            "evaluations": [{"step": row["step"], "sets": _scores(row["sets"])} for row in evaluations],
        }
    except (OSError, LookupError, ValueError) as error:
        raise ConfigError(f"{run} is not a finished run named ARM-SEED ({error})") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _scores(sets: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Mean, low and high of each pass@k of each set."""
    return {
        name: {k: [round(each[part], 4) for part in ("mean", "low", "high")] for k, each in found["pass_at"].items()}
        for name, found in sets.items()
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """pass@1 of every run and set before and after training, as Markdown."""
    rows = [("arm", "seed", "set", "pass@1 before", "pass@1 after", "pass@8 before", "pass@8 after", "minutes")]
    for found in sorted(results, key=lambda found: (found["arm"], found["seed"])):
        first, last = found["evaluations"][0]["sets"], found["evaluations"][-1]["sets"]
        for name in first:
            cells = [_cell(scores[name][k]) for k in ("1", "8") for scores in (first, last)]
            rows.append((found["arm"], str(found["seed"]), name, *cells, f"{found['seconds'] / 60:.0f}"))
    return markdown(rows)


def _cell(score: Sequence[float]) -> str:
    mean, low, high = score
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def curves_png(results: Sequence[Mapping[str, Any]]) -> bytes:
    """Held-out pass@1 by step, of every set and arm."""
    arms = sorted({found["arm"] for found in results})
    names = list(results[0]["evaluations"][0]["sets"])
    panels = {
        name: {arm: _line([found for found in results if found["arm"] == arm], name) for arm in arms} for name in names
    }
    return draw_lines(panels, "step", "held-out pass@1")


def _line(results: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float, float]]:
    line = []
    for index, row in enumerate(results[0]["evaluations"]):
        values = [found["evaluations"][index]["sets"][name]["1"][0] for found in results]
        error = mean_over_seeds(values).error if len(values) > 1 else 0.0
        line.append((float(row["step"]), fmean(values), error))
    return line


def report(runs: Sequence[Path], results: Path, figure: Path | None) -> str:
    """Writes the small results of finished runs, and returns the table of all that are there."""
    results.mkdir(parents=True, exist_ok=True)
    for run in runs:
        content = json.dumps(small_result(run), separators=(",", ":")) + "\n"
        write_bytes_whole(results / f"{run.name}.json", content.encode())
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    if not found:
        raise ConfigError(f"{results} has no result; name a finished run")
    if figure is not None:
        write_bytes_whole(figure, curves_png(found))
    return table(found)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 with one line on stderr."""
    parser = OneLineParser(prog=PROGRAM, description="Train a real language model on arithmetic questions.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    written = commands.add_parser("write", help="write questions and a configuration")
    written.add_argument("folder", type=Path, metavar="DIR")
    reported = commands.add_parser("report", help="copy the scores of finished runs, and print the table")
    reported.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    reported.add_argument("--results", type=Path, default=Path("benchmarks/results/word-problems"), metavar="DIR")
    reported.add_argument("--figure", type=Path, metavar="PNG")
    options = parser.parse_args(argv)
    with errors_on_one_line(PROGRAM):
        if options.command == "write":
            write(options.folder)
        else:
            print(report(options.runs, options.results, options.figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
