"""Whole runs with vLLM, in process and with servers, on one rank and on two: all take the same steps.

Most are forked from processes that have imported everything, and most of those with a server share one of two.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from expo.config import load_config
from expo.rollout.vllm.key import new_key
from expo.rollout.vllm.supervisor import ServerProcess
from tests.ranks.running import launch, log_of, rows_of, run_launches
from tests.vllm.conftest import CACHE_GIB

LAUNCHER = Path(__file__).with_name("launcher.py")
NUM_STEPS = 3
ZERO_3 = {"policy.zero_stage": 3}
TENSOR_PARALLEL = {"vllm.tensor_parallel": 2}
SERVER = {"rollout.engine": "vllm-server"}
BROADCAST = {"vllm.transfer": "broadcast"}
AHEAD = {"rollout.ahead": 1, "objective.rollout_correction": "token"}
LORA = {"policy.lora_rank": 4, "policy.lora_alpha": 8, "optimizer.lr": 3e-3}
ADAPTER = {**LORA, "vllm.lora": "adapter"}
SHARED_MEMORY = Path("/dev/shm")
LEFT = SHARED_MEMORY / "-tp:0-[0-1]-cpushm_0"  # what vLLM itself names memory that a killed run leaves
UNDISTURBED = {**SERVER, "rollout.batch_size": 4}  # several batches of replies in a step

# the settings of each run, and whether it uses a server that the tests have started
ON_ONE_RANK = {
    "merging": (LORA, False),
    "adapter": (ADAPTER, False),
    "undisturbed": (UNDISTURBED, False),
    "ahead-files": ({**SERVER, **AHEAD}, True),
    "ahead-broadcast": ({**SERVER, **AHEAD, **BROADCAST}, True),
    "ahead-adapter": ({**SERVER, **AHEAD, **ADAPTER}, True),
}
ON_TWO_RANKS = {
    "engine-each": (ZERO_3, False),
    "tensor-parallel": ({**ZERO_3, **TENSOR_PARALLEL}, False),
    "server-files": ({**ZERO_3, **SERVER}, True),
    "server-broadcast": ({**ZERO_3, **SERVER, **BROADCAST}, True),
    "tensor-parallel-server": ({**ZERO_3, **SERVER, **BROADCAST, **TENSOR_PARALLEL}, False),
    "two-ahead-files": ({**SERVER, **AHEAD}, True),
    "two-ahead-broadcast": ({**SERVER, **AHEAD, **BROADCAST}, True),
    "adapter-engine-each": ({**ZERO_3, **ADAPTER}, False),
    "adapter-tensor-parallel": ({**ZERO_3, **TENSOR_PARALLEL, **ADAPTER}, False),
    "adapter-server": ({**ZERO_3, **SERVER, **ADAPTER}, True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all runs; the weights that they send through files are gone in the end."""
    found = tmp_path_factory.mktemp("runs")
    (found / "weights").mkdir()
    yield found
    assert list((found / "weights").iterdir()) == []


def arguments(folder, name, settings):
    """The command line of a run of three steps."""
    questions = folder / "few.jsonl"
    questions.write_text(  # longer than the training questions: an overlap would print a line
        '{"question": "9+9+1-8+3-7+2=", "answer": 9}\n{"question": "8+8+2-9+5-6+1=", "answer": 9}\n'
    )
    values = {
        "rollout.engine": "vllm", "run.dir": folder / name, "run.steps": NUM_STEPS, "optimizer.warmup_steps": 1,
        "rollout.questions_per_step": 4, "rollout.group_size": 4, "evaluation.sets": f"{{few: {questions}}}",
        "evaluation.num_samples": 2, "vllm.cache_gib": CACHE_GIB, **settings,
    }  # fmt: skip
    if values["rollout.engine"] == "vllm-server" and "vllm.transfer" not in values:
        values["vllm.weights_folder"] = folder / "weights"
    return [f"--{key}={value}" for key, value in values.items()]


def run_alone(folder, name, program="expo.train", settings=()):
    """A run in a process of its own: what it printed."""
    command = [sys.executable, "-m", program, *arguments(folder, name, dict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def alone(folder):
    """One rank, with an engine in process: what it printed, and its metrics."""
    done = run_alone(folder, "alone")
    return done, rows_of(folder / "alone", "metrics")


@pytest.fixture(scope="module")
def servers(folder):
    """Two servers, for merged weights and for adapters; those for broadcasts also take files."""
    key, started = folder / "key", {}
    key.touch(0o600)
    key.write_text(new_key())
    for lora, settings in (("merged", {}), ("adapter", ADAPTER)):
        config = folder / f"{lora}.yaml"
        values = {**SERVER, **BROADCAST, "vllm.cache_gib": CACHE_GIB, **settings}
        config.write_text(load_config(None, list(values.items())).to_yaml())
        started[lora] = ServerProcess(config, folder / f"{lora}.log", None, (), None, key.read_text())
        started[lora].start()
    yield {lora: {"vllm.servers": f"[{process.url}]", "vllm.key_file": key} for lora, process in started.items()}
    for process in started.values():
        process.stop()
        process.release()


@pytest.fixture(scope="module")
def runs(folder, servers):
    """All runs of the two tables, where a killed one has left shared memory; the metrics of one by its name."""
    codes = {}
    LEFT.touch()
    for num_ranks, table in ((1, ON_ONE_RANK), (2, ON_TWO_RANKS)):
        plan = []
        for name, (settings, is_shared) in table.items():
            shared = servers[settings.get("vllm.lora", "merged")] if is_shared else {}
            plan.append(launch(name, arguments(folder, name, {**settings, **shared}), ranks=num_ranks))
        codes |= run_launches(folder, plan, num_ranks, LAUNCHER, timeout=1800)
    LEFT.unlink()

    def rows(name):
        assert set(codes[name]) == {0}, log_of(folder, name)
        return rows_of(folder / name, "metrics")

    return rows


def assert_synced(rows):
    assert len(rows) == NUM_STEPS
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


def assert_same_steps(rows, expected):
    for row, other in zip(rows, expected, strict=True):
        assert row["accuracy"] == other["accuracy"]
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)


def assert_same_synced_steps(rows, expected):
    assert_synced(rows)
    assert_same_steps(rows, expected)
    assert [row["completion_length"] for row in rows] == [row["completion_length"] for row in expected]


def assert_sampled_ahead(rows):
    assert [row["rollout_weights_age"] for row in rows] == [0, 1, 1]
    assert all(0 < row["sync_max_abs_dlogp"] < 5e-5 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["engine-each", "tensor-parallel", "server-files", "server-broadcast", "tensor-parallel-server"]
)
def test_two_ranks_with_zero_3_take_the_same_steps(runs, alone, name):
    assert_same_synced_steps(runs(name), alone[1])


@pytest.mark.slow
def test_runs_leave_no_shared_memory(runs):
    assert len(runs("tensor-parallel")) == NUM_STEPS
    assert list(SHARED_MEMORY.glob("vllm-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["files", "broadcast"])
def test_two_ranks_take_the_steps_of_one_while_servers_sample_ahead(runs, transfer):
    one, two = runs(f"ahead-{transfer}"), runs(f"two-ahead-{transfer}")
    assert_sampled_ahead(one)
    assert_sampled_ahead(two)
    assert_same_steps(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter", "adapter-engine-each", "adapter-tensor-parallel", "adapter-server"])
def test_a_run_that_sends_adapters_takes_the_steps_of_one_that_merges_them(runs, name):
    assert_same_synced_steps(runs(name), runs("merging"))


@pytest.mark.slow
def test_a_run_that_samples_ahead_sends_adapters(runs):
    assert_sampled_ahead(runs("ahead-adapter"))


@pytest.mark.slow
def test_killing_a_runs_server_while_it_generates_changes_no_result(runs, folder):
    killed = run_alone(folder, "killed", "tests.vllm.killed_server", UNDISTURBED)
    num_done = int(re.fullmatch(r"killed after (\d+)\n", killed.stderr)[1])
    assert 0 < num_done < 16
    assert unmeasured(rows_of(folder / "killed", "metrics")) == unmeasured(runs("undisturbed"))
    replies, others = (rows_of(folder / name, "completions") for name in ("killed", "undisturbed"))
    assert len(replies) == NUM_STEPS * 16
    assert replies == others
    killed_sets, other_sets = (
        [row["sets"] for row in rows_of(folder / name, "evaluations")] for name in ("killed", "undisturbed")
    )
    assert killed_sets == other_sets


def unmeasured(rows):
    """The rows without times and memory."""
    measured = ("seconds", "memory_", "tokens_per_second", "rollout_tokens_", "training_tokens_")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]
