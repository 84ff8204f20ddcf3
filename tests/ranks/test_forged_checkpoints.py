"""A forged file of one rank is refused on all of them, and none waits for another."""

import pytest
import torch

from tests.ranks.running import argv, launch, log_of, run_launches
from tests.trainer.run.short_runs import rewrite_manifest
from tests.trainer.run.test_forged_folders import Payload

pytestmark = pytest.mark.slow


def test_a_forged_file_of_one_rank_ends_all_ranks_with_one_line(tmp_path):
    quick = {"run__checkpoint_every": 1, "run__steps": 2, "policy__zero_stage": 2, "evaluation__every": 0}
    codes = run_launches(tmp_path, [launch("run", argv(tmp_path, "run", **quick))])
    assert codes == {"run": [0, 0]}
    checkpoint, marker = tmp_path / "run/checkpoints/step-000002", tmp_path / "the command ran"
    name = "policy/policy/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Payload(marker)}, checkpoint / name)
    rewrite_manifest(checkpoint)
    plan = [
        launch("resumed", argv(tmp_path, "run", resume=True, **quick)),
        launch("on one rank", argv(tmp_path, "run", resume=True, **quick), ranks=1),
    ]
    assert run_launches(tmp_path, plan) == {"resumed": [1, 1], "on one rank": [1]}
    for entry in plan:
        (line,) = [line for line in log_of(tmp_path, entry["name"]).splitlines() if "error" in line]
        assert f"step-000002 is refused: {name} names the code posix.mkdir" in line
    assert "Traceback" not in log_of(tmp_path, "resumed") + log_of(tmp_path, "resumed", rank=1)
    assert not marker.exists()
