"""The plan of a run: it needs no weights and no GPU, its numbers come from the formulas, and bad runs are refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from expo.config import RECIPES, ModelSection, load_config, parse_command_line
from expo.data.record import TRAINING
from expo.errors import ConfigError
from expo.learner.flops import ModelShape
from expo.ledger import MODEL_PATH
from expo.planning.checks import Facts, check_run, find_config
from expo.planning.fit import memory_problem
from expo.planning.gpus import KINDS
from expo.planning.machine import Machine, bare_machine, for_config
from expo.planning.memory import GIB, Footprint
from expo.planning.tables import describe
from expo.run.folder import RunFolder
from expo.run.inputs import check_batches
from expo.runtime.cli import Invocation
from expo.train import main
from tests import ROOT

PAPERS = ("expo-r1-distill-qwen-1.5b.yaml", "expo-qwen3-8b-base.yaml")
A100 = Machine(num_ranks=8, ranks_per_node=8, memory_gib=80.0, source="given", kind=KINDS["a100"])


def numbers(text):
    """The first number of every row, by the row's name."""
    rows = re.findall(r"^ +(\S.*?)  +([\d,.?]+)(?:  |$)", text, flags=re.MULTILINE)
    return {name: number.replace(",", "") for name, number in rows}


IN_PYTORCH = ("rollout.engine", "transformers")


def recipe(name, *overrides):
    return load_config(RECIPES / name, overrides)


def shape_of(config):
    if config.model.path == "ledger":
        return check_run(config, A100).shape
    return ModelShape.from_config(find_config(config.model)[0])


def footprint_of(config, num_ranks=8):
    return Footprint(config, shape_of(config), num_ranks)


def plan(config, machine=A100):
    """The printed plan, with what the checks find here."""
    facts = check_run(config, machine)
    return describe(Footprint(config, facts.shape, machine.num_ranks), machine, facts)


def bare(config=None, **options):
    return bare_machine(Invocation(config=config or load_config(None), **options))


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("python -m expo.train: error: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.medium
@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_are_planned_without_hub_weights_or_gpu(name, tmp_path):
    # no hub, an empty cache, an empty folder
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "expo.train", str(RECIPES / name), "--dry-run", "--ranks", "8"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = numbers(done.stdout)
    assert found["steps"] == "2039"
    assert found["optimizer steps"] == str(4 * 2039)
    assert float(found["peak"]) < 80
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_have_the_papers_settings(name):
    config = recipe(name)
    assert (config.rollout.group_size, config.rollout.questions_per_step, config.run.steps) == (8, 256, 2039)
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (1024, 3072)
    assert (config.kl.beta, config.kl.rho, config.kl.estimator) == (0.02, "tanh", "k3")
    assert (config.curriculum.kind, config.curriculum.mean, config.curriculum.std) == ("gcs", 0.5, 0.35)
    assert (config.curriculum.momentum, config.optimizer.lr, config.policy.updates_per_step) == (0.9, 1e-6, 4)
    assert (config.objective.clip_low, config.objective.clip_high, config.objective.dual_clip) == (0.2, 0.28, 10.0)


def test_the_printed_numbers_are_the_formulas():
    config = recipe(PAPERS[1], IN_PYTORCH, ("rollout.batch_size", 32))
    run = footprint_of(config)
    found = numbers(describe(run, A100, Facts(run.shape, "somewhere", Path("runs/a"))))
    expected = {
        "weights": run.parameter_bytes(),
        "gradients": run.gradient_bytes(),
        "optimizer states": run.optimizer_bytes(),
        "frozen reference": run.reference_bytes(),
        "key-value cache": run.cache_bytes(),
        "next tokens' logits": run.sampling_bytes(),
        "gathered parameters": run.gathered_bytes(),
        "activations": run.activation_bytes(),
        "loss": run.loss_bytes(),
        "ZeRO's buffers": run.bucket_bytes(),
        "peak": run.peak()[1],
        "while loading": run.loading_bytes(8),
        "one checkpoint": run.checkpoint_bytes(),
        "4 checkpoints": 4 * run.checkpoint_bytes(),
        "export": run.export_bytes(),
        "replies": 50 * 2048 * 3072 * 12,
        "in all": 4 * run.checkpoint_bytes() + run.export_bytes() + run.replies_bytes(),
    }
    assert {name: found[name] for name in expected} == {name: f"{value / GIB:.2f}" for name, value in expected.items()}
    assert (found["head"], found["parameters"]) == (str(151936 * 4096), str(run.shape.num_parameters))
    # 64 replies a rank of 4,096 tokens in micro-batches of 16,384
    assert (found["replies a step"], found["replies an optimizer step"], found["micro-batches"]) == (
        "2048",
        "512",
        "16",
    )
    assert found["tokens a step"] == str(2048 * 4096)


def test_the_parts_of_the_model_add_up():
    found = numbers(plan(load_config(None)))
    assert sum(int(found[name]) for name in ("embeddings", "4 layers", "last norm", "head")) == int(found["parameters"])


def test_epochs_are_counted_if_the_questions_are_available(tmp_path):
    assert numbers(plan(load_config(None)))["epochs"] == "4.7"
    questions = tmp_path / "questions.jsonl"
    lines = [f'{{"question": "{number}?", "answer": "{number}"}}' for number in range(256)]
    questions.write_text("\n".join([*lines, lines[0]]))
    config = recipe(PAPERS[0], ("data.train", str(questions)))
    assert numbers(plan(config))["epochs"] == "2039.0"
    assert numbers(plan(recipe(PAPERS[0])))["epochs"] == "30.0"
    elsewhere = recipe(PAPERS[0], ("data.train", "someone/elses:train"))
    assert numbers(plan(elsewhere))["epochs"] == "?"


def test_the_best_checkpoint_is_kept_in_addition_if_evaluations_choose_one():
    config = recipe(PAPERS[0], ("evaluation.sets", {"a": "ledger:beyond"}), ("evaluation.every", 10))
    assert "5 checkpoints" in numbers(plan(config))


def test_the_plan_says_why_no_reference_model_is_loaded():
    text = plan(recipe(PAPERS[0], ("kl.beta", 0.0)))
    assert "none: kl.beta = 0" in text
    text = plan(recipe(PAPERS[0], ("policy.lora_rank", 16)))
    assert "none: LoRA's base is the reference" in text
    assert "LoRA, trained" in text


def test_the_shape_comes_from_the_local_folder_first(tmp_path):
    folder = shutil.copytree(MODEL_PATH, tmp_path / "model")
    facts = check_run(load_config(None, [("model.path", str(folder))]), A100)
    assert facts.shape == shape_of(load_config(None))
    assert facts.shape_source == f"{folder}/config.json"


def test_the_hub_is_not_asked_for_a_model_of_the_table_or_offline(monkeypatch):
    asked = []

    def asked_for(path, **_):
        asked.append(path)
        raise OSError(f"cannot reach {path}\nat all")

    monkeypatch.setattr("expo.planning.checks.AutoConfig.from_pretrained", asked_for)
    monkeypatch.setattr("expo.planning.checks.is_offline", lambda: False)
    assert find_config(ModelSection(path="Qwen/Qwen3-8B"))[0].hidden_size == 4096
    assert asked == []
    with pytest.raises(ConfigError, match=r"model\.path = some/model does not load: cannot reach some/model") as error:
        find_config(ModelSection(path="some/model"))
    assert "\n" not in str(error.value)
    assert asked == ["some/model"]
    monkeypatch.setattr("expo.planning.checks.is_offline", lambda: True)
    with pytest.raises(ConfigError, match=r"the shape of model\.path = some/model is unknown"):
        find_config(ModelSection(path="some/model"))
    assert asked == ["some/model"]


def test_another_revision_may_have_another_shape():
    with pytest.raises(ConfigError, match="is unknown"):
        find_config(ModelSection(path="Qwen/Qwen3-8B", revision="old"))


def test_the_number_of_ranks_is_given_or_that_of_the_launcher_or_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert bare(ranks=1) == Machine(1, 1, 80.0, "assumed; --gpus names others")
    assert bare().is_cpu  # where there is no GPU, the run takes the CPU
    assert (bare().num_ranks, bare().is_here) == (1, True)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert bare(gpu_memory_gib=40.0) == Machine(16, 8, 40.0, "--gpu-memory-gib")
    assert bare(ranks=4).num_ranks == 4
    assert bare().num_ranks == 16
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'many'"):
        bare()


def test_gpus_say_number_memory_and_kind():
    config = load_config(None)
    assert bare(gpus="16xH100") == Machine(16, 8, 79.1, "--gpus=16xH100", kind=KINDS["h100"])
    assert bare(gpus="1x24GiB") == Machine(1, 1, 24.0, "--gpus=1x24GiB")
    with pytest.raises(ConfigError, match="--gpus says what --ranks and --gpu-memory-gib do"):
        bare(config, gpus="L4", ranks=2)
    on_cpu = load_config(None, [("run.device", "cpu")])
    for options in ({"gpus": "L4"}, {"gpu_memory_gib": 8.0}):
        with pytest.raises(ConfigError, match=r"is for a run on GPUs, but run\.device = cpu"):
            bare(on_cpu, **options)


def test_a_run_on_cpus_has_the_memory_of_this_machine():
    config = load_config(None, [("run.device", "cpu")])
    one, two = bare(config, ranks=1), bare(config, ranks=2)
    assert one.memory_gib == pytest.approx(2 * two.memory_gib)
    assert 0 < one.memory_gib * GIB <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_servers_of_vllm_take_gpus_of_their_own():
    config = recipe(PAPERS[0], ("rollout.engine", "vllm-server"), ("vllm.num_servers", 1))
    machine = for_config(A100, config)
    assert (machine.num_ranks, machine.server_gpus) == (6, 2)
    with pytest.raises(ConfigError, match="takes 2 of the 2 GPUs"):
        for_config(Machine(2, 2, 80.0, ""), config)


def test_every_rank_needs_a_reply_in_each_update():
    config = load_config(None)
    check_batches(config, 256)
    with pytest.raises(ConfigError, match=r"are 256 an update, fewer than the 257 ranks; .* take 256 ranks or fewer"):
        check_batches(config, 257)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--ranks=8"], "--ranks is only for --dry-run; add --dry-run"),
        (["--gpus=8x80GiB"], "--gpus is only for --dry-run; add --dry-run"),
        (["--fit=new.yaml"], "--fit is only for --dry-run; add --dry-run"),
        (["--dry-run", "--gpus=many"], "--gpus=many is not understood; expected their number and memory or name"),
        (["--dry-run", "--gpus=8x80GiB", "--ranks=8"], "--gpus says what --ranks and --gpu-memory-gib do"),
        (["--dry-run", "--fit=nowhere/new.yaml"], "--fit=nowhere/new.yaml: there is no folder nowhere; make it first"),
        (["--gpu-memory-gib=8"], "--gpu-memory-gib is only for --dry-run; add --dry-run"),
        (["--dry-run", "--ranks=0"], "--ranks = '0': input should be greater than or equal to 1"),
        (["--dry-run", "--ranks=two"], "--ranks = 'two': input should be a valid integer"),
        (["--dry-run", "--gpu-memory-gib=0"], "--gpu-memory-gib = '0': input should be greater than 0"),
    ],
)
def test_options_of_the_plan_are_checked(capsys, argv, expected):
    assert expected in error_of(capsys, *argv)


def test_the_options_of_a_dry_run_are_parsed():
    invocation = parse_command_line(["--dry-run", "--ranks", "16", "--gpu-memory-gib", "141"])
    assert (invocation.dry_run, invocation.ranks, invocation.gpu_memory_gib) == (True, 16, 141.0)
    assert not parse_command_line([]).dry_run


def test_the_local_rank_that_deepspeeds_launcher_adds_is_accepted():
    assert parse_command_line(["--local_rank=3"]) == parse_command_line([])


def test_vllms_share_of_the_memory_is_subtracted_and_holds_its_sampling():
    config = recipe(PAPERS[0], ("rollout.engine", "vllm"), ("vllm.gpu_memory_utilization", 0.25))
    machine = for_config(A100, config)
    assert (machine.vllm_gib, machine.trainer_gib) == (20.0, 60.0)
    assert "sampling  " not in plan(config, machine)
    assert for_config(A100, recipe(PAPERS[0], IN_PYTORCH)).trainer_gib == 80.0


def problem(config, machine=A100):
    machine = for_config(machine, config)
    return memory_problem(footprint_of(config, machine.num_ranks), machine)


def test_a_sleeping_vllm_frees_its_memory_but_must_fit_beside_the_trainer_when_awake():
    asleep = (("rollout.engine", "vllm"), ("vllm.sleep", True))
    assert problem(recipe(PAPERS[0], *asleep, ("vllm.gpu_memory_utilization", 0.5))) is None
    assert "while vLLM is awake" in problem(recipe(PAPERS[0], *asleep, ("vllm.gpu_memory_utilization", 0.9)))


def test_vllms_weights_must_fit_its_share_and_are_sharded_over_its_gpus():
    overrides = (("rollout.engine", "vllm"), ("vllm.gpu_memory_utilization", 0.15))
    assert "vLLM's weights take 15" in problem(recipe(PAPERS[1], *overrides, ("vllm.tensor_parallel", 1)))
    assert problem(recipe(PAPERS[1], *overrides, ("vllm.tensor_parallel", 2))) is None


def test_what_is_not_on_this_machine_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"question": "{number}?", "answer": "{number}"}}\n' for number in range(300))
    (tmp_path / "few.jsonl").write_text(rows)
    assert main([str(RECIPES / PAPERS[0]), "--dry-run", "--gpus=8xA100", "--evaluation.sets={few: few.jsonl}"]) == 0
    out = capsys.readouterr().out
    unchecked = out[out.index("not checked here") :]
    assert "data.train = dapo-17k: on the hub" in unchecked
    assert "the weights and the tokenizer of deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" in unchecked
    assert "few.jsonl: 300 questions" in out[: out.index("not checked here")]


def test_prompts_are_counted_and_the_longest_one_counts(tmp_path):
    rows = [f'{{"question": "{number}+1=", "answer": "{number + 1}"}}' for number in range(40)]
    rows.append('{"question": "' + "1+" * 40 + '1=", "answer": "41"}')
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    facts = check_run(load_config(None, [("data.train", str(tmp_path / "own.jsonl"))]), A100)
    assert facts.num_questions[TRAINING] == 40
    assert max(facts.prompt_lengths) == len("39+1=")
    assert facts.lines[0].endswith("own.jsonl: 40 questions; left out: 1 with too long a prompt")
    config = load_config(None)
    assert Footprint(config, facts.shape, 1, 5).longest == 5 + config.rollout.max_new_tokens


def test_what_would_resume_is_compared_with_the_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(load_config(None, [("run.dir", str(folder))]).to_yaml())
    given = ("--dry-run", f"--run.dir={folder}")
    assert "already holds a run; add --resume" in error_of(capsys, *given)
    assert main([*given, "--resume"]) == 0
    assert "rollout.group_size" in error_of(capsys, *given, "--resume", "--rollout.group_size=4")
    (folder / "data.json").write_text('{"sets": {"data.train": {"source": "x", "digest": "other"}}}')
    assert "the questions of data.train are not those" in error_of(capsys, *given, "--resume")


def test_a_folder_in_use_is_refused(capsys, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    try:
        assert "another process is at work" in error_of(capsys, "--dry-run", f"--run.dir={folder.path}")
    finally:
        folder.release()
