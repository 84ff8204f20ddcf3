"""A dry run and the run itself: the same verdict in the same words, for runs that can start and runs that cannot."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from expo.config import parse_command_line
from expo.errors import ConfigError
from expo.ledger import MODEL_PATH
from expo.run.setup import open_run
from expo.train import main

pytestmark = pytest.mark.medium

SMALL = (
    "--run.steps=2",
    "--optimizer.warmup_steps=1",
    "--rollout.questions_per_step=4",
    "--rollout.group_size=4",
    "--evaluation.num_samples=1",
)
ROWS = [{"question": f"{number}+1=", "answer": str(number + 1)} for number in range(8)]


def questions(folder, rows, name="questions.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained_on(*rows):
    return lambda folder: [f"--data.train={questions(folder, rows)}"]


def evaluated_on(*rows):
    return lambda folder: [f"--evaluation.sets={{own: '{questions(folder, rows)}'}}"]


def flags(*given):
    return lambda folder: [*given]


def model(change):
    """A copy of the embedded model with a change of its files."""

    def prepare(folder):
        path = shutil.copytree(MODEL_PATH, folder / "model")
        change(path)
        return [f"--model.path={path}"]

    return prepare


def with_config(**values):
    def change(path):
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return model(change)


def with_weights(change_weights):
    def change(path):
        weights = load_file(path / "model.safetensors")
        change_weights(weights)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    return model(change)


def set_nan(weights):
    next(iter(weights.values())).view(-1)[0] = float("nan")


def reshape(weights):
    name = next(name for name, value in weights.items() if value.dim() == 2)
    weights[name] = torch.zeros(3, 3)


def cut(path):
    os.truncate(path / "model.safetensors", 5000)


def run_folder(path, name="config.yaml"):
    (path / "run").mkdir()
    (path / "run" / name).write_text("run: {}\n")
    return []


def file_as_folder(path):
    (path / "file").write_text("")
    return [f"--run.dir={path / 'file' / 'run'}"]


def own_function(text, flag):
    def prepare(folder):
        (folder / "own_module.py").write_text(text)
        return [flag]

    return prepare


LONG = {"question": "1+" * 40 + "1=", "answer": "41"}
REWARDS = "--reward.functions={'own_module:own': 1.0}"

STARTS = {
    "embedded": flags(),
    "without evaluation": flags("--evaluation.sets={}"),
    "without KL": flags("--kl.beta=0"),
    "LoRA": flags("--policy.lora_rank=4"),
    "LoRA and bfloat16": flags("--policy.lora_rank=4", "--policy.dtype=bfloat16"),
    "ZeRO 1": flags("--policy.zero_stage=1"),
    "ZeRO 2": flags("--policy.zero_stage=2"),
    "ZeRO 3": flags("--policy.zero_stage=3"),
    "offloaded reference": flags("--policy.offload_reference=true"),
    "checkpointing": flags("--policy.gradient_checkpointing=true"),
    "eager attention": flags("--model.attention=eager"),
    "own questions": trained_on(*ROWS),
    "some prompts too long": trained_on(*ROWS, LONG),
    "bad answers left out": lambda folder: [
        f"--data.train={questions(folder, [*ROWS, {'question': 'x', 'answer': 'nan'}])}",
        "--data.skip_bad_answers=true",
    ],
    "known columns": trained_on(*[{"problem": row["question"], "answer": row["answer"]} for row in ROWS]),
    "own columns": lambda folder: [
        f"--data.train={questions(folder, [{'Q': row['question'], 'A': row['answer']} for row in ROWS])}",
        "--data.columns={question: Q, answer: A}",
    ],
    "Jinja template": lambda folder: [
        (folder / "p.jinja").write_text("{{ question }}{% if options %}{{ options }}{% endif %}")
        and f"--data.template={folder / 'p.jinja'}"
    ],
    "exact verifier": flags("--reward.verifier=exact"),
    "built-in reward": flags("--reward.functions={'expo.formats:boxed': 0.5}"),
    "own reward": own_function("def own(replies, answers, questions):\n    return [0.0] * len(replies)\n", REWARDS),
    "overlap dropped": flags("--data.drop_overlap=exact"),
    "old log-probs of the rollout": flags("--policy.old_logps=rollout"),
}
REFUSED = {
    "no data file": flags("--data.train=nowhere.jsonl"),
    "no such set": flags("--data.train=ledger:trian"),
    "empty data file": trained_on(),
    "no JSON": lambda folder: [(folder / "bad.jsonl").write_text("{") and f"--data.train={folder / 'bad.jsonl'}"],
    "unknown columns": trained_on(*[{"ask": row["question"], "say": row["answer"]} for row in ROWS]),
    "bad answers": trained_on(*ROWS, {"question": "x", "answer": "nan"}),
    "same id twice": trained_on(*[{**row, "id": "1"} for row in ROWS]),
    "fewer questions than a step": trained_on(*ROWS[:3]),
    "no questions for resampling": lambda folder: [
        f"--data.train={questions(folder, ROWS[:4])}",
        "--rollout.max_resamples=1",
    ],
    "template that fails on a question": flags("--data.template={{ question }}{{ options[0] }}"),
    "all prompts too long": flags("--data.max_prompt_tokens=2"),
    "evaluation prompt too long": evaluated_on(LONG),
    "no evaluation file": flags("--evaluation.sets={own: nowhere.jsonl}"),
    "no chat template": flags("--data.chat_template=true"),
    "longer than the context": flags("--rollout.max_new_tokens=100000", "--policy.micro_batch_tokens=200000"),
    "unknown stop token": flags("--rollout.stop_tokens=['<|nothing|>']"),
    "no reward module": flags("--reward.functions={'nowhere.at.all:own': 1.0}"),
    "no reward function": own_function("x = 1\n", REWARDS),
    "reward module that fails": own_function("1 / 0\n", REWARDS),
    "no verifier": flags("--reward.verifier=nowhere:own"),
    "no device": flags("--run.device=cuda"),
    "no vLLM": flags("--rollout.engine=vllm"),
    "no key for servers": flags("--rollout.engine=vllm-server", "--vllm.servers=['http://127.0.0.1:9']"),
    "no tracker": flags("--run.trackers=[wandb]"),
    "no model": flags("--model.path=./nowhere"),
    "no config.json": model(lambda path: (path / "config.json").unlink()),
    "damaged config.json": model(lambda path: (path / "config.json").write_text("{")),
    "no weights": model(lambda path: (path / "model.safetensors").unlink()),
    "cut weights": model(cut),
    "pointer of Git LFS": model(lambda path: (path / "model.safetensors").write_text("version https://git-lfs")),
    "missing tensor": with_weights(lambda weights: weights.pop(sorted(weights)[-1])),
    "misshapen tensor": with_weights(reshape),
    "NaN weights": with_weights(set_nan),
    "vocabulary too small": with_config(vocab_size=4),
    "no tokenizer": model(lambda path: (path / "tokenizer.json").unlink()),
    "no flash attention": flags("--model.attention=flash_attention_2"),
    "folder with a run": run_folder,
    "file in place of a folder": file_as_folder,
    "folder with too long a name": flags(f"--run.dir={'n' * 300}"),
}
CASES = [*STARTS, *REFUSED]


def start(arguments):
    """The error with which a run does not start, None if it does; it takes no step."""
    try:
        with open_run(parse_command_line(arguments).config, resume=False):
            return None
    except ConfigError as error:
        return " ".join(str(error).splitlines())


def dry_run(arguments, capsys):
    """The error of a dry run, None if it finds none."""
    capsys.readouterr()
    try:
        code = main([*arguments, "--dry-run"])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    if code == 0:
        assert "peak" in printed.out
        return None
    assert (code, printed.err.count("\n")) == (2, 1)
    return printed.err.removeprefix("python -m expo.train: error: ").strip()


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_has_the_verdict_of_the_run(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    arguments = [*SMALL, f"--run.dir={tmp_path / 'run'}", *{**STARTS, **REFUSED}[case](tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    found = dry_run(arguments, capsys)
    written = [path for path in tmp_path.rglob("*") if path not in before and "__pycache__" not in path.parts]
    assert written == []
    assert found == start(arguments)
    assert (found is None) == (case in STARTS)
