"""A run that cannot start or continue prints one error, and every rank exits with the same code."""

import pytest

from tests import ROOT
from tests.ranks.running import argv, launch, log_of, run_launches

pytestmark = pytest.mark.slow
ELSEWHERE = {"phase": "join", "do": "move", "path": "other", "on_ranks": [1]}
CASES = {
    "taken": ({}, None, "already holds a run; add --resume"),
    "lost": ({"model__path": "./lost"}, None, "model.path = ./lost does not exist"),
    "elsewhere": ({"model__path": "./model"}, ELSEWHERE, "rank 1: model.path = ./model does not exist"),
    "device": ({"run__device": "cuda:99"}, None, "run.device = cuda:99 is one GPU for the 2 ranks"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of runs that cannot start, and of two that cannot continue, and the exit codes of each."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "taken").mkdir()
    (folder / "taken" / "config.yaml").write_text("model: {path: ledger}\ndata: {train: ledger:train}\n")
    (folder / "other").mkdir()
    (folder / "model").symlink_to(ROOT / "expo" / "ledger" / "model")
    plan = [launch(name, argv(folder, name, **values), fault=fault) for name, (values, fault, _) in CASES.items()]
    bad_gold = {"phase": "grading", "do": "bad gold", "on_ranks": [1]}
    plan.append(launch("gold", argv(folder, "gold", by_workers=True), fault=bad_gold))
    plan.append(launch("reward", argv(folder, "reward", reward__functions="{os.path:join: 1}")))
    sampling = {"phase": "sampling", "do": "raise", "on_ranks": [1], "nth": 2}
    plan.append(launch("sampling", argv(folder, "sampling"), fault=sampling))
    return folder, run_launches(folder, plan)


@pytest.mark.parametrize("name", CASES)
def test_a_config_error_of_any_rank_is_one_line(ended, name):
    folder, codes = ended
    assert codes[name] == [2, 2]
    assert log_of(folder, name, rank=1) == ""
    (line,) = log_of(folder, name).splitlines()
    assert CASES[name][2] in line


def test_an_ungradable_gold_answer_on_one_rank_ends_all_ranks(ended):
    folder, codes = ended
    assert codes["gold"] == [1, 1]
    assert log_of(folder, "gold").splitlines()[-1].endswith("error: gold answer 'x-' cannot be parsed")
    assert "Traceback" not in log_of(folder, "gold") + log_of(folder, "gold", rank=1)


def test_a_reward_function_that_fails_ends_all_ranks(ended):
    folder, codes = ended
    assert codes["reward"] == [1, 1]
    assert "error: reward function os.path:join raised TypeError" in log_of(folder, "reward").splitlines()[-1]
    assert "Traceback" not in log_of(folder, "reward") + log_of(folder, "reward", rank=1)


def test_an_error_of_one_rank_in_sampling_ends_all_ranks_and_is_named(ended):
    folder, codes = ended
    assert codes["sampling"] == [1, 1]
    assert log_of(folder, "sampling").splitlines()[-1].endswith("error: rank 1 failed: RuntimeError: injected")
    assert "Traceback" not in log_of(folder, "sampling")
    assert "RuntimeError: injected" in log_of(folder, "sampling", rank=1)
