"""A run that was killed and taken up again is the run that never died."""

import pytest

from tests.ranks.running import argv, facts, life, lived

pytestmark = pytest.mark.slow


def test_a_run_killed_in_mid_step_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    plan, stages = [], (0, 1, 2, 3)
    for stage in stages:
        command = argv(tmp_path, f"whole-{stage}", policy__zero_stage=stage)
        plan.append(life(f"whole-{stage}", command))
        command = argv(tmp_path, f"killed-{stage}", policy__zero_stage=stage)
        plan.append(life(f"killed-{stage}", command, fault={"phase": "gradient", "do": "kill", "nth": 4}))
        plan.append(life(f"resumed-{stage}", [*command, "--resume"]))
    codes = lived(tmp_path, plan)
    for stage in stages:
        assert codes[f"killed-{stage}"] == [-9, -9]
        assert codes[f"whole-{stage}"] == codes[f"resumed-{stage}"] == [0, 0]
        whole, resumed = facts(tmp_path / f"whole-{stage}"), facts(tmp_path / f"killed-{stage}")
        assert [row["step"] for row in whole["evaluations"]] == [0, 2, 4, 6]
        for name, values in whole.items():
            assert resumed[name] == values, f"{name} at ZeRO {stage}"
