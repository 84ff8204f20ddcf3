"""Short runs of the whole algorithm on the embedded task: metrics, files, resuming, and runs that are refused."""

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import expo.run.environment
import expo.train
from expo.config import load_config
from expo.errors import Diverged
from expo.learner.policy import DeepSpeedPolicy
from expo.ledger import MODEL_PATH
from expo.run.folder import RunFolder
from expo.train import main, train

pytestmark = pytest.mark.medium

QUICK = {
    "run.steps": 4,
    "run.checkpoint_every": 2,
    "rollout.questions_per_step": 4,
    "rollout.group_size": 4,
    "optimizer.warmup_steps": 1,
    "evaluation.num_samples": 2,
}
TIMED = ("seconds", "tokens_per_second", "rollout_tokens", "training_tokens", "memory_", "mfu")


def quick(tmp_path, name="run", **overrides):
    values = {**QUICK, "run.dir": str(tmp_path / name), "evaluation.sets": {"few": write_questions(tmp_path)}}
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    return load_config(None, list(values.items()))


def write_questions(tmp_path):
    path = tmp_path / "few.jsonl"
    rows = [{"question": f"{a}+{b}=", "answer": a + b, "level": "sums"} for a in (2, 3) for b in (4, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path, name):
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


def untimed(rows):
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def train_until_it_dies(config, step, monkeypatch):
    """Trains until `step` is about to be recorded."""
    real_row = expo.train.step_row

    def row_or_die(at, *rest):
        if at == step:
            raise KeyboardInterrupt
        return real_row(at, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(expo.train, "step_row", row_or_die)
        with pytest.raises(KeyboardInterrupt):
            train(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return train(quick(folder))


def test_a_run_writes_its_files(finished):
    expected = {
        "config.yaml", "environment.json", "metrics.jsonl", "completions.jsonl", "curriculum.jsonl",
        "evaluations.jsonl", "summary.json", "report.html", "pictures", "checkpoints", "export",
    }  # fmt: skip
    assert expected <= {path.name for path in finished.iterdir()}
    assert len(list((finished / "pictures").glob("*.png"))) >= 8
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["before"]["few"]["num_questions"] == summary["after"]["few"]["num_questions"] == 4
    assert len(rows_of(finished, "completions")) == 4 * 16


def test_metrics_are_consistent(finished):
    rows = rows_of(finished, "metrics")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        replies = [r for r in rows_of(finished, "completions") if r["step"] == row["step"]]
        accuracy = torch.tensor([reply["reward"] for reply in replies]).mean()
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["beta_eff"] == pytest.approx(0.02 * (accuracy.tanh() + 1) / 2)
        assert row["completion_length"] == pytest.approx(sum(r["num_tokens"] for r in replies) / 16)
        phases = sum(value for key, value in row.items() if key.startswith("seconds/"))
        assert phases == pytest.approx(row["seconds"], rel=0.1)
        assert {"kl", "entropy", "loss", "grad_norm", "tokens_per_second"} <= set(row)
        assert row["rollout_logp_difference_max"] < 1e-4
    assert rows[0]["kl"] == 0.0
    assert rows[0]["ratio_max"] == rows[0]["ratio_mean"] == 1.0


def weights_of(run):
    return load_file(run / "export" / "model.safetensors")


def checkpoints_of(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_every_exported_file_can_be_read_by_whom_the_umask_allows(finished):
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (finished / "export").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {oct(0o666 & ~umask())}


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_the_exported_policy_equals_the_last_checkpoint(finished):
    state = torch.load(
        finished / "checkpoints/step-000004/policy/policy/mp_rank_00_model_states.pt", weights_only=False
    )["module"]
    exported = AutoModelForCausalLM.from_pretrained(finished / "export").state_dict()
    assert all(torch.equal(exported[name.removeprefix("model.")], value) for name, value in state.items())
    assert AutoTokenizer.from_pretrained(finished / "export").eos_token_id is not None


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    config = quick(tmp_path, rollout__keep_replies=False)
    monkeypatch.setattr(expo.run.environment, "_commit", lambda: "begun by")
    train_until_it_dies(config, 4, monkeypatch)
    monkeypatch.setattr(expo.run.environment, "_commit", lambda: "ended by")
    assert checkpoints_of(config.run.dir) == ["step-000002"]
    assert [row["step"] for row in rows_of(config.run.dir, "metrics")] == [1, 2, 3]
    resumed = train(config, resume=True)
    for name in ("metrics", "completions", "curriculum", "evaluations"):
        assert untimed(rows_of(resumed, name)) == untimed(rows_of(finished, name))
    assert json.loads((resumed / "summary.json").read_text())["commits"] == ["begun by", "ended by"]
    starts = json.loads((resumed / "environment.json").read_text())["starts"]
    assert [(start["commit"], start["first_step"]) for start in starts] == [("begun by", 1), ("ended by", 3)]
    left, right = weights_of(finished), weights_of(resumed)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_ends_with_the_step_that_spends_its_token_budget(finished, tmp_path, monkeypatch):
    sampled = [0] * 5
    for reply in rows_of(finished, "completions"):
        sampled[reply["step"]] += reply["num_tokens"]
    config = quick(tmp_path, run__reply_tokens=sum(sampled[:3]) + 1)
    train_until_it_dies(config, 3, monkeypatch)
    for _ in range(2):  # a checkpoint holds the tokens sampled; a run that is over takes no further step
        run = train(config, resume=True)
        assert untimed(rows_of(run, "metrics")) == untimed(rows_of(finished, "metrics"))[:3]
        assert [row["reply_tokens"] for row in rows_of(run, "evaluations")] == [0, sum(sampled[:4])]
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["steps"], summary["reply_tokens"]) == (3, sum(sampled[:4]))
        assert checkpoints_of(run) == ["step-000002", "step-000003"]


def test_non_finite_updates_are_skipped_counted_and_kept(tmp_path, monkeypatch):
    real, calls = DeepSpeedPolicy.update, []

    def update(policy, mini_batch, beta):
        calls.append(len(calls))
        if len(calls) == 2:
            mini_batch.micro_batches[0].advantages[0] = float("nan")
        return real(policy, mini_batch, beta)

    monkeypatch.setattr(DeepSpeedPolicy, "update", update)
    run = train(quick(tmp_path))
    rows = rows_of(run, "metrics")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0, 0]
    assert rows[1]["loss"] is None
    kept = torch.load(run / "bad_updates/step-000002-update-0-rank-0.pt", weights_only=True)
    assert kept["micro_batches"][0]["advantages"].isnan().any()
    assert all(value.isfinite().all() for value in weights_of(run).values())


def test_a_run_stops_after_consecutive_non_finite_updates(tmp_path, monkeypatch, capsys):
    real = DeepSpeedPolicy.update

    def update(policy, mini_batch, beta):
        mini_batch.micro_batches[0].advantages.fill_(float("nan"))
        return real(policy, mini_batch, beta)

    monkeypatch.setattr(DeepSpeedPolicy, "update", update)
    config = quick(tmp_path, run__max_bad_updates=2)
    with pytest.raises(Diverged, match="2 updates in a row"):
        train(config)
    assert len(list((config.run.dir / "bad_updates").iterdir())) == 2
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    with pytest.raises(SystemExit) as stop:
        main([str(path), "--resume"])
    assert stop.value.code == 1
    assert "lower optimizer.lr" in capsys.readouterr().err


def test_the_best_checkpoint_is_kept(tmp_path):
    run = train(quick(tmp_path, evaluation__every=1, run__checkpoint_every=1, run__keep_checkpoints=1))
    scores = {row["step"]: row["sets"]["few"]["pass_at"]["1"]["mean"] for row in rows_of(run, "evaluations")[1:]}
    best = max(scores, key=lambda step: (scores[step], step))
    # and the last good one, from which step 4 was taken
    assert checkpoints_of(run) == sorted({f"step-{best:06d}", "step-000003", "step-000004"})


@pytest.mark.slow
def test_a_short_run_learns(tmp_path):
    overrides = {"run.dir": str(tmp_path / "run"), "run.steps": 40, "evaluation.num_samples": 16}
    run = train(load_config(None, list(overrides.items())))
    summary = json.loads((run / "summary.json").read_text())
    before, after = (summary[when]["held_out"]["pass_at"] for when in ("before", "after"))
    assert 0.25 < before["1"]["mean"] < 0.5
    assert after["1"]["mean"] > before["1"]["mean"] + 0.08
    assert after["8"]["mean"] > before["8"]["mean"] - 0.02


def test_a_finished_run_is_not_overwritten(finished, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--run.dir", str(finished)])
    assert stop.value.code == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err


def test_a_second_process_in_the_folder_is_refused(finished, capsys):
    other = RunFolder(finished)
    other.lock()
    with pytest.raises(SystemExit) as stop:
        main([str(finished / "config.yaml"), "--resume"])
    other.release()
    assert stop.value.code == 2
    assert "another process is at work" in capsys.readouterr().err


def test_resuming_with_other_settings_is_refused(finished, capsys):
    argv = [str(finished / "config.yaml"), "--resume", "--kl.beta=0.5"]
    with pytest.raises(SystemExit):
        main(argv)
    assert "kl.beta (0.02 -> 0.5)" in capsys.readouterr().err


def test_grpo_is_a_setting(tmp_path):
    run = train(quick(tmp_path, curriculum__kind="uniform", kl__rho="constant", policy__updates_per_step=2))
    rows = rows_of(run, "metrics")
    assert [row["beta_eff"] for row in rows] == pytest.approx([0.02] * 4)
    assert max(row["ratio_max"] for row in rows) > 1.0, "the second update of a step is off-policy"
    assert max(row["rollout_logp_difference_max"] for row in rows) < 1e-4


@pytest.mark.parametrize("overrides", [{"policy__zero_stage": 3}, {"policy__lora_rank": 4}, {"policy__packing": True}])
def test_other_policies_learn_from_the_same_rollouts(tmp_path, finished, overrides):
    run = train(quick(tmp_path, run__steps=2, **overrides))
    rows, plain = rows_of(run, "metrics"), rows_of(finished, "metrics")
    assert rows[0]["accuracy"] == plain[0]["accuracy"]
    assert rows[0]["kl"] == 0.0
    assert max(row["rollout_logp_difference_max"] for row in rows) < 1e-4
    assert (rows[0]["padding_fraction"] == 0.0) == ("policy__packing" in overrides)


def test_bfloat16_rollouts_and_training_agree(tmp_path):
    rows = rows_of(train(quick(tmp_path, policy__dtype="bfloat16")), "metrics")
    assert rows[0]["kl"] == 0.0
    assert rows[0]["ratio_max"] == 1.0
    assert max(row["rollout_logp_difference_max"] for row in rows) < 0.3


def test_uniform_and_gaussian_runs_draw_different_questions(tmp_path, finished):
    run = train(quick(tmp_path, curriculum__kind="uniform"))
    drawn = [[row["question_id"] for row in rows_of(path, "completions")] for path in (run, finished)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"model.path": "./lost"}, "model.path = ./lost does not exist"),
        ({"data.train": "empty.jsonl"}, "empty.jsonl holds no questions"),
        ({"data.train": "lost.jsonl"}, "cannot read the question file lost.jsonl"),
        ({"data.train": "one.jsonl"}, "add --rollout.questions_per_step=1"),
        ({"data.train": "odd.jsonl"}, "odd.jsonl"),
        ({"run.device": "warp"}, "run.device = 'warp'"),
        ({"run.dir": "odd.jsonl/run"}, "the folder odd.jsonl/run cannot be written"),
        ({"model.path": "./torn"}, "model.path = ./torn: model.safetensors is truncated"),
    ],
)
def test_runs_that_cannot_start_exit_2_with_one_line(tmp_path, monkeypatch, capsys, override, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "one.jsonl").write_text('{"question": "1+1=", "answer": 2}\n')
    (tmp_path / "odd.jsonl").write_text('{"question": "1+1=", "answer": "\\\\frac{"}\n' * 40)
    shutil.copytree(MODEL_PATH, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    path = tmp_path / "config.yaml"
    path.write_text(quick(tmp_path).to_yaml())
    values = yaml.safe_load(path.read_text())
    for key, value in override.items():
        section, field = key.split(".")
        values[section][field] = value
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as stop:
        main([str(path)])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert expected in text
    assert text.count("\n") == 1


def one_step(tmp_path, capsys, **overrides):
    """The step's lines on the console."""
    quick_run = {
        "run__steps": 1,
        "optimizer__warmup_steps": 0,
        "evaluation__sets": {},
        "rollout__questions_per_step": 2,
        **overrides,
    }
    train(quick(tmp_path, **quick_run))
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step ", "warning: "))]


def test_a_step_whose_replies_are_all_truncated_says_what_to_change(tmp_path, capsys):
    step, advice = one_step(tmp_path, capsys, rollout__max_new_tokens=1)
    assert "ALL REPLIES TRUNCATED" in step
    assert "was cut at rollout.max_new_tokens = 1; raise it" in advice


def test_a_step_whose_replies_state_no_answer_says_what_to_change(tmp_path, capsys):
    step, advice = one_step(tmp_path, capsys, rollout__stop_tokens=[str(digit) for digit in range(10)])
    assert "ALL REPLIES UNPARSED" in step
    assert "TRUNCATED" not in step
    assert "no reply of step 1 states an answer that can be read" in advice
    assert "data.prompt = plain does not ask for one: take boxed or dapo" in advice


def test_a_run_without_answers_shows_its_first_replies_in_steps_and_evaluations(tmp_path, capsys):
    train(quick(tmp_path, run__steps=2, rollout__stop_tokens=[str(digit) for digit in range(10)]))
    lines = capsys.readouterr().out.splitlines()
    warned = [index for index, line in enumerate(lines) if line.startswith("warning: no reply of")]
    assert [lines[index].partition("no reply of ")[2].partition(" states")[0] for index in warned] == [
        "the evaluation set few",
        "step 1",
        "step 2",
        "the evaluation set few",
    ]
    assert all(lines[index + 1].startswith("  unparsed, since it") for index in warned)


def test_an_ordinary_step_gives_no_advice(tmp_path, capsys):
    (step,) = one_step(tmp_path, capsys)
    assert "ALL REPLIES" not in step
