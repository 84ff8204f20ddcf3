"""`expo-rl export`: a checkpoint becomes a model folder, merged or as an adapter, whole or not at all."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from expo import ledger
from expo.export import export, main
from expo.train import train
from tests.trainer.run.short_runs import quick, rewrite_manifest
from tests.trainer.run.test_forged_folders import MODEL, Payload

pytestmark = pytest.mark.medium

FEW = {"run__steps": 2, "evaluation__every": 0, "run__keep_checkpoints": 3, "optimizer__lr": 1e-2}
IDS = torch.arange(4, 14)[None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of all weights, and one of adapters in bfloat16."""
    folder = tmp_path_factory.mktemp("runs")
    lora = {"policy__lora_rank": 4, "policy__dtype": "bfloat16"}
    return {name: train(quick(folder, name, **FEW, **more)) for name, more in {"full": {}, "lora": lora}.items()}


@pytest.fixture
def interrupted(runs, tmp_path):
    """Copies of the runs as they are before their last step: without an export."""
    for name, run in runs.items():
        shutil.copytree(run, tmp_path / name)
        shutil.rmtree(tmp_path / name / "export")
    return tmp_path


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv], "expo-rl export")
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert err.startswith("expo-rl export: error: ")
    return stop.value.code, err


@pytest.mark.parametrize("name", ["full", "lora"])
def test_an_interrupted_run_exports_the_bytes_that_its_end_would_have_written(runs, interrupted, capsys, name):
    before = {path.name for path in (interrupted / name).iterdir()}
    assert main([str(interrupted / name)]) == 0
    path = interrupted / name / "export-step-000002"
    assert capsys.readouterr().out == f"{path}\n"
    assert files(path) == files(runs[name] / "export")
    assert {path.name for path in (interrupted / name).iterdir()} - before == {path.name}
    assert (path / "model.safetensors").stat().st_mode == (path / "config.json").stat().st_mode
    assert AutoTokenizer.from_pretrained(path).decode(IDS[0])


def test_an_earlier_step_has_the_weights_of_that_step(interrupted, tmp_path):
    by_step = [load(export(str(interrupted / "full"), step, out=tmp_path / str(step))) for step in (1, 2)]
    assert not torch.equal(*map(logits, by_step))
    checkpoint = interrupted / "full" / "checkpoints" / "step-000001"
    assert files(export(str(checkpoint), out=tmp_path / "named")) == files(tmp_path / "1")


def test_base_and_adapter_give_the_logits_of_the_merged_model(interrupted, tmp_path):
    run = interrupted / "lora"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["policy"]["dtype"] = "float32"  # of the export: merged weights are not rounded
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    merged, folder = load(export(str(run), out=tmp_path / "merged")), export(str(run), adapter=True)
    assert folder.name == "adapter-step-000002"
    assert set(files(folder)) == {"adapter_config.json", "adapter_model.safetensors"}
    base = load(ledger.MODEL_PATH)
    without = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, folder))
    torch.testing.assert_close(adapted, logits(merged), atol=1e-5, rtol=1e-5)
    assert (adapted - without).abs().max() > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["task_type"]) == (4, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(ledger.MODEL_PATH)
    assert "lm_head" not in config["target_modules"]


def test_nothing_that_exists_is_overwritten(interrupted, capsys, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "link", tmp_path / "empty", interrupted / "full" / "config.yaml"):
        code, err = error_of(capsys, interrupted / "full", "--out", out)
        assert code == 2
        assert f"{out} exists, and nothing is overwritten; give a new folder as --out" in err
    export(str(interrupted / "full"))
    assert error_of(capsys, interrupted / "full")[0] == 2


def test_a_failed_write_leaves_nothing(interrupted, capsys, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.tokenization_utils_base.PreTrainedTokenizerBase.save_pretrained", full_disk)
    before = set(interrupted.rglob("*"))
    code, err = error_of(capsys, interrupted / "full", "--out", interrupted / "a" / "model")
    assert code == 1
    assert "cannot be written (No space left on device); free some space, or give another folder" in err
    assert not [path for path in interrupted.rglob("*") if path not in before and path.is_file()]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--step=7"], "has no checkpoint of step 7; it has 1, 2"),
        (["--step=x"], "--step = 'x'; expected the number of a checkpoint's step"),
        (["--adapter"], "trained all weights (policy.lora_rank = 0)"),
        (["--model.path=nowhere"], "model.path = nowhere does not exist"),
        (["--model.trust_remote_code=perhaps"], "--model.trust_remote_code = 'perhaps': "),
    ],
)
def test_what_cannot_be_exported_is_one_line(runs, capsys, argv, expected):
    code, err = error_of(capsys, runs["full"], *argv)
    assert code == (1 if "step=7" in argv[0] else 2)
    assert expected in err


def damage_config(run):
    (run / "config.yaml").write_text("model: [")


def other_settings(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["policy"]["lora_rank"] = 8
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def remote_code(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["trust_remote_code"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def no_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def cut_checkpoints(run):
    for path in run.glob("checkpoints/*/policy/policy/*model_states.pt"):
        path.write_bytes(path.read_bytes()[:-9])


DAMAGE = {
    damage_config: "is not YAML as expected",
    other_settings: "does not hold the weights of the run's model",
    remote_code: "names code: model.trust_remote_code = true; if you trust it, give --model.trust_remote_code=true",
    no_checkpoints: "has no checkpoint yet",
    cut_checkpoints: "none of the 2 checkpoints",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_one_error_and_writes_nothing(interrupted, capsys, damage):
    run = interrupted / "full"
    damage(run)
    before = set(run.iterdir())
    with pytest.raises(SystemExit) as stop:
        main([str(run)])
    assert stop.value.code in (1, 2)
    assert DAMAGE[damage] in capsys.readouterr().err.splitlines()[-1]
    assert set(run.iterdir()) == before


def test_a_forged_checkpoint_runs_nothing(interrupted, capsys):
    for checkpoint in (interrupted / "full" / "checkpoints").glob("step-*"):
        torch.save({"module": Payload(interrupted / "marker")}, checkpoint / MODEL)
        rewrite_manifest(checkpoint)
    code, err = error_of(capsys, interrupted / "full")
    assert code == 1
    assert "names the code" in err
    assert not (interrupted / "marker").exists()


def test_weights_that_are_not_finite_are_refused(interrupted, capsys, monkeypatch):
    monkeypatch.setattr(
        "expo.export.read_checkpoint_weights", lambda *_: {"model.norm.weight": torch.tensor([1.0, float("nan")])}
    )
    code, err = error_of(capsys, interrupted / "full")
    assert code == 1
    assert "step-000002: model.norm.weight is not finite; choose an earlier step with --step" in err


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder"])
def test_what_is_no_run_is_one_error(tmp_path, capsys, kind):
    path = tmp_path / "x"
    if kind != "missing":
        path.write_text("") if kind == "file" else path.mkdir()
    code, err = error_of(capsys, path)
    assert code == 2
    assert "so it is no run; give the folder of a run" in err
