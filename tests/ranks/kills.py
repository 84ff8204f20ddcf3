"""A run that is killed again and again while it saves: `kills.py FOLDER NUMBER ARGUMENTS`.

Each life is forked from this process, which has imported everything. The first one tells how long a save takes, and
dies like the others; each later one resumes what the one before has left. What lies in the checkpoints' folder after
each kill goes to FOLDER/left.json; the last life is let live.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.ranks.lives import expo, live, warm_up

LEARNING_SAVES = 3


def tell_of_saves(pipe):
    """A byte down the pipe when a save begins, another when it ends."""
    real = expo.train.save_checkpoint

    def save(*args, **kwargs):
        os.write(pipe, b"(")
        real(*args, **kwargs)
        os.write(pipe, b")")

    expo.train.save_checkpoint = save


def born(arguments):
    """Process id of a new life, and the pipe on which it tells of its saves."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        tell_of_saves(write)
        sys.exit(live({"argv": arguments, "ranks": 1, "fault": None}, 0))
    os.close(write)
    return process, read


def killed(process):
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder, number, arguments):
    warm_up()
    process, pipe = born(arguments)
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
        process, pipe = born([*arguments, "--resume"])
        assert os.read(pipe, 1) == b"(", "the life after a kill did not come to its first save"
        delay = duration * (kill + generator.random()) / number
        time.sleep(delay)
        assert killed(process) == -signal.SIGKILL
        os.close(pipe)
        names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
        left.append({"delay": delay, "names": names})
        (folder / "left.json").write_text(json.dumps(left, indent=1))
    process, _ = born([*arguments, "--resume"])
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
