"""The tutorial's code and commands, as printed, with a model of random weights in place of SmolLM2."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expo.__main__ import main
from tests import ROOT
from tests.ranks.running import environment_of_no_rank

pytestmark = pytest.mark.medium  # trains, evaluates and exports

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
QUESTIONS, LOAD, FUNCTIONS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(YAML,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"^    expo-rl (.*)$", PAGE, flags=re.MULTILINE)
OWN = dict(re.findall(r"^\| (an? .*?|other columns) \| `(.*?)`", PAGE, flags=re.MULTILINE))
SHORT = ["--run.steps=2", "--optimizer.warmup_steps=1", "--run.device=cpu"]
CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_model(folder):
    """A Llama of random weights whose tokens are bytes and an empty line, with a chat template."""
    tokens = ["<end>", "<pad>", "ĊĊ", *sorted(pre_tokenizers.ByteLevel.alphabet())]  # Ċ: the byte of a line break
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=CHAT
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tutorial takes place."""
    folder = tmp_path_factory.mktemp("tutorial")
    save_model(folder / "models" / "smollm2-135m")
    (folder / "tutorial.yaml").write_text(YAML)
    (folder / "mine.py").write_text(FUNCTIONS)
    (folder / "prompt.jinja").write_text("{{ question }}\nAnswer: within <answer> and </answer>.")
    rows = [{"text": f"{a} + {a} = ?", "label": str(2 * a)} for a in range(20)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(QUESTIONS, {})
    return folder


def run(folder, command, *more):
    """The exit code of a command; what sets up ranks has a process of its own."""
    arguments = [*shlex.split(command), *more]
    if arguments[0] == "data" or "--dry-run" in arguments:
        return main(arguments)
    script = Path(sys.executable).with_name("expo-rl")
    return subprocess.run([script, *arguments], cwd=folder, env=environment_of_no_rank(), check=False).returncode


@pytest.mark.slow
def test_the_six_commands_and_the_export(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert len((folder / "train.jsonl").read_text().splitlines()) == 60
    assert len((folder / "test.jsonl").read_text().splitlines()) == 20
    commands = COMMANDS[: COMMANDS.index("evaluate compare before after") + 1]
    assert len(commands) == 6
    for command in commands:
        assert run(folder, command, *(SHORT if command.startswith("train") else [])) == 0
    printed = capfd.readouterr().out
    assert "Mia has" in printed or "Tom has" in printed
    assert "the verifier (math) reads" in printed
    assert "pass@1" in printed
    assert (folder / "runs" / "tutorial" / "report.html").is_file()
    exec(LOAD, {})
    (later,) = [command for command in COMMANDS if command.startswith("export")]
    assert run(folder, later.replace("--step 10", "--step 2")) == 0
    assert (folder / "step-10" / "model.safetensors").is_file()


@pytest.mark.parametrize("what", OWN)
def test_flags_for_what_is_your_own_can_start(folder, what, monkeypatch):
    assert len(OWN) == 5
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    assert run(folder, f"train tutorial.yaml {OWN[what]}", *SHORT, "--run.dir=mine", "--dry-run") == 0


@pytest.mark.parametrize("number", [1, 4])
def test_a_run_with_your_own_prompt_data_and_functions(folder, number, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    flags = list(OWN.values())
    flags = flags[:1] if number == 1 else flags[1:]
    target = tmp_path / "run"
    more = [f"--run.dir={target}", "--evaluation.sets={}", "--run.checkpoint_every=0", *SHORT]
    assert run(folder, f"train tutorial.yaml {' '.join(flags)}", *more) == 0
    steps = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2]
    if number == 4:
        assert "reward/brief" in steps[0]
