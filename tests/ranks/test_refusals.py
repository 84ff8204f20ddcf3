"""A run that cannot be, or cannot go on, says so once, and every rank ends alike."""

import pytest

from tests import ROOT
from tests.ranks.running import argv, life, lived, said

pytestmark = pytest.mark.slow
ELSEWHERE = {"phase": "join", "do": "move", "path": "here", "on_ranks": [1]}
CASES = {
    "taken": ({}, None, "already holds a run; add --resume"),
    "lost": ({"model__path": "./lost"}, None, "model.path = ./lost does not exist"),
    "elsewhere": ({"model__path": "./model"}, ELSEWHERE, "rank 1: model.path = ./model does not exist"),
    "device": ({"run__device": "warp"}, None, "run.device = warp cannot be used here"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of runs that could not be, and one that could not go on, and the exit codes of each."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "taken").mkdir()
    (folder / "taken" / "config.yaml").write_text("model: {path: ledger}\ndata: {train: ledger:train}\n")
    (folder / "here").mkdir()
    (folder / "model").symlink_to(ROOT / "expo" / "ledger" / "model")
    plan = [life(name, argv(folder, name, **values), fault=fault) for name, (values, fault, _) in CASES.items()]
    bad_gold = {"phase": "grading", "do": "bad gold", "on_ranks": [1]}
    plan.append(life("gold", argv(folder, "gold", fractions=True), fault=bad_gold))
    return folder, lived(folder, plan)


@pytest.mark.parametrize("name", CASES)
def test_a_config_error_is_one_line_whichever_rank_meets_it(ended, name):
    folder, codes = ended
    assert codes[name] == [2, 2]
    assert said(folder, name, rank=1) == ""
    (line,) = said(folder, name).splitlines()
    assert CASES[name][2] in line


def test_a_gold_answer_that_one_rank_cannot_grade_against_ends_all_ranks(ended):
    folder, codes = ended
    assert codes["gold"] == [1, 1]
    assert said(folder, "gold").splitlines()[-1].endswith("error: gold answer 'x-' cannot be parsed")
    assert "Traceback" not in said(folder, "gold") + said(folder, "gold", rank=1)
