"""Runs that go on: a finished one with more steps or other evaluation sets, a diverged or collapsed one with what its
message advises.
"""

import json
import shlex

import pytest
import torch

import expo.run.lifecycle
import expo.train
from expo.errors import Collapsed
from expo.learner.policy import DeepSpeedPolicy
from expo.train import main, train
from tests.trainer.test_train import checkpoints_of, quick, rows_of, untimed, weights_of

pytestmark = pytest.mark.medium
CONSTANT = {"optimizer__schedule": "constant", "run__keep_checkpoints": 9}


@pytest.fixture(autouse=True)
def _many_runs_in_a_process(monkeypatch):
    monkeypatch.setattr(expo.run.lifecycle, "write_report", lambda _: "left out here")
    monkeypatch.setattr(expo.train, "leave_ranks", lambda: None)  # DeepSpeed cannot join again


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A run of four steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expo.run.lifecycle, "write_report", lambda _: "left out here")
        return train(quick(tmp_path_factory.mktemp("long"), evaluation__every=2, **CONSTANT))


def starts_of(run):
    return json.loads((run / "environment.json").read_text())["starts"]


def command_in(line):
    """The arguments of the command that a message ends with."""
    program, arguments = line.split(": python -m ")[-1].strip().split(" ", 1)
    assert program == "expo.train"
    return shlex.split(arguments)


def failure_of(capsys, arguments):
    """The exit code of a command that fails, and its line on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    problems = capsys.readouterr().err.splitlines()
    (line,) = [problem for problem in problems if problem.startswith("python -m expo.train: ")]  # DeepSpeed warns, too
    return stop.value.code, line


def test_a_finished_run_takes_more_steps_as_one_that_had_them_from_the_start(long, tmp_path):
    run = train(quick(tmp_path, run__steps=2, evaluation__every=2, **CONSTANT))
    assert (run / "summary.json").exists()
    before = weights_of(run)
    train(quick(tmp_path, run__steps=4, evaluation__every=2, **CONSTANT), resume=True)
    for name in ("metrics", "completions", "curriculum", "evaluations"):
        assert untimed(rows_of(run, name)) == untimed(rows_of(long, name))
    assert all(torch.equal(weights_of(run)[name], value) for name, value in weights_of(long).items())
    assert not all(torch.equal(weights_of(run)[name], value) for name, value in before.items())
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert [start.get("changed") for start in starts_of(run)] == [None, {"run.steps": [2, 4]}]


def test_a_run_that_goes_on_has_no_summary_until_it_is_finished(tmp_path, monkeypatch):
    run = train(quick(tmp_path, run__steps=2, **CONSTANT))
    with monkeypatch.context() as patch:
        patch.setattr(DeepSpeedPolicy, "update", lambda *_: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            train(quick(tmp_path, run__steps=3, **CONSTANT), resume=True)
    assert not (run / "summary.json").exists()


def test_scores_that_no_checkpoint_vouches_for_are_measured_again(tmp_path, monkeypatch):
    config = quick(tmp_path, run__steps=1, optimizer__warmup_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(DeepSpeedPolicy, "update", lambda *_: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            train(config)
    path = tmp_path / "run" / "evaluations.jsonl"
    measured = rows_of(path.parent, "evaluations")
    (changed,) = rows_of(path.parent, "evaluations")
    changed["sets"]["few"]["pass_at"]["1"]["mean"] += 0.5
    path.write_text(json.dumps(changed) + "\n")
    run = train(config, resume=True)
    assert untimed(rows_of(run, "evaluations")[:1]) == untimed(measured)


def test_a_finished_run_is_evaluated_on_other_sets(tmp_path):
    run = train(quick(tmp_path, run__steps=2))
    more = {"few": str(tmp_path / "few.jsonl"), "sums": str(tmp_path / "sums.jsonl")}
    (tmp_path / "sums.jsonl").write_text('{"question": "1+1=", "answer": 2}\n{"question": "1+4=", "answer": 5}\n')
    for _ in range(2):  # a line written after the last checkpoint is written again
        train(quick(tmp_path, run__steps=2, evaluation__sets=more), resume=True)
        rows = rows_of(run, "evaluations")
        assert [(row["step"], list(row["sets"])) for row in rows] == [(0, ["few"]), (2, ["few"]), (2, ["sums"])]
    summary = json.loads((run / "summary.json").read_text())
    assert (set(summary["before"]), set(summary["after"])) == ({"few"}, {"few", "sums"})
    assert summary["after"]["few"] == rows[1]["sets"]["few"]
    # the same name for other questions
    (tmp_path / "other.jsonl").write_text('{"question": "2+1=", "answer": 3}\n')
    other = {**more, "sums": str(tmp_path / "other.jsonl")}
    train(quick(tmp_path, run__steps=2, evaluation__sets=other), resume=True)
    assert rows_of(run, "evaluations")[-1]["sets"]["sums"]["num_questions"] == 1


def test_changed_questions_of_a_set_are_refused(tmp_path, capsys):
    run = train(quick(tmp_path, run__steps=1, optimizer__warmup_steps=0))
    (tmp_path / "few.jsonl").write_text('{"question": "2+1=", "answer": 3}\n')
    code, text = failure_of(capsys, [str(run / "config.yaml"), "--resume"])
    assert code == 2
    assert "the questions of evaluation.sets.few are not those" in text


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_diverged_run_recovers_by_the_printed_command(tmp_path, capsys, zero_stage):
    config = quick(tmp_path, optimizer__lr=1e30, optimizer__warmup_steps=0, policy__zero_stage=zero_stage)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    code, text = failure_of(capsys, [str(path)])
    assert code == 1
    assert "not finite" in text or "non-finite" in text
    assert "--resume starts the run over" in text
    assert "--optimizer.lr=1e-05 --resume" in text
    assert main(command_in(text)) == 0
    run = config.run.dir
    rows = rows_of(run, "metrics")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["skipped_updates"] == 0 and row["loss"] is not None for row in rows)
    assert rows[3]["accuracy"] > 0
    assert [start.get("changed") for start in starts_of(run)] == [None, {"optimizer.lr": [1e30, 1e-5]}]
    assert not (run / "diverged.json").exists()
    assert all(value.isfinite().all() for value in weights_of(run).values())


def test_a_run_that_diverges_later_goes_back_to_its_last_good_checkpoint(long, tmp_path, capsys, monkeypatch):
    real = DeepSpeedPolicy.update

    def update(policy, mini_batch, beta):
        if policy._updates_done == 1:  # the update of step 2 spoils the policy, from which step 3 is taken
            policy._optimizer_section = policy._optimizer_section.model_copy(update={"lr": 1e30})
        return real(policy, mini_batch, beta)

    options = {"run__checkpoint_every": 1, "run__keep_checkpoints": 1, "run__max_bad_updates": 2}
    config = quick(tmp_path, **{**CONSTANT, "evaluation__every": 2, **options})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    with monkeypatch.context() as patch:
        patch.setattr(DeepSpeedPolicy, "update", update)
        code, text = failure_of(capsys, [str(path)])
    assert code == 1
    assert "goes back to the checkpoint of step 1" in text
    train(config, resume=True)
    assert "resuming after step 1 of 4 before it diverged" in capsys.readouterr().out
    assert untimed(rows_of(config.run.dir, "metrics")) == untimed(rows_of(long, "metrics"))
    assert all(torch.equal(weights_of(config.run.dir)[name], value) for name, value in weights_of(long).items())


def first_peak(values):
    """The first index, from 2 on, whose value exceeds all before it."""
    return next(index for index in range(2, len(values)) if values[index] > max(values[:index]))


def test_a_collapse_is_named_and_by_setting_ends_the_run_resumably(long, tmp_path, capsys):
    kls = [row["kl"] for row in rows_of(long, "metrics")]
    step = first_peak(kls) + 1
    bound = (kls[step - 1] + max(kls[: step - 1])) / 2
    options = {**CONSTANT, "evaluation__every": 2, "run__collapse_kl": bound, "run__collapse_steps": 1}
    options["run__checkpoint_every"] = 1
    train(quick(tmp_path, "named", **options))
    out = capsys.readouterr().out.splitlines()
    (named,) = [line for line in out if line.startswith(f"step {step}/4")]
    assert f"COLLAPSE: KL above run.collapse_kl = {bound:g}" in named
    assert any(line.startswith(f"warning: step {step} shows a sign of collapse: KL above") for line in out)
    assert not any("COLLAPSE" in line for line in out if line.startswith(f"step {step - 1}/4"))

    ended = quick(tmp_path, "ended", run__end_on_collapse=True, **options)
    with pytest.raises(Collapsed, match=f"has collapsed at step {step}: KL above") as error:
        train(ended)
    assert error.value.exit_code == 3
    assert f"goes back to the checkpoint of step {step - 2}" in str(error.value)
    train(quick(tmp_path, "ended", **options), resume=True)
    run = ended.run.dir
    assert all(torch.equal(weights_of(run)[name], value) for name, value in weights_of(long).items())
    assert checkpoints_of(run) == [f"step-{number:06d}" for number in (1, 2, 3, 4)]


def test_a_run_counts_the_steps_before_it_was_resumed(tmp_path):
    cut = {"run__steps": 4, "rollout__max_new_tokens": 1, "run__collapse_steps": 3, "optimizer__warmup_steps": 0}
    train(quick(tmp_path, run__end_on_collapse=True, **{**cut, "run__steps": 2}))
    with pytest.raises(Collapsed, match=r"at step 3: .*all replies truncated for 3 steps"):
        train(quick(tmp_path, run__end_on_collapse=True, **cut), resume=True)
