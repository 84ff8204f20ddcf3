"""A run that was killed and resumed equals the run that was never killed."""

import pytest

from tests.ranks.kill_ranks import run_killed
from tests.ranks.running import argv, launch, log_of, outcome_of, run_launches

pytestmark = pytest.mark.slow


def test_a_run_killed_within_a_step_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    plan, stages = [], (0, 1, 2, 3)
    for stage in stages:
        # with resampled groups, a reward function that runs on rank 0 only, and replies that are cached or not
        options = {
            "policy__zero_stage": stage,
            "rollout__max_resamples": stage,
            "rollout__keep_replies": stage < 2,
            "reward__functions": "{expo.formats:boxed: 0.5}",
        }
        plan.append(launch(f"whole-{stage}", argv(tmp_path, f"whole-{stage}", **options)))
        command = argv(tmp_path, f"killed-{stage}", **options)
        plan.append(launch(f"killed-{stage}", command, fault={"phase": "gradient", "do": "kill", "nth": 4}))
        plan.append(launch(f"resumed-{stage}", [*command, "--resume"]))
    codes = run_launches(tmp_path, plan)
    for stage in stages:
        assert codes[f"killed-{stage}"] == [-9, -9]
        assert ("step 4: replies taken from" in log_of(tmp_path, f"resumed-{stage}")) == (stage < 2)
        assert codes[f"whole-{stage}"] == codes[f"resumed-{stage}"] == [0, 0]
        whole, resumed = outcome_of(tmp_path / f"whole-{stage}"), outcome_of(tmp_path / f"killed-{stage}")
        assert [row["step"] for row in whole["evaluations"]] == [0, 2, 4, 6]
        assert (max(row["groups_dropped"] for row in whole["metrics"]) > 0) == (stage > 0)
        for name, values in whole.items():
            assert resumed[name] == values, f"{name} at ZeRO {stage}"


def test_a_lora_run_killed_before_its_first_checkpoint_ends_with_the_same_bits(tmp_path):
    quick = {"run__checkpoint_every": 0, "run__steps": 3, "evaluation__every": 0, "policy__lora_rank": 4}
    command = argv(tmp_path, "killed", **quick)
    plan = [
        launch("whole", argv(tmp_path, "whole", **quick), ranks=1),
        launch("killed", command, ranks=1, fault={"phase": "update", "do": "kill", "nth": 2}),
        launch("resumed", [*command, "--resume"], ranks=1),
    ]
    assert run_launches(tmp_path, plan, ranks=1) == {"whole": [0], "killed": [-9], "resumed": [0]}
    assert outcome_of(tmp_path / "killed") == outcome_of(tmp_path / "whole")


def test_a_run_whose_ranks_are_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    assert len(run_killed(tmp_path, 2)) == 2  # `python -m tests.ranks.kill_ranks` kills more
