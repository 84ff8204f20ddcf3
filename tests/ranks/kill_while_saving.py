"""Kills a run repeatedly while it saves: `kill_while_saving.py FOLDER NUMBER ARGUMENTS`.

Each process of the run is forked from this one, which has imported everything. The first measures the duration of a
save; each later one resumes the run. The names in the checkpoints' folder after each kill are written to
FOLDER/left.json; the last process is not killed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.ranks.launcher import expo, run_launch, warm_up

LEARNING_SAVES = 3


def report_saves(pipe):
    """Writes a byte to the pipe when a save begins, and another when it ends."""
    real = expo.train.save_checkpoint

    def save(*args, **kwargs):
        os.write(pipe, b"(")
        real(*args, **kwargs)
        os.write(pipe, b")")

    expo.train.save_checkpoint = save


def fork_run(arguments):
    """Forks a run; its process id, and the pipe to which it reports its saves."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        report_saves(write)
        sys.exit(run_launch({"argv": arguments, "ranks": 1, "fault": None}, 0))
    os.close(write)
    return process, read


def killed(process):
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder, number, arguments):
    warm_up()
    process, pipe = fork_run(arguments)
    durations = []
    for _ in range(LEARNING_SAVES):
        assert os.read(pipe, 1) == b"("
        started = time.monotonic()
        assert os.read(pipe, 1) == b")"
        durations.append(time.monotonic() - started)
    killed(process)
    duration, left = sorted(durations)[LEARNING_SAVES // 2], []
    generator = random.Random(0)
    for kill in range(number):
        process, pipe = fork_run([*arguments, "--resume"])
        assert os.read(pipe, 1) == b"(", "the run did not reach its first save after a kill"
        delay = duration * (kill + generator.random()) / number
        time.sleep(delay)
        assert killed(process) == -signal.SIGKILL
        os.close(pipe)
        names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
        left.append({"delay": delay, "names": names})
        (folder / "left.json").write_text(json.dumps(left, indent=1))
    process, _ = fork_run([*arguments, "--resume"])
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
