"""ExpoGRPOTrainer on two processes, replicated and sharded by ZeRO 3 and by FSDP2, gives TRL's numbers."""

import os
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.integrations.trl_runs import Run, assert_same


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ddp", "3", "fsdp2"])
def test_two_ranks_give_trls_numbers_and_draw_alike(tiny_model, tmp_path, stage):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(ROOT / "tests" / "integrations" / "two_ranks.py"), str(tiny_model), str(tmp_path), stage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    for kind in ("", " with LoRA")[: 2 if stage == "fsdp2" else 1]:
        ours, theirs = (Run(first[name + kind]["history"], first[name + kind]["state"]) for name in ("plain", "trl"))
        assert theirs.parameters
        assert_same(ours, theirs)
    assert torch.equal(first["table"]["pass_rates"], second["table"]["pass_rates"])
    assert first["table"]["visits"].sum() == second["table"]["visits"].sum() == 3 * 4  # generations, questions of each
    assert first["beta"] == second["beta"]
    assert 0.01 < first["beta"] < 0.02
