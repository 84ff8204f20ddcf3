"""Starts lives of runs under torchrun, and reads what they leave."""

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

LIVES = ROOT / "tests" / "ranks" / "lives.py"
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
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # libraries tested before in a process may have left these behind
# what differs between two runs of the same numbers: clocks and memory
TIMED = ("seconds", "tokens_per_second", "memory", "flops", "mfu")


def environment_of_no_rank():
    """Ours, for a process that is a rank of nothing."""
    return {name: value for name, value in os.environ.items() if name not in RANK}


def environment(folder):
    """What a run in `folder` starts with; its name marks every process that comes of it, the verifier's too."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = environment_of_no_rank()
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "EXPO_TEST_FOLDER": str(folder)}


def write_questions(path, answers):
    """Sums with the answers given, as a file of questions."""
    rows = [{"question": f"{index}+4=", "answer": answer, "level": "sums"} for index, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def argv(folder, name, resume=False, fractions=False, **overrides):
    """The command line of the run in folder/name; with `fractions`, every answer takes the verifier's processes."""
    evaluation = write_questions(folder / "few.jsonl", [4, 5, 6, 7])
    values = {**QUICK, "run.dir": folder / name, "evaluation.sets": f"{{few: {evaluation}}}"}
    if fractions:
        values["data.train"] = write_questions(
            folder / "fractions.jsonl", [f"\\frac{{{n}}}{{7}}" for n in range(28, 64, 7)]
        )
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    return [f"--{key}={value}" for key, value in values.items()] + (["--resume"] if resume else [])


def life(name, command, ranks=2, fault=None, copies=(), spoils=(), here=False):
    """One entry of a plan; `copies` of folders are made and checkpoints spoiled before it begins."""
    return {
        "name": name,
        "argv": command,
        "ranks": ranks,
        "fault": fault,
        "copies": [[str(source), str(target)] for source, target in copies],
        "spoils": [[str(path), way] for path, way in spoils],
        "here": here,
    }


def start(folder, plan, ranks=2, **options):
    """The process of torchrun, or of the only rank, that lives the plan in `folder`."""
    (folder / "plan.json").write_text(json.dumps(plan))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    agents = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()] or ["--standalone"]
    command = [*torchrun, *agents, str(LIVES), str(folder)] if ranks > 1 or options else [sys.executable, LIVES, folder]
    return begun(folder, command)


def begun(folder, command, **place):
    """A process that is given its place among the ranks, if it has one."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**environment(folder), **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lived(folder, plan, ranks=2):
    """Exit codes of every life, by name: one for each rank."""
    process = start(folder, plan, ranks)
    _, problems = process.communicate(timeout=600)
    assert process.returncode == 0, problems
    return {
        life["name"]: [int((folder / f"{life['name']}-{rank}.code").read_text()) for rank in range(life["ranks"])]
        for life in plan
    }


def said(folder, name, rank=0):
    """What a rank said in a life."""
    return (folder / f"{name}-{rank}.log").read_text()


def rows_of(run, name):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def facts(run):
    """All that two runs of equal bits have in common."""
    (weights,) = (run / "export").glob("*.safetensors")
    names = ("metrics", "completions", "curriculum", "evaluations")
    return {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        **{name: [untimed(row) for row in rows_of(run, name)] for name in names},
    }


def untimed(row):
    return {key: value for key, value in row.items() if not any(word in key for word in TIMED)}


def processes_naming(text):
    """Ids and command lines of the processes that carry `text` in their environment or command line."""
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
    """Kills every process that carries `text`, until there is none."""
    while found := processes_naming(text):
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
