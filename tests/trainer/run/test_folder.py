"""The folder of a run: incomplete lines, rewinding, starts of a resumed run, unwritable folders, its digest."""

import os

import pytest

import expo.run.folder
from expo.config import load_config
from expo.errors import ConfigError, FolderError
from expo.reporting.reader import commits_of
from expo.run.environment import ENVIRONMENT
from expo.run.folder import ADDED_LATER, RunFolder, open_folder, settings_digest
from expo.run.logs import LOGS
from expo.runtime.distributed import join_ranks


def test_an_incomplete_line_is_left_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.append("metrics", {"step": 1}, {"step": 2})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    assert folder.read_rows("metrics") == [{"step": 1}, {"step": 2}]
    assert folder.read_rows("nothing") == []


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n{"kl": 1}\n{"step": "2"}\n{"step": 2}\n')
    assert folder.read_rows("metrics") == [{"step": 1}, {"step": 2}]
    assert folder.rewind(2) == []
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_rewinding_drops_later_steps_of_every_file(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(5):
        folder.append("metrics", {"step": step})
        folder.append("completions", {"step": step, "reply": "à"}, {"step": step, "reply": "b"})
    folder.rewind(2)
    assert [row["step"] for row in folder.read_rows("metrics")] == [0, 1, 2]
    assert [row["step"] for row in folder.read_rows("completions")] == [0, 0, 1, 1, 2, 2]


def test_the_logs_are_flushed_and_known_at_a_checkpoint_and_compared_on_resume(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(expo.run.folder, "flush", lambda path: flushed.append(path.name))
    folder = RunFolder(tmp_path)
    folder.rewind(-1)
    folder.append("metrics", {"step": 1}, {"step": 2})
    folder.append("evaluations", {"step": 0})
    saved = folder.flush_logs()
    assert sorted(flushed) == ["evaluations.jsonl", "metrics.jsonl"]
    assert [saved[name].lines for name in LOGS] == [2, 0, 0, 1]
    folder.append("metrics", {"step": 3})
    again = RunFolder(tmp_path)
    assert again.rewind(2, saved) == []
    assert again.flush_logs() == saved
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").unlink()
    (message,) = RunFolder(tmp_path).rewind(2, saved)
    assert "0 of its 2 lines can be read" in message


def test_what_another_process_does_to_a_log_during_the_run_is_found_on_resume(tmp_path):
    folder = RunFolder(tmp_path)
    folder.rewind(-1)
    folder.append("metrics", {"step": 1})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl": 0}\n')
    folder.append("metrics", {"step": 2})
    assert len(RunFolder(tmp_path).rewind(2, folder.flush_logs())) == 1


def test_a_run_writes_nothing_outside_of_its_folder_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("keep this\n")
    folder = RunFolder(tmp_path / "run")
    for name in (".lock", "metrics.jsonl"):
        (folder.path / name).symlink_to(tmp_path / "mine")
    folder.lock()
    folder.rewind(0)
    folder.append("metrics", {"step": 1})
    folder.release()
    assert (tmp_path / "mine").read_text() == "keep this\n"
    assert folder.read_rows("metrics") == [{"step": 1}]


def test_a_log_that_is_no_file_is_one_error(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(FolderError, match=r"metrics\.jsonl is no file; move it away"):
        RunFolder(tmp_path).rewind(0)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff", '{"starts": {"a": 1}}', '{"starts": [1, {"commit": []}]}'])
def test_a_damaged_record_of_starts_is_begun_again(tmp_path, text):
    (tmp_path / ENVIRONMENT).write_text(text, errors="surrogateescape")
    folder = RunFolder(tmp_path)
    messages = folder.record_start(num_ranks=1)
    folder.record_first_step(1)
    assert len(messages) == (0 if text.startswith('{"') else 1)
    assert folder.read_object(ENVIRONMENT)["starts"][-1]["first_step"] == 1
    assert commits_of(folder.read_object(ENVIRONMENT))


def test_every_start_of_a_run_is_kept_also_in_the_older_format(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json(ENVIRONMENT, {"commit": "older", "versions": {"torch": "2"}})
    for step in (3, 5):
        folder.record_start(2, {"run.steps": [step, 9]})
        folder.record_first_step(step)
    older, *starts = folder.read_object(ENVIRONMENT)["starts"]
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


def test_a_folder_without_its_configuration_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    config = load_config(None, [("run.dir", str(tmp_path))])
    with pytest.raises(ConfigError, match="already holds a run"):
        open_folder(config, False, join_ranks("cpu", 60))


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_name_that_is_too_long_is_one_error(tmp_path, resume):
    config = load_config(None, [("run.dir", str(tmp_path / ("x" * 300)))])
    with pytest.raises(ConfigError, match="File name too long"):
        open_folder(config, resume, join_ranks("cpu", 60))


def test_an_empty_folder_name_is_refused():
    with pytest.raises(ConfigError, match=r"run\.dir = '': expected the name of a folder"):
        load_config(None, [("run.dir", "")])
    assert str(load_config(None, [("run.dir", ".")]).run.dir) == "."
