"""Kills a run with a vLLM server at random moments: `python -m tests.vllm.kill_runs FOLDER NUMBER [AHEAD [RANKS]]`.

All processes of the trainer are killed, and the next launch resumes the run. It prints the kills, and ends with an
error if the bits of the run differ from those of one that was never killed, or if a server outlives its run.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.ranks.running import outcome_of, processes_naming, rows_of

LONGEST_WAIT = 300.0  # seconds until a killed run has reached its step, or its server has ended
STEPS_PER_KILL = 3


def command(run, num_steps, ahead=0, ranks=1):
    """A run with a server, checkpoints and evaluations between the kills."""
    questions = run.parent / "few.jsonl"
    questions.write_text("".join(json.dumps({"question": f"{n}+8+2-9+5-6+1=", "answer": n + 1}) + "\n" for n in (1, 8)))
    settings = {
        "rollout.engine": "vllm-server", "run.dir": run, "run.steps": num_steps, "optimizer.warmup_steps": 1,
        "rollout.questions_per_step": 4, "rollout.group_size": 4, "rollout.batch_size": 4,
        "evaluation.sets": f"{{few: {questions}}}", "evaluation.num_samples": 2, "evaluation.every": 2,
        "run.checkpoint_every": 2, "rollout.ahead": ahead, "objective.rollout_correction": "token",
    }  # fmt: skip
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", *launcher, "expo.train", *arguments]


def wait_for(condition, what):
    end = time.monotonic() + LONGEST_WAIT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"after {LONGEST_WAIT:.0f} s: {what}")
        time.sleep(0.01)


def num_steps_of(run):
    return len(rows_of(run, "metrics")) if (run / "metrics.jsonl").exists() else 0


def kill_trainer(run):
    """Kills the launcher and the ranks at once; a server notices by itself."""
    for process, words in processes_naming(str(run)).items():
        if "expo.train" in words:
            os.kill(process, signal.SIGKILL)


def run_killed(folder, number, ahead=0, ranks=1, seed=0):
    """One line for each kill; `folder` is new."""
    folder.mkdir(parents=True)
    draws = random.Random(seed)
    num_steps = STEPS_PER_KILL * number + 2
    whole, killed = folder / "whole", folder / "killed"
    subprocess.run(command(whole, num_steps, ahead, ranks), check=True, stdout=subprocess.DEVNULL)
    resumed = command(killed, num_steps, ahead, ranks)
    lines = []
    for kill in range(number):
        process = subprocess.Popen([*resumed, *(["--resume"] if kill else [])], stdout=subprocess.DEVNULL)
        step = num_steps_of(killed) + draws.randint(0, STEPS_PER_KILL)
        wait_for(
            lambda process=process, step=step: process.poll() is not None or num_steps_of(killed) >= step,
            f"step {step} is not reached",
        )
        time.sleep(draws.uniform(0, 20 if step == 0 else 2))  # the start takes longer than a step
        kill_trainer(killed)
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"the run ended with {process.returncode} before kill {kill + 1}")
        lines.append(f"killed after {num_steps_of(killed)} steps")
        wait_for(lambda: not processes_naming(str(killed)), "processes of the killed run still run")
    subprocess.run([*resumed, "--resume"], check=True, stdout=subprocess.DEVNULL)
    if outcome_of(killed) != outcome_of(whole):
        raise RuntimeError("the killed run differs from the whole one")
    return lines


if __name__ == "__main__":
    print(*run_killed(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:])), "equal bits", sep="\n")
