"""Resampling of groups with equal rewards: which groups are kept, their metrics, and runs that resample."""

import pytest
import torch

import expo.run.lifecycle
from expo.config import load_config
from expo.rewards.groups import GradedRollouts, Rollouts, has_unequal_rewards
from expo.train import draw_questions, main, train, training_samples
from expo.types import Prompt, Question, Reply, Verdict
from expo_kernels import CurriculumTable
from tests.trainer.test_train import quick, rows_of, train_until_it_dies, untimed, weights_of

pytestmark = pytest.mark.medium

# half of all pairs of replies are both correct or both wrong
PAIRS = {"rollout__group_size": 2, "rollout__max_resamples": 2, "run__checkpoint_every": 3, "run__steps": 6}
REPLY = Reply([5, 6], [-0.5, -0.7], False, "")


def round_of(*patterns):
    """Groups of replies; a 1 in a pattern is a correct reply."""
    verdicts = [[Verdict("correct" if mark == "1" else "wrong", "") for mark in pattern] for pattern in patterns]
    prompts = [Prompt(Question(pattern, pattern, "1"), [5]) for pattern in patterns]
    return GradedRollouts(prompts, [[REPLY] * len(pattern) for pattern in patterns], verdicts)


def kept(size, *rounds):
    return [
        prompt.question.id
        for prompt in Rollouts([round_of(*patterns) for patterns in rounds], size).kept_groups.prompts
    ]


def test_groups_with_unequal_rewards_are_kept_in_the_order_drawn_and_others_fill_up():
    assert kept(3, ["000", "010", "111"]) == ["000", "010", "111"]
    assert kept(3, ["000", "010", "111"], ["110", "100"]) == ["010", "110", "100"]
    assert kept(3, ["000", "010", "111"], ["110", "000"]) == ["000", "010", "110"]


def test_sampled_groups_are_counted():
    rollouts = Rollouts([round_of("000", "010", "111"), round_of("110", "000")], 3)
    assert rollouts.metrics() == {"groups_sampled": 5, "groups_dropped": 2, "resampling_rounds": 1}
    assert rollouts.num_missing == 1
    assert rollouts.sampled.correct.mean() == pytest.approx(6 / 15)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
def test_equal_rewards_are_recognised_whatever_their_float_deviation(value):
    rewards = torch.full((2, 7), value)
    rewards[1, 3] = torch.nextafter(rewards[1, 3], torch.ones(()))
    assert has_unequal_rewards(rewards).tolist() == [False, True]


def test_truncated_replies_are_left_out_if_masked():
    cut = Reply([5, 6], [-0.5, -0.7], True, "")
    graded = GradedRollouts(round_of("01").prompts, [[REPLY, cut]], round_of("01").verdicts)
    for mask_truncated in (False, True):
        samples = training_samples(graded, torch.tensor([1.0, -1.0]), mask_truncated=mask_truncated)
        assert [sample.is_left_out for sample in samples] == [False, mask_truncated]


@pytest.fixture(scope="module", autouse=True)
def _no_report():
    """Drawing the report takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expo.run.lifecycle, "write_report", lambda _: "left out here")
        yield


@pytest.fixture(scope="module")
def resampled(tmp_path_factory):
    return train(quick(tmp_path_factory.mktemp("resampled"), **PAIRS))


def questions_of(run, step):
    return list(dict.fromkeys(row["question_id"] for row in rows_of(run, "completions") if row["step"] == step))


def test_every_group_sampled_counts(resampled):
    rows = rows_of(resampled, "metrics")
    visits = torch.load(resampled / "checkpoints/step-000006/position.pt", weights_only=True)["curriculum"]["visits"]
    assert int(visits.sum()) == sum(row["groups_sampled"] for row in rows) > 6 * 4
    for row in rows:
        replies = [reply for reply in rows_of(resampled, "completions") if reply["step"] == row["step"]]
        assert len(replies) == 2 * row["groups_sampled"]
        assert len(questions_of(resampled, row["step"])) == row["groups_sampled"] <= 4 * 3
        assert row["groups_dropped"] == row["groups_sampled"] - 4
        assert row["accuracy"] == pytest.approx(sum(reply["reward"] for reply in replies) / len(replies))
        assert row["resampling_rounds"] <= 2
        assert (row["groups_dropped"] > 0) == (row["resampling_rounds"] > 0)
    assert max(row["resampling_rounds"] for row in rows) > 0


@pytest.mark.parametrize("kind", ["gcs", "uniform"])
def test_further_rounds_do_not_change_the_questions_of_the_first(kind):
    def draw(rounds):
        overrides = {"curriculum.kind": kind, "rollout.max_resamples": rounds, "rollout.questions_per_step": 8}
        config, generator = load_config(None, list(overrides.items())), torch.Generator().manual_seed(0)
        return draw_questions(range(20), CurriculumTable(20), generator, config).tolist()

    assert len(draw(0)) == 8
    assert draw(1)[:8] == draw(5)[:8] == draw(0)
    assert len(draw(1)) == 16
    assert sorted(draw(5)) == list(range(20))


def test_the_first_round_equals_the_step_of_a_run_without_resampling(resampled, tmp_path):
    plain = train(quick(tmp_path, **{**PAIRS, "run__steps": 2, "rollout__max_resamples": 0}))
    alone, more = ([row for row in rows_of(run, "completions") if row["step"] == 1] for run in (plain, resampled))
    assert len(more) > len(alone) == 4 * 2
    assert more[: len(alone)] == alone


def test_a_resumed_run_draws_and_drops_the_same(resampled, tmp_path, monkeypatch):
    config = quick(tmp_path, **PAIRS)
    train_until_it_dies(config, 5, monkeypatch)
    resumed = train(config, resume=True)
    for name in ("metrics", "completions", "curriculum"):
        assert untimed(rows_of(resumed, name)) == untimed(rows_of(resampled, name))
    left, right = weights_of(resampled), weights_of(resumed)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_resampling_is_refused_if_a_step_draws_every_question(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    config = quick(tmp_path, rollout__max_resamples=1)
    path.write_text(config.to_yaml())
    with pytest.raises(SystemExit) as stop:
        main([str(path), f"--data.train={config.evaluation.sets['few']}"])
    assert stop.value.code == 2
    assert "finds no further questions" in capsys.readouterr().err
