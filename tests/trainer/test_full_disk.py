"""A disk that is full at one moment of a run after another: each time one line, and in the end equal bits."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import expo.run.lifecycle
import expo.train
from expo.learner.policy import DeepSpeedPolicy
from expo.train import main, train
from tests.trainer.test_train import quick, rows_of, untimed, weights_of

pytestmark = pytest.mark.medium
RECORDS = ("metrics", "completions", "curriculum", "evaluations")


@contextmanager
def no_space_for(name):
    """Inside, no file whose path contains `name` can be flushed."""
    real = os.fsync

    def fsync(descriptor):
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if name in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@contextmanager
def no_space_for_lines_of(name):
    """Inside, no line can be appended to the file."""
    real = Path.open

    def open_full(path, mode="r", **options):
        return real(Path("/dev/full") if path.name == name and mode == "ab" else path, mode, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        yield


@contextmanager
def no_space_for_weights():
    """Inside, the library that exports weights raises the error of a full disk in its own type."""

    def export(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedPolicy, "export", export)
        yield


@contextmanager
def no_space_for_the_report():
    def write_report(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "report.html"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expo.run.lifecycle, "write_report", write_report)
        yield


MOMENTS = {
    "start": (lambda: no_space_for(".environment.json.part"), "the folder"),
    "configuration": (lambda: no_space_for(".config.yaml.part"), "the folder"),
    "data": (lambda: no_space_for(".data.json.part"), "the folder"),
    "evaluation": (lambda: no_space_for_lines_of("evaluations.jsonl"), "the folder"),
    "replies": (lambda: no_space_for_lines_of("completions.jsonl"), "the folder"),
    "metrics": (lambda: no_space_for_lines_of("metrics.jsonl"), "the folder"),
    "last checkpoint": (lambda: no_space_for(".step-000004.part"), "step-000004 could not be written"),
    "weights": (no_space_for_weights, "export cannot be written"),
    "export": (lambda: no_space_for(".export.part"), "export cannot be written"),
    "summary": (lambda: no_space_for(".summary.json.part"), "the folder"),
    "report": (no_space_for_the_report, "the run is finished, but its report cannot be written"),
}


def test_a_disk_that_is_full_at_every_moment_costs_no_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(expo.run.lifecycle, "write_report", lambda _: "left out here")
    monkeypatch.setattr(expo.train, "leave_ranks", lambda: None)  # DeepSpeed cannot join again
    whole = train(quick(tmp_path, "whole"))
    config = quick(tmp_path)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for moment, (fault, expected) in MOMENTS.items():
        with fault(), pytest.raises(SystemExit) as stop:
            main([str(tmp_path / "config.yaml"), "--resume"])
        (line,) = [text for text in capsys.readouterr().err.splitlines() if "warning" not in text]
        assert stop.value.code == 1, moment
        assert expected in line, moment
        assert "No space left on device" in line, moment
        assert not list(config.run.dir.glob(".*.part")), moment
    assert main([str(tmp_path / "config.yaml"), "--resume"]) == 0
    for name in RECORDS:
        assert untimed(rows_of(config.run.dir, name)) == untimed(rows_of(whole, name))
    expected = weights_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(config.run.dir).items())


def test_a_batch_that_cannot_be_kept_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(expo.run.lifecycle, "write_report", lambda _: "left out here")
    real, calls = DeepSpeedPolicy.update, []

    def update(policy, mini_batch, beta):
        calls.append(1)
        if len(calls) == 1:
            mini_batch.micro_batches[0].advantages[0] = float("nan")
        return real(policy, mini_batch, beta)

    monkeypatch.setattr(DeepSpeedPolicy, "update", update)
    with no_space_for("bad_updates"):
        train(quick(tmp_path, run__steps=2))
    assert "its batch could not be kept in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied")]
)
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, monkeypatch, capsys, number, expected):
    def mkdir(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    (tmp_path / "config.yaml").write_text(quick(tmp_path).to_yaml())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / "config.yaml")])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert expected in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_a_path_that_is_too_long_is_one_line(tmp_path, capsys, options):
    (tmp_path / "config.yaml").write_text(quick(tmp_path, "x" * 300).to_yaml())
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "config.yaml"), *options])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "File name too long" in text
    assert text.count("\n") == 1
