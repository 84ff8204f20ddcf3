"""Trackers: TensorBoard's files, the calls of the other libraries, and failures that do not end a run."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expo.config import load_config
from expo.errors import ConfigError
from expo.run.metrics import STEP_METRICS
from expo.run.trackers import ID_FILE, check_trackers, open_trackers
from tests import ROOT

CONFIG = load_config(None)


def row(step, **more):
    return {"step": step, "accuracy": step / 10, "seconds/rollout": 2.5, **more}


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


class FakeLibrary:
    """The part of Weights & Biases and trackio that is used: init(...) returns a run with log and finish."""

    def __init__(self):
        self.started, self.logged, self.num_finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, metrics, step):
        self.logged.append((step, metrics))

    def _finish(self):
        self.num_finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def library(request, monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setitem(sys.modules, request.param, fake)
    return SimpleNamespace(name=request.param, fake=fake)


def test_tensorboard_shows_the_numbers_under_their_names(tmp_path):
    (tracker,) = open_trackers(["tensorboard"], tmp_path, CONFIG, resume=False)
    tracker.log(1, row(1, loss=math.nan, beta_eff=1, note="text", is_odd=True, unlisted=3.0))
    tracker.log(2, row(2))
    # read before it is closed: a killed run loses nothing
    found = scalars(tmp_path)
    assert found["accuracy"] == [(1, 0.1), (2, 0.2)]
    assert found["seconds/rollout"] == [(1, 2.5), (2, 2.5)]
    assert math.isnan(found.pop("loss")[0][1])
    assert set(found) == {"accuracy", "seconds/rollout", "beta_eff"}
    assert {name.split("/")[0] for name in found} <= set(STEP_METRICS)
    tracker.close()


def test_repeated_steps_replace_the_old_ones_in_tensorboard(tmp_path):
    for resume, steps, value in ((False, (1, 2, 3), 0.0), (True, (2, 3, 4), 1.0)):
        (tracker,) = open_trackers(["tensorboard"], tmp_path, CONFIG, resume)
        for step in steps:
            tracker.log(step, {"step": step, "accuracy": value})
        tracker.close()
    assert scalars(tmp_path)["accuracy"] == [(1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0)]


def test_a_resumed_run_continues_in_the_same_tracker_run(tmp_path, library):
    for resume in (False, True):
        (tracker,) = open_trackers([library.name], tmp_path, CONFIG, resume)
        tracker.log(1, row(1))
        tracker.close()
    first, second = library.fake.started
    assert first == second
    assert first["resume"] == "allow"
    run_id = (tmp_path / ID_FILE).read_text().strip()
    assert run_id in (first.get("id"), first["name"].removeprefix(f"{tmp_path.name}-"))
    assert first["config"] == CONFIG.model_dump(mode="json")
    assert library.fake.logged == [(1, {"accuracy": 0.1, "seconds/rollout": 2.5})] * 2
    assert library.fake.num_finished == 2


def test_another_run_is_another_tracker_run(tmp_path, library):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        open_trackers([library.name], tmp_path / name, CONFIG, resume=False)
    ids = {(options.get("id"), options["name"]) for options in library.fake.started}
    assert len(ids) == 2


def test_a_tracker_that_fails_is_reported_once_and_never_ends_the_run(tmp_path, library, capsys):
    def unreachable(metrics, step):
        raise OSError(f"no network at step {step}\nand more")

    library.fake._log = unreachable
    trackers = open_trackers([library.name, "tensorboard"], tmp_path, CONFIG, resume=False)
    for step in (1, 2):
        for tracker in trackers:
            tracker.log(step, row(step))
    for tracker in trackers:
        tracker.close()
    stderr = capsys.readouterr().err
    assert stderr == f"tracker {library.name} failed (no network at step 1); the run continues without it\n"
    assert scalars(tmp_path)["accuracy"] == [(1, 0.1), (2, 0.2)]


def test_a_tracker_that_does_not_open_is_left_out(tmp_path, library, capsys):
    def refused(**_):
        raise RuntimeError("no API key")

    library.fake.init = refused
    assert open_trackers([library.name], tmp_path, CONFIG, resume=False) == []
    assert "(no API key)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name):
    for module in [name, "torch.utils.tensorboard"] if name == "tensorboard" else [name]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'names {name}, .*pip install "expo-rl\[{name}\]"'):
        check_trackers([name])


def test_no_tracker_writes_nothing(tmp_path):
    assert open_trackers([], tmp_path, CONFIG, resume=False) == []
    assert list(tmp_path.iterdir()) == []


def test_libraries_are_imported_only_when_used():
    script = (
        "import sys, expo.run.trackers; "
        "loaded = {'wandb', 'trackio', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_real_wandb_continues_offline_in_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resume in (False, True):
        (tracker,) = open_trackers(["wandb"], tmp_path, CONFIG, resume)
        tracker.log(1 + resume, row(1 + resume))
        tracker.close()
    run_id = (tmp_path / ID_FILE).read_text().strip()
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert written
    assert all(path.stat().st_size > 0 for path in written)


def test_real_trackio_continues_in_one_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    script = (
        "import sys; from pathlib import Path; from expo.config import load_config; "
        "from expo.run.trackers import open_trackers; folder, resume = Path(sys.argv[1]), sys.argv[2] == 'True'; "
        "(tracker,) = open_trackers(['trackio'], folder, load_config(None), resume); "
        "tracker.log(1 + resume, {'step': 1 + resume, 'accuracy': 0.5}); tracker.close()"
    )
    read = (
        "from trackio import Api; from trackio.sqlite_storage import SQLiteStorage; (run,) = Api().runs('expo'); "
        "print([(row['step'], row['accuracy']) for row in SQLiteStorage.get_logs('expo', run.name)])"
    )
    # trackio chooses its folder at import, hence a separate process
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "trackio")}

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "failed" not in done.stderr
        return done.stdout

    for resume in (False, True):
        python("-c", script, str(tmp_path), str(resume))
    assert python("-c", read).strip() == "[(1, 0.5), (2, 0.5)]"
