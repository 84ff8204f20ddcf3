"""Runs a script on two ranks that talk over gloo."""

import subprocess
import sys

from tests import ROOT
from tests.ranks.running import END_OF_RANK, environment


def run_on_two_ranks(folder, script):
    """Runs the text of a script in `folder`; a failed assertion on either rank fails the test."""
    (folder / "script.py").write_text(script + END_OF_RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(folder / "script.py")],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
