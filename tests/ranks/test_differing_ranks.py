"""Ranks that were given different things are refused before the first step; the error names the rank and the thing."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from expo.ledger import MODEL_PATH
from tests.ranks.running import argv, launch, log_of, run_launches, write_questions

pytestmark = pytest.mark.slow
QUESTIONS, MODEL = {"data__train": "./sums.jsonl"}, {"model__path": "./model"}
ANSWERS = [4, 5, 6, 7, 8, 9]
DIGEST = "sha256 [0-9a-f]{16}"
# what the error says, settings of all ranks, further arguments of one rank
CASES = {
    "answers": (f"the answers of data.train: {DIGEST} on rank 1, {DIGEST} on rank 0; give every rank", QUESTIONS, {}),
    "order": ("the order of the questions of data.train and in 1 more: sha256 .* on rank 1, ", QUESTIONS, {}),
    "number": (r"the number of questions of data.train and in \d more: 5 on rank 1, 6 on rank 0; ", QUESTIONS, {}),
    "weights": ("model.safetensors of model.path: .* bytes, sha256 .* on rank 1, ", MODEL, {}),
    "tokenizer": ("tokenizer_config.json of model.path: .* bytes, sha256 .* on rank 1, ", MODEL, {}),
    "lr": (
        "optimizer.lr: 0.001 on rank 1, 0.0002 on rank 0; start every rank with the same",
        {},
        {1: ["--optimizer.lr=1e-3"]},
    ),
    "seed": ("run.seed: 7 on rank 1, 0 on rank 0; ", {}, {1: ["--run.seed=7"]}),
    "resume": ("--resume: True on rank 1, False on rank 0; ", {}, {1: ["--resume"]}),
}


def write_files(folder):
    """The files that relative paths name in a working folder."""
    folder.mkdir(exist_ok=True)
    write_questions(folder / "sums.jsonl", ANSWERS)
    shutil.copytree(MODEL_PATH, folder / "model")
    return folder


def change_files(folder, case):
    """Changes one thing in the files."""
    questions, tokenizer = folder / "sums.jsonl", folder / "model" / "tokenizer_config.json"
    lines = questions.read_text().splitlines(keepends=True)
    match case:
        case "answers":
            write_questions(questions, [*ANSWERS[:-1], 10])
        case "order":
            questions.write_text("".join([lines[1], lines[0], *lines[2:]]))
        case "number":
            questions.write_text("".join(lines[:-1]))
        case "weights":
            weights = load_file(folder / "model" / "model.safetensors")
            next(iter(weights.values())).view(-1)[0] += 1e-3
            save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
        case "tokenizer":
            tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "padding_side": "right"}))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of runs whose ranks differ, and the exit codes of each."""
    folder, plan = write_files(tmp_path_factory.mktemp("runs")), []
    for case, (_, settings, further) in CASES.items():
        elsewhere = write_files(folder / f"{case}-of-rank-1")
        change_files(elsewhere, case)
        fault = {"phase": "join", "do": "move", "path": str(elsewhere), "on_ranks": [1]}
        plan.append(launch(case, argv(folder, case, **settings), fault=fault, further=further))
    return folder, run_launches(folder, plan)


@pytest.mark.parametrize("case", CASES)
def test_the_rank_and_the_difference_are_named(ended, case):
    folder, codes = ended
    assert codes[case] == [2, 2], log_of(folder, case) + log_of(folder, case, rank=1)
    (line,) = log_of(folder, case).splitlines()
    assert re.search(f"error: the ranks differ in {CASES[case][0]}", line), line
    assert log_of(folder, case, rank=1) == ""
    assert not (folder / case).exists(), "the run has not begun"
