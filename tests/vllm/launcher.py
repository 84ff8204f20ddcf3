"""`tests/ranks/launcher.py` in processes that have also imported vLLM, which takes longer than a run of three steps."""

import os
import sys
from pathlib import Path

from expo.rollout.vllm import in_process
from tests.ranks import launcher


def import_vllm():
    """Imports it for runs with an engine in process; servers that runs start inherit no setting of theirs."""
    before = dict(os.environ)
    in_process._vllm()
    for name in [name for name in os.environ if name.startswith("VLLM_") and name not in before]:
        del os.environ[name]


if __name__ == "__main__":
    import_vllm()
    launcher.main(Path(sys.argv[1]))
