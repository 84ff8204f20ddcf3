"""Run processes with the code of one tree: this one, or a checkout of another commit."""

import subprocess
import sys
from pathlib import Path

from tests.golden.digests import PARTS, Record, read
from tests.ranks.running import environment_of_no_rank

ROOT = Path(__file__).parent.parent.parent


def environment(tree: Path, **more: str) -> dict[str, str]:
    """Environment of a process that imports the packages of `tree`, without the variables of other runs."""
    kept = {
        name: value
        for name, value in environment_of_no_rank().items()
        if not name.startswith(("EXPO_", "TRITON_", "PYTEST_"))
    }
    return {**kept, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def record_of(part: str, tree: Path, folder: Path) -> Record:
    """The record of one part by the code of `tree`, which must contain this tree's tests; its file is in `folder`.

    Raises:
        RuntimeError: the process failed; the message ends with its output.
    """
    assert part in PARTS
    out = folder / f"{part}.json"
    module = ["tests.golden.runs"] if part == "runs" else ["tests.golden.losses", part]
    more = {}
    if part == "kernels":
        # skipped rows hold numbers that are computed but never used
        more = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore:::triton.runtime.interpreter"}
    command = [sys.executable, "-m", *module, str(out)]
    done = subprocess.run(
        command, cwd=tree, env=environment(tree, **more), capture_output=True, text=True, check=False, timeout=1800
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} in {tree} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return read(out)
