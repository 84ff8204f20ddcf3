"""Lives of runs, one after the other, each a process forked from one that has imported everything already.

`torchrun ... tests/ranks/lives.py FOLDER`, or plain python for one rank, reads FOLDER/plan.json: a list of lives, each
with its name, the command line of `expo.train`, the number of ranks that live it, and a fault to strike it with. What a
life says goes to FOLDER/<name>-<rank>.log and its exit code, negative for a signal, to FOLDER/<name>-<rank>.code.
With the plan's only life marked `here`, nothing is forked and nothing redirected: torchrun has the run itself.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import deepspeed  # noqa: F401  # imported once, for every life
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import expo.run.checkpoint
import expo.run.lifecycle
import expo.run.setup
import expo.train
from expo.config import ModelSection
from expo.errors import GoldError
from expo.learner.model import load_model
from expo.learner.policy import DeepSpeedPolicy
from expo.rewards.pool import WorkerPool
from expo.rollout.data_parallel import DataParallelEngine

PATIENCE_S = 300


def strike(fault):
    """What befalls this process."""
    if "mark" in fault:
        Path(fault["mark"]).touch()
    match fault["do"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "usr1":
            os.kill(os.getpid(), signal.SIGUSR1)
        case "exit":
            os._exit(3)
        case "raise":
            raise RuntimeError("struck")
        case "bad gold":
            raise GoldError("gold answer 'x-' cannot be parsed")
        case "sleep":
            time.sleep(10_000)
        case "move":
            os.chdir(fault["path"])
        case "spin":
            re.match(r"(a+)+$", "a" * 64 + "b")  # never lets go of the interpreter
        case "mark":
            Path(fault["path"]).touch()
            time.sleep(fault.get("wait", 0))


def arrange(fault, rank):
    """Has `fault` strike this rank when it enters the phase for the nth time."""
    if fault is None or rank not in fault.get("on_ranks", [rank]):
        return
    left = fault.get("nth", 1)

    def entered():
        nonlocal left
        left -= 1
        if left == 0:
            strike(fault)

    def before(owner, name):
        real = getattr(owner, name)

        def struck(*args, **kwargs):
            entered()
            return real(*args, **kwargs)

        setattr(owner, name, struck)

    match fault["phase"]:
        case "join":
            before(expo.run.setup, "join_ranks")
        case "start":
            before(expo.run.setup, "_build_run")
        case "weights":
            before(DataParallelEngine, "load_weights")
        case "checkpoint":
            before(expo.run.checkpoint.Checkpoints, "save")
        case "export":
            before(expo.run.lifecycle, "export")
        case "record":
            before(expo.run.setup.RunBookkeeping, "record_step")
        case "grading":  # answers are with the verifier's processes
            real_grade = expo.train.grade

            def grade(*args):
                if left == fault.get("nth", 1):
                    before(WorkerPool, "_collect")
                return real_grade(*args)

            expo.train.grade = grade
        case "gradient":  # gradients are there, weights have not moved
            before(DeepSpeedPolicy, "_step")
        case "full disk":
            arrange_full_disk(fault)
        case "convert":  # what children write is cut there too
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
        case name:
            real = expo.run.setup.Run.guard

            @contextmanager
            def guard(run, phase):
                with real(run, phase):
                    if phase == name:
                        entered()
                    yield

            expo.run.setup.Run.guard = guard


def arrange_full_disk(fault):
    """While the nth checkpoint is written, no file grows beyond `bytes`; 0: the system says so at once."""
    real, count = expo.run.checkpoint.Checkpoints.save, 0

    def save(*args, **kwargs):
        nonlocal count
        count += 1
        if count != fault["nth"]:
            return real(*args, **kwargs)
        if fault["bytes"]:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], limits[1]))
            try:
                return real(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        before = os.fsync

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
        try:
            return real(*args, **kwargs)
        finally:
            os.fsync = before

    expo.run.checkpoint.Checkpoints.save = save


def spoil(path, way):
    """Does one thing to a checkpoint that a disk may do."""
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    match way:
        case "truncated":
            os.truncate(largest, largest.stat().st_size // 2)
        case "flipped":
            content = bytearray(largest.read_bytes())
            content[len(content) // 2] ^= 1
            largest.write_bytes(content)
        case "missing":
            largest.unlink()
        case "gone":
            shutil.rmtree(path)
        case "manifest cut":
            os.truncate(path / "manifest.json", 100)
        case "manifest changed":
            content = (path / "manifest.json").read_text().replace('"step": ', '"step": 1')
            (path / "manifest.json").write_text(content)
        case "manifest emptied":
            (path / "manifest.json").write_text("[]")


def live(life, rank):
    """One life; returns its exit code."""
    if life["ranks"] == 1:
        for name in [name for name in os.environ if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
            del os.environ[name]
    arrange(life["fault"], rank)
    expo.run.lifecycle.write_report = lambda _: "left out here"  # seconds of drawing, which no rank waits for
    return expo.train.main(life["argv"])


def forked(folder, life, rank):
    """The exit code of one life, lived in a process of its own."""
    # its rank 0 keeps a store of its own: in torchrun's, addresses of an earlier life would be taken for this one's
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ["MASTER_PORT"] = (folder / f"{life['name']}.begins").read_text()
    process = os.fork()
    if process == 0:
        log = os.open(folder / f"{life['name']}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.exit(live(life, rank))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder):
    plan = json.loads((folder / "plan.json").read_text())
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if plan[0].get("here"):
        sys.exit(live(plan[0], rank))
    warm_up()
    for life in plan:
        if rank == 0:
            for source, target in life["copies"]:
                shutil.copytree(source, target)
            for path, way in life["spoils"]:
                spoil(Path(path), way)
            with socket.create_server(("127.0.0.1", 0)) as server:
                write_whole(folder / f"{life['name']}.begins", str(server.getsockname()[1]))
        wait_for([folder / f"{life['name']}.begins"])
        if rank < life["ranks"]:
            code = forked(folder, life, rank)
            write_whole(folder / f"{life['name']}-{rank}.code", str(code))
        wait_for([folder / f"{life['name']}-{r}.code" for r in range(min(size, life["ranks"]))])


def warm_up():
    """Has this process load a model once: what that compiles and imports, every life inherits."""
    load_model(ModelSection(path="ledger"), torch.device("cpu"))
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(timeout=30)  # loading leaves some that are about to end
    assert threading.active_count() == 1, "a fork would lose the other threads"


def write_whole(path, text):
    temporary = path.with_suffix(f"{path.suffix}.part")
    temporary.write_text(text)
    temporary.rename(path)


def wait_for(paths):
    expiry = time.monotonic() + PATIENCE_S
    while not all(path.exists() for path in paths):
        if time.monotonic() > expiry:
            raise TimeoutError(f"none of {paths}")
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
