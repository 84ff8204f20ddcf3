"""The folder of a run: incomplete lines, rewinding, starts of a resumed run, unwritable folders, its digest."""

import pytest

from expo.config import load_config
from expo.errors import ConfigError, FolderError
from expo.run.environment import ENVIRONMENT
from expo.run.folder import ADDED_LATER, RunFolder, settings_digest


def test_an_incomplete_line_is_left_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.append("metrics", {"step": 1}, {"step": 2})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    assert folder.read_rows("metrics") == [{"step": 1}, {"step": 2}]
    assert folder.read_rows("nothing") == []


def test_rewinding_drops_later_steps_of_every_file(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(5):
        folder.append("metrics", {"step": step})
        folder.append("completions", {"step": step, "reply": "à"}, {"step": step, "reply": "b"})
    folder.rewind(2)
    assert [row["step"] for row in folder.read_rows("metrics")] == [0, 1, 2]
    assert [row["step"] for row in folder.read_rows("completions")] == [0, 0, 1, 1, 2, 2]


def test_every_start_of_a_run_is_kept_also_in_the_older_format(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json(ENVIRONMENT, {"commit": "older", "versions": {"torch": "2"}})
    for step in (3, 5):
        folder.record_start(2, {"run.steps": [step, 9]})
        folder.record_first_step(step)
    older, *starts = folder.read_json(ENVIRONMENT)["starts"]
    assert older == {"commit": "older", "versions": {"torch": "2"}}
    assert [(start["first_step"], start["ranks"]) for start in starts] == [(3, 2), (5, 2)]
    assert starts[0]["versions"]["torch"]
    assert starts[1]["changed"] == {"run.steps": [5, 9]}


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run cannot be written"):
        RunFolder(tmp_path / "file" / "run")
    folder = RunFolder(tmp_path / "run")
    (folder.path / "metrics.jsonl").mkdir()
    with pytest.raises(FolderError, match="cannot be written"):
        folder.append("metrics", {"step": 1})


def test_the_digest_of_settings_is_that_of_checkpoints_of_earlier_versions():
    config = load_config(None)
    assert settings_digest(config) == "e423406f09d01ce57d8aa56bd2d97bf48abae219476799e369c82d8d9511122b"
    assert set(ADDED_LATER) <= set(config.settings)
    assert settings_digest(load_config(None, [("rollout.stop_tokens", ["a"])])) != settings_digest(config)
