"""The whole algorithm with vLLM, on one rank and on two that split every parameter."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = [sys.executable, "-m"]
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps; what the process printed and the lines of metrics.jsonl."""

    def start(launch, *, program="expo.train", **more):
        folder = tmp_path_factory.mktemp("run")
        questions = folder / "few.jsonl"
        questions.write_text(  # longer than the training questions: an overlap would print a line
            '{"question": "9+9+1-8+3-7+2=", "answer": 9}\n{"question": "8+8+2-9+5-6+1=", "answer": 9}\n'
        )
        settings = {
            "rollout.engine": "vllm", "run.dir": folder / "run", "run.steps": 3, "optimizer.warmup_steps": 1,
            "rollout.questions_per_step": 4, "rollout.group_size": 4, "evaluation.sets": f"{{few: {questions}}}",
            "evaluation.num_samples": 2, **more,
        }  # fmt: skip
        command = [*launch, program, *(f"--{name}={value}" for name, value in settings.items())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done, rows_of(folder / "run", "metrics")

    return start


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(run):
    return run(ALONE)


def assert_synced(rows):
    assert len(rows) == 3
    for row in rows:
        # the trained model's logits reach 30 nats, where float32 has steps of 2e-6, and its rounding alone moves the
        # probe's log-probs by up to 9e-6 from float64: policy and engine differed by up to 2e-5, on replies by 3.5e-5,
        # so the bound of 1e-5 for the small models of the other tests is too tight here
        assert 0 < row["sync_max_abs_dlogp"] < 5e-5
        assert row["rollout_logp_difference_max"] < 5e-5
        assert abs(row["rollout_ratio_median"] - 1) < 1e-5
        assert row["rollout_effective_sample_fraction"] > 1 - 1e-8


def test_a_run_with_vllm_prints_nothing_unexpected_and_stays_synced(alone):
    done, rows = alone
    starts = ("ledger:train:", "evaluation after", "step ", "set ", "---", "few ", "run: ", "report: ", "* Wilson")
    assert done.stderr == ""
    others = [line for line in done.stdout.splitlines() if not line.startswith(starts)]
    assert [line.rpartition("/")[2] for line in others] == ["few.jsonl: 2 questions"]
    assert_synced(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"policy.zero_stage": 3},
        {"policy.zero_stage": 3, "vllm.tensor_parallel": 2},
        {"policy.zero_stage": 3, "rollout.engine": "vllm-server"},
        {"policy.zero_stage": 3, "rollout.engine": "vllm-server", "vllm.transfer": "broadcast"},
        {
            "policy.zero_stage": 3,
            "rollout.engine": "vllm-server",
            "vllm.transfer": "broadcast",
            "vllm.tensor_parallel": 2,
        },
    ],
    ids=["engine each", "tensor parallel", "server, files", "server, broadcast", "tensor-parallel server, broadcast"],
)
def test_two_ranks_with_zero_3_take_the_same_steps(run, alone, settings):
    _, rows = run(TWO_RANKS, **settings)
    assert_synced(rows)
    for row, expected in zip(rows, alone[1], strict=True):
        assert row["accuracy"] == expected["accuracy"]
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert row["completion_length"] == expected["completion_length"]


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["files", "broadcast"])
def test_two_ranks_take_the_steps_of_one_while_servers_sample_ahead(run, transfer):
    settings = {
        "rollout.engine": "vllm-server", "vllm.transfer": transfer, "rollout.ahead": 1,
        "objective.rollout_correction": "token",
    }  # fmt: skip
    one, two = run(ALONE, **settings)[1], run(TWO_RANKS, **settings)[1]
    for rows in (one, two):
        assert [row["rollout_weights_age"] for row in rows] == [0, 1, 1]
        assert all(0 < row["sync_max_abs_dlogp"] < 5e-5 for row in rows)
    for row, expected in zip(two, one, strict=True):
        assert row["accuracy"] == expected["accuracy"]
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.slow
def test_killing_a_runs_server_while_it_generates_changes_no_result(run):
    settings = {"rollout.engine": "vllm-server", "rollout.batch_size": 4}
    undisturbed, expected = run(ALONE, **settings)
    killed, rows = run(ALONE, program="tests.vllm.killed_server", **settings)
    num_done = int(re.fullmatch(r"killed after (\d+)\n", killed.stderr)[1])
    assert 0 < num_done < 16
    assert unmeasured(rows) == unmeasured(expected)
    replies, others = (rows_of(folder_of(done), "completions") for done in (killed, undisturbed))
    assert len(replies) == 3 * 16
    assert replies == others
    assert evaluations_of(killed) == evaluations_of(undisturbed)


def folder_of(done):
    return Path(re.search("^run: +(.*)$", done.stdout, re.MULTILINE)[1])


def evaluations_of(done):
    return [row["sets"] for row in rows_of(folder_of(done), "evaluations")]


def unmeasured(rows):
    """The rows without times and memory."""
    measured = ("seconds", "memory_", "tokens_per_second", "rollout_tokens_", "training_tokens_")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]


LORA = {"policy.lora_rank": 4, "policy.lora_alpha": 8, "optimizer.lr": 3e-3}


@pytest.fixture(scope="module")
def merging(run):
    return run(ALONE, **LORA)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "settings"),
    [
        (ALONE, {}),
        (TWO_RANKS, {"policy.zero_stage": 3}),
        (TWO_RANKS, {"policy.zero_stage": 3, "vllm.tensor_parallel": 2}),
        (TWO_RANKS, {"policy.zero_stage": 3, "rollout.engine": "vllm-server"}),
    ],
    ids=["one rank", "two ranks", "tensor parallel", "two ranks, server"],
)
def test_a_run_that_sends_adapters_takes_the_steps_of_one_that_merges_them(run, merging, launch, settings):
    _, rows = run(launch, **LORA, **{"vllm.lora": "adapter", **settings})
    assert_synced(rows)
    for row, expected in zip(rows, merging[1], strict=True):
        assert row["accuracy"] == expected["accuracy"]
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert row["completion_length"] == expected["completion_length"]


@pytest.mark.slow
def test_a_run_that_samples_ahead_sends_adapters(run):
    settings = {"rollout.engine": "vllm-server", "rollout.ahead": 1, "objective.rollout_correction": "token"}
    _, rows = run(ALONE, **LORA, **settings, **{"vllm.lora": "adapter"})
    assert [row["rollout_weights_age"] for row in rows] == [0, 1, 1]
    assert all(0 < row["sync_max_abs_dlogp"] < 5e-5 for row in rows)
