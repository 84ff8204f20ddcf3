"""Launches runs under torchrun, and reads what they write."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests import ROOT

# the end of a script on several ranks: a Gloo thread may abort an interpreter that is finalized (pytorch issue 190489)
END_OF_RANK = "\n\nimport os\n\nos._exit(0)\n"
LAUNCHER = ROOT / "tests" / "ranks" / "launcher.py"
QUICK = {
    "run.steps": 6,
    "run.checkpoint_every": 3,
    "rollout.questions_per_step": 4,
    "rollout.group_size": 4,
    "optimizer.warmup_steps": 1,
    "evaluation.num_samples": 2,
    "evaluation.every": 2,
    **{f"deadline.{phase}": 120 for phase in ("start", "rollout", "reward", "reference")},
    **{f"deadline.{phase}": 120 for phase in ("update", "sync", "evaluation", "save")},
}
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # tests that ran earlier in this process may have set these
# metrics that differ between two runs of equal numbers: times and memory
TIMED = ("seconds", "tokens_per_second", "memory", "flops", "mfu")


def environment_of_no_rank():
    """The environment of this process without the variables that give it a rank."""
    return {name: value for name, value in os.environ.items() if name not in RANK}


def environment(folder):
    """The environment of a run in `folder`; the folder's name marks all its processes, the verifier's too."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = environment_of_no_rank()
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "EXPO_TEST_FOLDER": str(folder)}


def write_questions(path, answers):
    """Writes a file of sums with the given answers."""
    rows = [{"question": f"{index}+4=", "answer": answer, "level": "sums"} for index, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def argv(folder, name, resume=False, by_workers=False, **overrides):
    """The command line of the run in folder/name; with `by_workers`, the verifier's processes grade every answer."""
    evaluation = write_questions(folder / "few.jsonl", [4, 5, 6, 7])
    values = {**QUICK, "run.dir": folder / name, "evaluation.sets": f"{{few: {evaluation}}}"}
    if by_workers:
        # a number never equals these functions, but only algebra can say so
        values["data.train"] = write_questions(folder / "functions.jsonl", [rf"\sin x+{n}" for n in range(4, 10)])
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    return [f"--{key}={value}" for key, value in values.items()] + (["--resume"] if resume else [])


def launch(name, command, ranks=2, fault=None, copies=(), corruptions=(), in_process=False, further=None):
    """One entry of a plan; before it starts, `copies` of folders are made and `corruptions` applied to checkpoints.

    further: command line arguments of single ranks, by rank.
    """
    return {
        "name": name,
        "argv": command,
        "ranks": ranks,
        "fault": fault,
        "copies": [[str(source), str(target)] for source, target in copies],
        "corruptions": [[str(path), damage] for path, damage in corruptions],
        "in_process": in_process,
        "further": {str(rank): arguments for rank, arguments in (further or {}).items()},
    }


def start(folder, plan, ranks=2, program=LAUNCHER, **options):
    """Starts torchrun, or the process of the only rank, to run the plan in `folder`."""
    (folder / "plan.json").write_text(json.dumps(plan))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    agents = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()] or ["--standalone"]
    command = (
        [*torchrun, *agents, str(program), str(folder)] if ranks > 1 or options else [sys.executable, program, folder]
    )
    return start_process(folder, command)


def start_process(folder, command, **place):
    """Starts a process; `place`: further environment variables, such as its rank."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**environment(folder), **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_launches(folder, plan, ranks=2, program=LAUNCHER, timeout=600):
    """Runs all launches of the plan; the exit codes of each by its name, one for each rank."""
    process = start(folder, plan, ranks, program)
    _, problems = process.communicate(timeout=timeout)
    assert process.returncode == 0, problems
    return {
        entry["name"]: [int((folder / f"{entry['name']}-{rank}.code").read_text()) for rank in range(entry["ranks"])]
        for entry in plan
    }


def log_of(folder, name, rank=0):
    """The output of one rank of a launch."""
    return (folder / f"{name}-{rank}.log").read_text()


def rows_of(run, name):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def outcome_of(run):
    """Weights and records of a run, equal for two runs with equal bits."""
    (weights,) = (run / "export").glob("*.safetensors")
    names = ("metrics", "completions", "curriculum", "evaluations")
    return {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        **{name: [untimed(row) for row in rows_of(run, name)] for name in names},
    }


def untimed(row):
    return {key: value for key, value in row.items() if not any(word in key for word in TIMED)}


def processes_naming(text):
    """Ids and command lines of the processes with `text` in their environment or command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if text.encode() in words and state != "Z":
            found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def kill_all(text):
    """Kills the processes with `text` in their environment or command line, until there is none."""
    while found := processes_naming(text):
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def wait_for_mark(mark, process):
    """Returns once the fault has been injected; fails if the process ends before."""
    while not mark.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
