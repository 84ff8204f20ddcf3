"""Reading run folders: incomplete ones, repeated steps, and the replies chosen for the report."""

import json
from pathlib import Path

import pytest

from expo.reporting.reader import TrainingHistory, read_run
from tests.trainer.reporting.run_folders import completion, fake_run, write_lines


def test_replies_come_from_first_middle_and_last_recorded_step(finished: Path) -> None:
    replies = read_run(finished).replies
    assert list(replies) == [1, 31, 51]
    for shown in replies.values():
        assert len({reply["question_id"] for reply in shown}) == 4
        assert {reply["verdict"] for reply in shown} == {"correct", "wrong"}


@pytest.mark.parametrize(("num_correct", "num_incorrect"), [(9, 0), (0, 9), (9, 1), (1, 9), (1, 1)])
def test_replies_of_one_verdict_fill_up_for_missing_ones_of_the_other(
    num_correct: int, num_incorrect: int, tmp_path: Path
) -> None:
    run = fake_run(tmp_path / "run", num_steps=1)
    rewards = [True] * num_correct + [False] * num_incorrect
    write_lines(run / "completions.jsonl", [completion(1, q, is_correct=r) for q, r in enumerate(rewards)])
    (shown,) = read_run(run).replies.values()
    assert len(shown) == min(4, num_correct + num_incorrect)
    assert {reply["reward"] > 0 for reply in shown} == set(rewards)


def test_the_last_record_of_a_repeated_step_wins(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", num_steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "accuracy": 0.25}) + "\n")
    metrics = read_run(run).history.metrics
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5]
    assert metrics[3]["accuracy"] == 0.25


def test_a_setting_of_a_missing_section_is_none() -> None:
    assert TrainingHistory(config={"kl": None}).setting("kl", "beta") is None
    assert TrainingHistory().setting("kl", "beta") is None
