"""Runs `expo.train` several times, each time in a process forked from this one, which has imported everything.

`torchrun ... tests/ranks/launcher.py FOLDER`, or plain python for one rank, reads FOLDER/plan.json: a list of launches,
each with its name, the command line of `expo.train`, its number of ranks, and faults to inject. The output of a launch
goes to FOLDER/<name>-<rank>.log, its exit code, negative for a signal, to FOLDER/<name>-<rank>.code. If the only launch
of a plan is marked `in_process`, nothing is forked or redirected: torchrun runs it directly.
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

import deepspeed  # noqa: F401  # imported once, for every launch
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
from expo.rollout.transformers import TransformersEngine
from expo.runtime.endings import run_and_exit

TIMEOUT_S = 300


def inject(fault):
    """Injects the fault into this process."""
    if "mark" in fault:
        Path(fault["mark"]).touch()
    match fault["do"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "int":
            os.kill(os.getpid(), signal.SIGINT)
        case "usr1":
            os.kill(os.getpid(), signal.SIGUSR1)
        case "exit":
            os._exit(3)
        case "raise":
            raise RuntimeError("injected")
        case "bad gold":
            raise GoldError("gold answer 'x-' cannot be parsed")
        case "sleep":
            time.sleep(10_000)
        case "move":
            os.chdir(fault["path"])
        case "spin":
            re.match(r"(a+)+$", "a" * 64 + "b")  # never releases the GIL
        case "mark":
            Path(fault["path"]).touch()
            time.sleep(fault.get("wait", 0))


def install_fault(fault, rank):
    """Injects `fault` into this rank when it enters the phase for the nth time; of a list, every one."""
    if isinstance(fault, list):
        for one in fault:
            install_fault(one, rank)
        return
    if fault is None or rank not in fault.get("on_ranks", [rank]):
        return
    left = fault.get("nth", 1)

    def entered():
        nonlocal left
        left -= 1
        if left == 0:
            inject(fault)

    def before(owner, name):
        real = getattr(owner, name)

        def wrapper(*args, **kwargs):
            entered()
            return real(*args, **kwargs)

        setattr(owner, name, wrapper)

    match fault["phase"]:
        case "join":
            before(expo.run.setup, "join_ranks")
        case "connect":  # once every rank has announced itself
            before(torch.distributed, "init_process_group")
        case "sampling":
            before(TransformersEngine, "generate")
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
        case "grading":  # while the verifier's processes grade
            real_grade = expo.train.grade

            def grade(*args):
                if left == fault.get("nth", 1):
                    before(WorkerPool, "_collect")
                return real_grade(*args)

            expo.train.grade = grade
        case "gradient":  # after the backward pass, before the optimizer step
            before(DeepSpeedPolicy, "_step")
        case "full disk":
            install_full_disk(fault)
        case "convert":  # child processes inherit the limit
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


def install_full_disk(fault):
    """While the nth checkpoint is written, no file can exceed `bytes`; 0: every fsync fails."""
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


def corrupt(path, damage):
    """Damages a checkpoint as a disk may do."""
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    match damage:
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


def run_launch(launch, rank):
    """Runs a launch in this process; returns its exit code."""
    if launch["ranks"] == 1:
        for name in [name for name in os.environ if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
            del os.environ[name]
    install_fault(launch["fault"], rank)
    expo.run.lifecycle.write_report = lambda _: "left out here"  # drawing takes seconds, and no rank waits for it
    return expo.train.main([*launch["argv"], *launch.get("further", {}).get(str(rank), [])])


def fork_launch(folder, launch, rank):
    """Runs a launch in a forked process; returns its exit code."""
    # each launch has its own store: that of torchrun still holds the addresses of earlier launches
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ["MASTER_PORT"] = (folder / f"{launch['name']}.port").read_text()
    process = os.fork()
    if process == 0:
        log = os.open(folder / f"{launch['name']}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run_and_exit(lambda: run_launch(launch, rank))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder):
    plan = json.loads((folder / "plan.json").read_text())
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if plan[0].get("in_process"):
        run_and_exit(lambda: run_launch(plan[0], rank))
    warm_up()
    for launch in plan:
        if rank == 0:
            for source, target in launch["copies"]:
                shutil.copytree(source, target)
            for path, damage in launch["corruptions"]:
                corrupt(Path(path), damage)
            with socket.create_server(("127.0.0.1", 0)) as server:
                write_whole(folder / f"{launch['name']}.port", str(server.getsockname()[1]))
        wait_for([folder / f"{launch['name']}.port"])
        if rank < launch["ranks"]:
            code = fork_launch(folder, launch, rank)
            write_whole(folder / f"{launch['name']}-{rank}.code", str(code))
        wait_for([folder / f"{launch['name']}-{r}.code" for r in range(min(size, launch["ranks"]))])


def warm_up():
    """Loads a model once in this process: every launch inherits what that compiles and imports."""
    load_model(ModelSection(path="ledger"), torch.device("cpu"))
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(timeout=30)  # loading leaves threads that are about to end
    assert threading.active_count() == 1, "a fork would lose the other threads"


def write_whole(path, text):
    temporary = path.with_suffix(f"{path.suffix}.part")
    temporary.write_text(text)
    temporary.rename(path)


def wait_for(paths):
    expiry = time.monotonic() + TIMEOUT_S
    while not all(path.exists() for path in paths):
        if time.monotonic() > expiry:
            raise TimeoutError(f"not all of {paths} exist")
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
