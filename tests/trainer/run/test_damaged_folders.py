"""52 damages to the folder of an interrupted run: it ends with equal bits, or one line says what is wrong."""

import shutil

import pytest

import expo.run.lifecycle
import expo.train
from expo.errors import ExpoError
from expo.train import train
from tests.trainer.run.short_runs import quick, records_of, rewrite_manifest, weights_of

pytestmark = pytest.mark.medium

CHECKPOINT = "checkpoints/step-000003"
LOGS = ("metrics.jsonl", "completions.jsonl", "curriculum.jsonl", "evaluations.jsonl")
FILES = (
    "config.yaml", "environment.json", "data.json", *LOGS, f"{CHECKPOINT}/manifest.json", f"{CHECKPOINT}/position.pt",
    f"{CHECKPOINT}/random-rank0.pt", f"{CHECKPOINT}/policy/policy/mp_rank_00_model_states.pt", "checkpoints/latest",
    "rollouts/step-000004-round-0.gz",
)  # fmt: skip


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "garbage": lambda path: path.write_bytes(b'\xff\x00{"step": [[[\n{}\n[1]\nnull\n' + b"[" * 100_000 + b"\n"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was not interrupted, and one that died in step 4 with a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expo.run.lifecycle, "write_report", lambda _: "not written")
        train(quick(folder, "whole"))
        real = expo.train.step_row
        patch.setattr(expo.train, "step_row", lambda step, *rest: 1 / 0 if step == 4 else real(step, *rest))
        with pytest.raises(ZeroDivisionError):
            train(quick(folder, "killed"))
    return folder


def resume_copy(runs, monkeypatch, damage):
    """Damages a copy of the killed run, resumes it, and removes it.

    Returns: the error if there was one; the weights; the records.
    """
    monkeypatch.setattr(expo.run.lifecycle, "write_report", lambda _: "not written")
    shutil.copytree(runs / "killed", runs / "copy")
    try:
        damage(runs / "copy")
        train(quick(runs, "copy"), resume=True)
        return None, weights_of(runs / "copy"), records_of(runs / "copy")
    except ExpoError as error:
        return str(error), None, None
    finally:
        shutil.rmtree(runs / "copy")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_run_ends_with_equal_bits_or_says_what_is_wrong(runs, monkeypatch, capsys, file, damage):
    error, weights, records = resume_copy(runs, monkeypatch, lambda run: DAMAGES[damage](run / file))
    if error is not None:
        assert file in ("config.yaml", "data.json")
        assert file in error
        assert "\n" not in error
        return
    assert weights == weights_of(runs / "whole")
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if file.split("/")[-1] in line]
    if file in LOGS:
        (line,) = lines
        assert f"{file} is not as the checkpoint of step 3 recorded it" in line
        whole = records_of(runs / "whole")
        name = file.removesuffix(".jsonl")
        assert {**records, name: None} == {**whole, name: None}
        assert damage == "flipped" or all(row in whole[name] for row in records[name])
        return
    assert records == records_of(runs / "whole")
    if damage in ("cut", "garbage") and file != "checkpoints/latest":  # which is written again
        assert len(lines) == 1


def test_lines_after_the_checkpoint_are_written_again_whatever_was_in_them(runs, monkeypatch, capsys):
    def damage(run):
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(b'garbage\n{"step": 4, "kl": 99.0}\n{"step": 2, "half')

    error, weights, records = resume_copy(runs, monkeypatch, damage)
    assert error is None
    assert weights == weights_of(runs / "whole")
    assert records == records_of(runs / "whole")
    assert "warning" not in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_is_taken_with_equal_bits(runs, monkeypatch, capsys):
    def damage(run):
        for checkpoint in (run / "checkpoints").glob("step-*"):
            rewrite_manifest(checkpoint, without=["logs"])

    error, weights, records = resume_copy(runs, monkeypatch, damage)
    assert error is None
    assert weights == weights_of(runs / "whole")
    assert records == records_of(runs / "whole")
    assert "resuming after step 3" in capsys.readouterr().out


def test_a_checkpoint_that_was_renamed_is_not_taken_for_another_step(runs, monkeypatch, capsys):
    def damage(run):
        shutil.rmtree(run / CHECKPOINT)
        (run / "checkpoints/step-000002").rename(run / CHECKPOINT)

    error, *_ = resume_copy(runs, monkeypatch, damage)
    assert "none of the 1 checkpoints" in error
    assert "manifest.json belongs to step-000002" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "environment.json", "data.json", "checkpoints", "rollouts", "export", "bad_updates"]
)
def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(runs, monkeypatch, name):
    def damage(run):
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        path.mkdir() if path.suffix else path.write_text("in the way")

    error, weights, _ = resume_copy(runs, monkeypatch, damage)
    if error is None:
        assert weights == weights_of(runs / "whole")
    else:
        assert name in error
        assert "\n" not in error


def test_foreign_files_are_left_alone(runs, monkeypatch):
    kept = {"notes.jsonl": "no JSON\n", "checkpoints/step-x": "a", "rollouts/step-a-round-b.gz": "b"}

    def damage(run):
        for name, text in kept.items():
            (run / name).write_text(text)
        monkeypatch.setattr(shutil, "rmtree", lambda path, **_: check(path) if path == run else real(path, **_))

    def check(run):
        assert {name: (run / name).read_text() for name in kept} == kept
        real(run)

    real = shutil.rmtree
    error, weights, _ = resume_copy(runs, monkeypatch, damage)
    assert error is None
    assert weights == weights_of(runs / "whole")
