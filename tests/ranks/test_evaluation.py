"""Evaluations of what several ranks have trained, and by several ranks."""

import json
import subprocess
import sys

import pytest

from expo.errors import CheckpointError
from expo.evaluate import evaluate_model
from expo.evaluation.config import parse_command_line
from tests.ranks.running import argv, environment, launch, run_launches, write_questions

pytestmark = pytest.mark.slow
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "expo.evaluate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds runs of two steps on two ranks that split every parameter: plain, and with adapters."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"policy__zero_stage": 3, "run__steps": 2, "run__checkpoint_every": 1, "evaluation__every": 0}
    plan = [
        launch("plain", argv(folder, "plain", **settings)),
        launch("adapters", argv(folder, "adapters", policy__lora_rank=4, **settings)),
    ]
    assert set(map(tuple, run_launches(folder, plan).values())) == {(0, 0)}
    write_questions(folder / "sums.jsonl", [n + 4 for n in range(11)])
    return folder


def options(folder, name, *more):
    return ["--sets", str(folder / "sums.jsonl"), "--num-samples=4", "--out", str(folder / name), *more]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def measured(model, folder, name, *more):
    return results(evaluate_model(parse_command_line([str(model), *options(folder, name, *more)])))


@pytest.mark.parametrize("run", ["plain", "adapters"])
def test_one_process_reads_what_two_ranks_have_split(folder, run):
    export = measured(folder / run, folder, f"{run}-export")
    last = measured(folder / run / "checkpoints" / "step-000002", folder, f"{run}-last")
    first = measured(folder / run, folder, f"{run}-first", "--step=1")
    assert last["model"]["checkpoint"] == "step-000002"
    assert export["model"]["checkpoint"] is None
    assert export["model"]["weights_sha256"] == last["model"]["weights_sha256"] != first["model"]["weights_sha256"]
    assert export["sets"] == last["sets"]
    assert export["sets"]["sums"]["pass_at"]["4"]["mean"] > 0.5


def test_a_checkpoint_that_is_not_there_or_not_whole_is_named(folder):
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has 1, 2"):
        measured(folder / "plain", folder, "none", "--step=7")
    position = folder / "plain" / "checkpoints" / "step-000001" / "position.pt"
    content = position.read_bytes()
    position.write_bytes(content[:-1])
    try:
        with pytest.raises(CheckpointError, match=r"step-000001 is not whole \(position.pt has"):
            measured(folder / "plain", folder, "none", "--step=1")
    finally:
        position.write_bytes(content)


def test_two_ranks_share_an_evaluation_and_leave_the_same_bytes(folder):
    command = [*TWO_RANKS, "ledger", *options(folder, "two", "--rollout.batch_size=4")]
    done = subprocess.run(command, env=environment(folder), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured("ledger", folder, "one")
    for name in ("results.json", "replies.jsonl"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
