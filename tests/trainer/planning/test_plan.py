"""The plan of a run: it needs no weights and no GPU, its numbers come from the formulas, and bad runs are refused."""

import os
import re
import subprocess
import sys

import pytest

from expo.config import RECIPES, ModelSection, load_config, parse_command_line
from expo.errors import ConfigError
from expo.learner.flops import ModelShape
from expo.planning.memory import GIB, Footprint
from expo.planning.plan import Machine, check_batches, check_memory, describe, find_shape, plan_machine
from expo.train import main
from tests import ROOT

PAPERS = ("expo-r1-distill-qwen-1.5b.yaml", "expo-qwen3-8b-base.yaml")
A100 = Machine(num_ranks=8, ranks_per_node=8, memory_gib=80.0, source="given")


def numbers(text):
    """The first number of every row, by the row's name."""
    rows = re.findall(r"^ +(\S.*?)  +([\d,.?]+)(?:  |$)", text, flags=re.MULTILINE)
    return {name: number.replace(",", "") for name, number in rows}


IN_PYTORCH = ("rollout.engine", "transformers")


def recipe(name, *overrides):
    return load_config(RECIPES / name, overrides)


def footprint_of(config, num_ranks=8):
    return Footprint(config, find_shape(config.model)[0], num_ranks)


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
    found = numbers(describe(run, A100, "somewhere"))
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
    found = numbers(describe(footprint_of(load_config(None)), A100, "somewhere"))
    assert sum(int(found[name]) for name in ("embeddings", "4 layers", "last norm", "head")) == int(found["parameters"])


def test_epochs_are_counted_if_the_questions_are_available(tmp_path):
    assert numbers(describe(footprint_of(load_config(None)), A100, ""))["epochs"] == "4.7"
    questions = tmp_path / "questions.jsonl"
    lines = [f'{{"question": "{number}?", "answer": "{number}"}}' for number in range(256)]
    questions.write_text("\n".join([*lines, lines[0]]))
    config = recipe(PAPERS[0], ("data.train", str(questions)))
    assert numbers(describe(footprint_of(config), A100, ""))["epochs"] == "2039.0"
    assert numbers(describe(footprint_of(recipe(PAPERS[0])), A100, ""))["epochs"] == "30.0"
    elsewhere = recipe(PAPERS[0], ("data.train", "someone/elses:train"))
    assert numbers(describe(footprint_of(elsewhere), A100, ""))["epochs"] == "?"


def test_the_best_checkpoint_is_kept_in_addition_if_evaluations_choose_one():
    config = recipe(PAPERS[0], ("evaluation.sets", {"a": "a.jsonl"}), ("evaluation.every", 10))
    assert "5 checkpoints" in numbers(describe(footprint_of(config), A100, ""))


def test_the_plan_says_why_no_reference_model_is_loaded():
    text = describe(footprint_of(recipe(PAPERS[0], ("kl.beta", 0.0))), A100, "")
    assert "none: kl.beta = 0" in text
    text = describe(footprint_of(recipe(PAPERS[0], ("policy.lora_rank", 16))), A100, "")
    assert "none: LoRA's base is the reference" in text
    assert "LoRA, trained" in text


def test_the_shape_comes_from_the_local_folder_first(tmp_path, ledger_model):
    ledger_model[0].config.save_pretrained(tmp_path)
    shape, source = find_shape(ModelSection(path=str(tmp_path)))
    assert shape == ModelShape.from_config(ledger_model[0].config)
    assert source == f"{tmp_path}/config.json"


def test_an_unreachable_model_is_refused_in_one_line(monkeypatch):
    def unreachable(path, **_):
        raise OSError(f"cannot reach {path}\nat all")

    monkeypatch.setattr("expo.planning.plan.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(ConfigError, match=r"model\.path = some/model cannot be read") as error:
        find_shape(ModelSection(path="some/model"))
    assert "\n" not in str(error.value)


def test_the_number_of_ranks_is_given_or_that_of_the_launcher_or_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = load_config(None)
    assert plan_machine(config, None, None) == Machine(1, 1, 80.0, "assumed, since there is no GPU here")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert plan_machine(config, None, 40.0) == Machine(16, 8, 40.0, "given")
    assert plan_machine(config, 4, None).num_ranks == 4
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'many'"):
        plan_machine(config, None, None)


def test_a_run_on_cpus_has_no_memory_limit():
    config = load_config(None, [("run.device", "cpu")])
    machine = plan_machine(config, 2, None)
    assert machine.memory_gib is None
    check_memory(footprint_of(config), machine)
    assert "no limit known" in describe(footprint_of(config), machine, "")


def test_every_rank_needs_a_reply_in_each_update():
    config = load_config(None)
    check_batches(config, 256)
    with pytest.raises(ConfigError, match=r"are 256 an update, fewer than the 257 ranks; .* take 256 ranks or fewer"):
        check_batches(config, 257)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([("policy.zero_stage", 0)], "optimizer states with 61.0 GiB: try policy.zero_stage=1"),
        ([IN_PYTORCH, ("rollout.batch_size", 256)], "key-value cache with 146.0 GiB: try a lower rollout.batch_size"),
        ([("policy.gradient_checkpointing", False)], "activations with .* try policy.gradient_checkpointing=true"),
        ([("policy.micro_batch_tokens", 262144)], "activations with .* try a lower policy.micro_batch_tokens"),
    ],
)
def test_a_run_that_does_not_fit_names_its_largest_part_and_how_to_lower_it(overrides, expected):
    run = footprint_of(recipe(PAPERS[1], *overrides))
    with pytest.raises(
        ConfigError, match=rf"takes .* GiB of the GPU's 80\.0 \(given\); the largest part is {expected}"
    ):
        check_memory(run, A100)


def test_refusals_exit_2_with_one_line_after_the_plan(capsys):
    path = str(RECIPES / PAPERS[0])
    assert "fewer than the 513 ranks" in error_of(capsys, path, "--dry-run", "--ranks=513")
    small = ("--ranks=8", "--gpu-memory-gib=24", "--rollout.engine=transformers")
    assert "try a lower rollout.batch_size" in error_of(capsys, path, "--dry-run", *small)
    assert "vllm.tensor_parallel = 2 does not divide the 7 ranks" in error_of(capsys, path, "--dry-run", "--ranks=7")
    assert "needs policy.zero_stage >= 1" in error_of(
        capsys, path, "--dry-run", "--policy.zero_stage=0", "--policy.offload_optimizer=true"
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--ranks=8"], "--ranks is only for --dry-run; add --dry-run"),
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
    overrides = [("rollout.engine", "vllm"), ("vllm.gpu_memory_utilization", 0.25)]
    config = recipe(PAPERS[0], *overrides)
    machine = plan_machine(config, 8, 80.0)
    assert machine.memory_gib == 60.0
    assert "sampling" not in describe(footprint_of(config), machine, "test")
    assert plan_machine(recipe(PAPERS[0], IN_PYTORCH), 8, 80.0).memory_gib == 80.0


def test_a_sleeping_vllm_frees_its_memory_but_must_fit_beside_the_trainer_when_awake():
    asleep = (("rollout.engine", "vllm"), ("vllm.sleep", True))
    config = recipe(PAPERS[0], *asleep, ("vllm.gpu_memory_utilization", 0.5))
    machine = plan_machine(config, 8, 80.0)
    assert (machine.memory_gib, machine.vllm_gib) == (80.0, 40.0)
    check_memory(footprint_of(config), machine)
    greedy = recipe(PAPERS[0], *asleep, ("vllm.gpu_memory_utilization", 0.9))
    with pytest.raises(ConfigError, match="while vLLM is awake"):
        check_memory(footprint_of(greedy), plan_machine(greedy, 8, 80.0))


def test_vllms_weights_must_fit_its_share_and_are_sharded_over_its_gpus():
    overrides = (("rollout.engine", "vllm"), ("vllm.gpu_memory_utilization", 0.15))
    config = recipe(PAPERS[1], *overrides, ("vllm.tensor_parallel", 1))
    with pytest.raises(ConfigError, match="vLLM's weights take 15"):
        check_memory(footprint_of(config), plan_machine(config, 8, 80.0))
    config = recipe(PAPERS[1], *overrides, ("vllm.tensor_parallel", 2))
    check_memory(footprint_of(config), plan_machine(config, 8, 80.0))
