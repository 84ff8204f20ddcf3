"""Run folders that somebody forged: a pickle that would run a command, in every place that is read; it never runs."""

import gzip
import io
import os
import pickle
import shutil
import tarfile
import zipfile
from contextlib import suppress

import pytest
import torch
import yaml

import expo.run.checkpoint
import expo.run.lifecycle
from expo.config import PolicySection
from expo.errors import CheckpointError, ConfigError, ExpoError
from expo.evaluate import main as evaluate_main
from expo.evaluation.config import resolve
from expo.evaluation.saved_weights import load_checkpoint_weights
from expo.learner._compat_deepspeed import load_deepspeed
from expo.report import main as report_main
from expo.runtime.safe_load import weights_only_loading
from expo.train import train
from tests.trainer.run.short_runs import quick, rewrite_manifest

pytestmark = pytest.mark.medium

MODEL = "policy/policy/mp_rank_00_model_states.pt"
OPTIMIZER = "policy/policy/zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Payload:
    """Makes the folder `marker` where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def as_zip(path, payload):
    torch.save({"module": payload}, path)


def as_protocol_4(path, payload):
    torch.save({"module": payload}, path, pickle_protocol=4)


def as_legacy(path, payload):
    torch.save({"module": payload}, path, _use_new_zipfile_serialization=False)


def as_pickle(path, payload):
    path.write_bytes(pickle.dumps(payload))


def among_real_values(path, payload):
    content = torch.load(path, weights_only=False)
    content["random_states"] = {"python": [payload]}
    torch.save(content, path)


def as_tar(path, payload):
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(payload)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def as_second_record(path, payload):
    with zipfile.ZipFile(path, "a") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        archive.writestr(name, pickle.dumps(payload, protocol=2))


def as_torchscript(path, payload):
    with zipfile.ZipFile(path, "a") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        archive.writestr(name.replace("data.pkl", "constants.pkl"), pickle.dumps(payload))


PLACES = {
    "model states": (MODEL, as_zip),
    "model states of protocol 4": (MODEL, as_protocol_4),
    "model states in the legacy format": (MODEL, as_legacy),
    "model states as a bare pickle": (MODEL, as_pickle),
    "model states as a tar": (MODEL, as_tar),
    "model states as TorchScript": (MODEL, as_torchscript),
    "model states, among real values": (MODEL, among_real_values),
    "optimizer states": (OPTIMIZER, as_zip),
    "optimizer states, among real values": (OPTIMIZER, among_real_values),
    "position": ("position.pt", as_zip),
    "position, among real values": ("position.pt", among_real_values),
    "random states": ("random-rank0.pt", as_pickle),
    "a file that calls itself safetensors": ("policy/policy/model.safetensors", as_pickle),
}


@pytest.fixture(autouse=True, scope="module")
def _no_report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expo.run.lifecycle, "write_report", lambda _: "not written")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of ZeRO 2, on one rank."""
    folder = tmp_path_factory.mktemp("forged")
    train(quick(folder, run__steps=2, policy__zero_stage=2, evaluation__num_samples=1))
    return folder


@pytest.fixture
def forged(run, tmp_path):
    """A copy of the run, its configuration, and the folder that the payload would make."""
    shutil.copytree(run / "run", tmp_path / "run")
    config = quick(tmp_path, run__steps=2, policy__zero_stage=2, evaluation__num_samples=1)
    config = config.model_copy(update={"evaluation": quick(run).evaluation})
    return tmp_path / "run", config, tmp_path / "the command ran"


def forge(checkpoint, place, marker):
    name, write = PLACES[place]
    write(checkpoint / name, Payload(marker))
    rewrite_manifest(checkpoint)


def refused(config, **options):
    """The message of a run that does not resume."""
    with pytest.raises(ExpoError) as caught:
        train(config, resume=True, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("write", [as_zip, as_protocol_4, as_legacy, as_pickle, among_real_values])
def test_the_payloads_are_live(tmp_path, write):
    """Otherwise no test here could fail: an ordinary loader runs them."""
    path, marker = tmp_path / "forged.pt", tmp_path / "the command ran"
    torch.save({}, path)
    write(path, Payload(marker))
    pickle.loads(path.read_bytes()) if write is as_pickle else torch.load(path, weights_only=False)
    assert marker.is_dir()


@pytest.mark.parametrize("place", PLACES)
def test_a_forged_checkpoint_is_refused_and_runs_nothing(forged, place):
    run, config, marker = forged
    forge(run / "checkpoints/step-000002", place, marker)
    message = refused(config)
    assert not marker.exists()
    assert f"step-000002 is refused: {PLACES[place][0]}" in message
    assert "the folder was forged, do not use it" in message


def test_a_file_that_the_manifest_does_not_name_is_not_loaded(forged, capsys):
    run, config, marker = forged
    extra = run / "checkpoints/step-000002/policy/policy/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    as_zip(extra, Payload(marker))
    train(config, resume=True)
    assert f"{extra.name} is not in manifest.json); trying the one before" in capsys.readouterr().err
    assert not marker.exists()


def test_a_second_record_of_an_archive_runs_nothing(forged):
    run, config, marker = forged
    with pytest.warns(UserWarning, match="Duplicate name"):
        as_second_record(run / "checkpoints/step-000002" / MODEL, Payload(marker))
    rewrite_manifest(run / "checkpoints/step-000002")
    with suppress(CheckpointError):  # which of the two is read is the archive's matter
        train(config, resume=True)
    assert not marker.exists()


def test_the_one_before_a_damaged_checkpoint_is_checked_too(forged):
    run, config, marker = forged
    os.truncate(run / "checkpoints/step-000002" / MODEL, 99)
    forge(run / "checkpoints/step-000001", "optimizer states", marker)
    assert "step-000001 is refused" in refused(config)
    assert not marker.exists()


@pytest.mark.parametrize("place", ["model states", "model states in the legacy format", "optimizer states", "position"])
def test_nothing_runs_if_a_file_is_exchanged_after_the_check(forged, monkeypatch, place):
    run, config, marker = forged
    forge(run / "checkpoints/step-000002", place, marker)
    monkeypatch.setattr(expo.run.checkpoint, "find_code", lambda folder, names: None)
    assert "step-000002 cannot be loaded (UnpicklingError" in refused(config)
    assert not marker.exists()


def test_nothing_runs_while_a_checkpoint_is_converted_for_another_number_of_ranks(forged, monkeypatch):
    run, config, marker = forged
    shutil.copytree(run / "checkpoints/step-000002", run / "checkpoints/.step-000002.universal")
    as_zip(run / "checkpoints/.step-000002.universal" / MODEL, Payload(marker))
    forge(run / "checkpoints/step-000002", "optimizer states", marker)
    rewrite_manifest(run / "checkpoints/step-000002", ranks=2)
    monkeypatch.setattr(expo.run.checkpoint, "find_code", lambda folder, names: None)
    assert "could not be converted for 1: its files hold more than data; resume" in refused(config)
    assert not marker.exists()


def test_an_evaluation_of_a_forged_checkpoint_runs_nothing(forged, capsys):
    run, _, marker = forged
    forge(run / "checkpoints/step-000002", "model states", marker)
    with pytest.raises(SystemExit) as stop:
        evaluate_main([str(run), "--step", "2", "--num-samples", "1", "--out", str(run.parent / "out")])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"step-000002 is refused: {MODEL} names the code posix.mkdir" in line
    assert not marker.exists()


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_reading_the_weights_of_a_forged_checkpoint_runs_nothing(run, tmp_path, ledger_model, zero_stage):
    policy, marker = tmp_path / "policy", tmp_path / "the command ran"
    shutil.copytree(run / "run/checkpoints/step-000002/policy", policy)
    for path in policy.rglob("*.pt"):
        among_real_values(path, Payload(marker))
    with pytest.raises(CheckpointError, match="does not hold the weights of the run's model"):
        load_checkpoint_weights(ledger_model[0], PolicySection(zero_stage=zero_stage), policy)
    assert not marker.exists()


def test_the_reply_cache_and_the_text_files_run_nothing(forged, capsys):
    run, config, marker = forged
    shutil.rmtree(run / "checkpoints")
    buffer = io.BytesIO()
    torch.save({"texts": Payload(marker)}, buffer)
    (run / "rollouts").mkdir(exist_ok=True)
    (run / "rollouts/step-000001-round-0.gz").write_bytes(gzip.compress(buffer.getvalue(), 0))
    train(config, resume=True)
    assert "step-000001-round-0.gz is ignored, since it cannot be read (UnpicklingError)" in capsys.readouterr().out
    (run / "config.yaml").write_text(f"run: !!python/object/apply:os.mkdir ['{marker}']")
    assert "is not YAML" in refused(config)
    for command in (report_main, evaluate_main):
        with pytest.raises(SystemExit) as stop:
            command([str(run)])
        assert stop.value.code == 2
    assert not marker.exists()


@pytest.mark.parametrize(
    ("setting", "given"), [({"reward__verifier": "os:system"}, "reward.verifier = os:system"),
                           ({"model__trust_remote_code": True}, "model.trust_remote_code = true")]
)  # fmt: skip
def test_code_that_a_run_names_is_given_on_the_command_line_or_not_run(tmp_path, setting, given):
    config = quick(tmp_path, **setting)
    config.run.dir.mkdir()
    (config.run.dir / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(ConfigError, match=f"names code: {given}; if you trust it, give --{given.replace(' ', '')}"):
        resolve(str(config.run.dir), None, [])
    name, value = given.split(" = ")
    resolve(str(config.run.dir), None, [(name, yaml.safe_load(value))])


def test_the_switch_of_torch_that_allows_code_is_overruled_for_the_time_of_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, marker = tmp_path / "forged.pt", tmp_path / "the command ran"
    as_zip(path, Payload(marker))
    load_deepspeed()
    allowed = torch.serialization.get_safe_globals()
    with weights_only_loading(), pytest.raises(pickle.UnpicklingError):
        torch.load(path)
    assert not marker.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
