"""Files of a model that are damaged or do not fit: one line names what is wrong, before a model loads if possible."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expo.config import ModelSection, load_config
from expo.errors import ConfigError
from expo.evaluation.frozen import FrozenPolicy
from expo.learner.model import empty_copy, load_model
from expo.learner.model_checks import context_length
from expo.learner.model_files import check_model_files, file_digests, load_model_config, load_tokenizer
from expo.learner.policy import DeepSpeedPolicy
from expo.ledger import MODEL_PATH
from expo.rollout.engine import end_ids
from expo.run.inputs import load_inputs
from expo.runtime.distributed import join_ranks
from expo.train import main
from tests.trainer.learner.families import save_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model that a test may damage."""
    return shutil.copytree(MODEL_PATH, tmp_path / "model")


def edit(file, **values):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def inputs(folder, *overrides):
    return load_inputs(load_config(None, [("model.path", str(folder)), *overrides]))


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "pointer": (
        lambda folder: (folder / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is a pointer of",
    ),
    "pointer of the tokenizer": (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "git lfs pull"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors is empty"),
    "truncated": (lambda folder: truncate(folder / "model.safetensors"), r"model\.safetensors is truncated"),
    "no safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
        r"model\.safetensors is tr",
    ),
    "none": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "is no index of weights"),
    "missing shard": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        r"b\.safetensors, which model\.safetensors\.index\.json names, is missing",
    ),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "the configuration of model.path"),
    "config of no model": (lambda folder: (folder / "config.json").write_text("{}"), "the configuration of model.path"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "the configuration of model.path"),
    "tokenizer is no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer of model.path"),
    "tokenizer is a list": (lambda folder: (folder / "tokenizer.json").write_text("[]"), "the tokenizer of model.path"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line_before_a_model_loads(folder, damage, monkeypatch, capsys):
    harm, problem = DAMAGES[damage]
    harm(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ConfigError, match=problem):
        inputs(folder)
    with pytest.raises(SystemExit) as stop:
        main([f"--model.path={folder}", f"--run.dir={folder.parent / 'run'}", "--run.device=cpu"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("python -m expo.train: error: ")
    assert "\n" not in error
    assert not (folder.parent / "run").exists()


def test_a_whole_folder_passes(folder):
    check_model_files(ModelSection(path=str(folder)))
    assert len(inputs(folder).train_set) > 0


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_tensors_are_named(folder, name):
    edit_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(ConfigError, match=rf"lacks 1 tensors of its architecture: {name}; "):
        load_model(ModelSection(path=str(folder)), CPU)


def test_tensors_of_other_shapes_are_named(folder):
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(ConfigError, match=r"has 1 tensors of other shapes than config\.json says: model\.norm\.weight"):
        load_model(ModelSection(path=str(folder)), CPU)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_an_adapter_of_peft_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"])).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"holds an adapter of PEFT.*merge it"):
        load_model(ModelSection(path=str(folder)), torch.device("cpu"))


def test_a_vocabulary_of_another_size_is_refused(folder):
    edit(folder / "config.json", vocab_size=24)
    with pytest.raises(ConfigError, match=r"tensors of other shapes .*embed_tokens"):
        load_model(ModelSection(path=str(folder)), CPU)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", [0, 3])
def test_weights_that_are_no_numbers_are_named(folder, number, stage):
    edit_weights(folder, lambda weights: weights["model.layers.2.mlp.up_proj.weight"].view(-1)[5].fill_(number))
    config = load_config(None, [("model.path", str(folder)), ("policy.zero_stage", stage)])
    named = r"has NaN or infinite weights in 1 tensors: model\.layers\.2\.mlp\.up_proj\.weight"
    with pytest.raises(ConfigError, match=named):
        DeepSpeedPolicy(config, join_ranks("cpu", 60))
    with pytest.raises(ConfigError, match=named):
        FrozenPolicy(config.model, config.policy, CPU)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_missing_tensor_is_found_however_the_model_is_sharded(folder, stage):
    edit_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    config = load_config(None, [("model.path", str(folder)), ("policy.zero_stage", stage)])
    with pytest.raises(ConfigError, match=r"lacks 1 tensors of its architecture: model\.norm\.weight"):
        DeepSpeedPolicy(config, join_ranks("cpu", 60))


def test_sequences_longer_than_the_context_are_refused_before_a_model_loads(folder):
    with pytest.raises(ConfigError, match=r"32 \+ 33 = 65 tokens are more than the model's context of 64 "):
        inputs(folder, ("rollout.max_new_tokens", 33))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 64),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"max_position_embeddings": 200, "rope_parameters": {"rope_type": "llama3", "factor": 2.0,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}}, 200),
    ],
)  # fmt: skip
def test_the_context_includes_the_scaling_of_positions(folder, changes, expected):
    edit(folder / "config.json", **changes)
    assert context_length(load_model_config(ModelSection(path=str(folder)))) == expected


def test_a_model_without_a_limit_on_its_positions_has_none(tmp_path):
    save_model(tmp_path, "bloom")
    assert context_length(load_model_config(ModelSection(path=str(tmp_path)))) is None


def test_a_tokenizer_of_another_model_is_refused_before_a_model_loads(folder):
    edit(folder / "config.json", vocab_size=5)
    with pytest.raises(ConfigError, match=r"gives the id \d+, but the model's vocabulary has 5 \(vocab_size\)"):
        inputs(folder)


def test_code_of_a_model_runs_only_if_it_is_trusted(folder, monkeypatch, capsys):
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Mine"})
    ran = folder / "ran"
    (folder / "code.py").write_text(
        f"from pathlib import Path\nfrom transformers import Qwen3Config\nPath({str(ran)!r}).touch()\n"
        f"class Mine(Qwen3Config):\n    model_type = 'mine'\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "cache"))
    with pytest.raises(ConfigError, match=r"read that code, then set --model\.trust_remote_code=true"):
        load_model_config(ModelSection(path=str(folder)))
    assert not ran.exists()
    assert "y/N" not in capsys.readouterr().out
    found = load_model_config(ModelSection(path=str(folder), trust_remote_code=True))
    assert (found.model_type, ran.exists()) == ("mine", True)


def test_the_revision_reaches_every_download(monkeypatch):
    asked = []

    def refuse(path, **options):
        asked.append((path, options["revision"], options["trust_remote_code"]))
        raise OSError("no network")

    monkeypatch.setattr("expo.learner.model_files.AutoConfig.from_pretrained", refuse)
    monkeypatch.setattr("expo.learner.model_files.AutoTokenizer.from_pretrained", refuse)
    section = ModelSection.model_validate({"path": "someone/model", "revision": 1234567})
    for load in (load_model_config, load_tokenizer):
        with pytest.raises(ConfigError, match="does not load: no network"):
            load(section)
    assert asked == [("someone/model", "1234567", False)] * 2


SAMPLING = [
    {"temperature": 0.6, "top_p": 0.9},  # Llama 2, Vicuna: without do_sample
    {"temperature": 0.6, "do_sample": False},
    {"temperature": 0.6, "length_penalty": 0.5, "early_stopping": True},
]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_model_with_odd_sampling_settings_can_be_exported(folder, file, settings):
    edit(folder / file, **settings)
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    config = load_config(None, [("model.path", str(folder))])
    policy = DeepSpeedPolicy(config, join_ranks("cpu", 60))
    policy.export(folder.parent / "export")
    exported = AutoModelForCausalLM.from_pretrained(folder.parent / "export")
    assert exported.generation_config.eos_token_id == 1
    empty_copy(exported, torch.float32, CPU)


def test_special_tokens_that_are_none_are_not_exported(folder):
    edit(folder / "generation_config.json", pad_token_id=-1)
    model, _ = load_model(ModelSection(path=str(folder)), CPU)
    model.save_pretrained(folder.parent / "export")
    assert model.generation_config.pad_token_id is None
    assert model.generation_config.eos_token_id == 1


def test_stop_tokens_end_a_reply(ledger_model):
    model, tokenizer = ledger_model
    assert end_ids(model, tokenizer, ["="]) == end_ids(model, tokenizer) | {tokenizer("=")["input_ids"][0]}
    with pytest.raises(ConfigError, match=r"rollout\.stop_tokens has '1\+1', which is 3 tokens"):
        inputs("ledger", ("rollout.stop_tokens", ["1+1"]))


def test_digests_of_files_follow_their_content_in_large_files_too(folder):
    config = ModelSection(path=str(folder))
    large = folder / "model-2.safetensors"
    large.write_bytes(bytes(2**23))
    (folder / "README.md").touch()
    before = file_digests(config, None)
    assert "README.md" not in before
    assert before["model-2.safetensors"].startswith(f"{2**23} bytes, sha256 ")
    for place in (0, 2**22 - 1, -1):
        content = bytearray(2**23)
        content[place] = 1
        large.write_bytes(content)
        found = file_digests(config, None)
        assert [name for name in before if found[name] != before[name]] == ["model-2.safetensors"], place
    edit(folder / "config.json", more=1)
    assert file_digests(config, None)["config.json"] != before["config.json"]


def test_a_model_of_the_hub_is_identified_by_its_commit():
    class Config:
        _commit_hash = "0123abcd"

    assert file_digests(ModelSection(path="owner/name"), Config()) == {"the commit": "0123abcd"}
