"""`expo.train`, whose server is killed with its process group while it generates the replies of the first step.

SIGKILL is sent once, after the first replies; their number is printed to stderr.
"""

import os
import signal
import sys

from expo.rollout.vllm.server import ServerEngine
from expo.train import main

FIRST_STEP = 1  # call 0 is the evaluation
original_generate = ServerEngine.generate
calls = []


def generate(engine, requests, sampling, on_progress=None):
    calls.append(requests)
    num_done, is_killed = 0, len(calls) - 1 != FIRST_STEP

    def kill_once(count):
        nonlocal num_done, is_killed
        num_done += count
        if num_done and not is_killed:
            is_killed = True
            (supervisor,) = engine._supervisors
            os.killpg(supervisor._process._process.pid, signal.SIGKILL)
            print(f"killed after {num_done}", file=sys.stderr)
        if on_progress is not None:
            on_progress(count)

    return original_generate(engine, requests, sampling, kill_once)


if __name__ == "__main__":
    ServerEngine.generate = generate
    sys.exit(main())
