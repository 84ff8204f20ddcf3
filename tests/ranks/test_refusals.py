"""A run that cannot be says so once, and every rank ends alike."""

import pytest

from tests.ranks.running import ROOT, argv, life, lived, said

pytestmark = pytest.mark.slow


def test_a_config_error_is_one_line_whichever_rank_meets_it(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("model: {path: ledger}\ndata: {train: ledger:train}\n")
    (tmp_path / "here").mkdir()
    (tmp_path / "model").symlink_to(ROOT / "expo" / "ledger" / "model")
    cases = {
        "taken": ({}, None, "already holds a run; add --resume"),
        "lost": ({"model__path": "./lost"}, None, "model.path = ./lost does not exist"),
        "elsewhere": (
            {"model__path": "./model"},
            {"phase": "join", "do": "move", "path": str(tmp_path / "here"), "on_ranks": [1]},
            "rank 1: model.path = ./model does not exist",
        ),
        "device": ({"run__device": "warp"}, None, "run.device = warp cannot be used here"),
    }
    plan = [life(name, argv(tmp_path, name, **values), fault=fault) for name, (values, fault, _) in cases.items()]
    codes = lived(tmp_path, plan)
    for name, (_, _, expected) in cases.items():
        assert codes[name] == [2, 2], name
        assert said(tmp_path, name, rank=1) == ""
        (line,) = said(tmp_path, name).splitlines()
        assert expected in line


def test_a_gold_answer_that_one_rank_cannot_grade_against_ends_all_ranks(tmp_path):
    fault = {"phase": "grading", "do": "bad gold", "on_ranks": [1]}
    codes = lived(tmp_path, [life("run", argv(tmp_path, "run", fractions=True), fault=fault)])
    assert codes["run"] == [1, 1]
    assert said(tmp_path, "run").splitlines()[-1].endswith("error: gold answer 'x-' cannot be parsed")
    assert "Traceback" not in said(tmp_path, "run") + said(tmp_path, "run", rank=1)
