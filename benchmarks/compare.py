"""Compares the speed of two commits: `python -m benchmarks.compare BASE [--head HEAD]`, `make bench-compare BASE=...`.

Each commit is checked out into its own folder and runs in its own process with this tree's benchmarks. The two
alternate within rounds, so that other load on the machine affects both; the ratio of a round is HEAD's time / BASE's.
The output is the median and quartiles of the ratios and which jobs became slower or faster, by a two-sided sign test
with Holm's correction over all jobs, so that the probability of any false positive in a comparison is at most 5 %.

Workers run with the `expo` package of any commit, so this module and all that it imports use only the public names of
`expo_kernels`, and of `expo` only `expo.train.train` and `expo.config.RunConfig`.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.contenders import OURS, contender
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.machine import Machine
from benchmarks.shapes import Case, Shape, dtype_for, shapes_for, side_shape
from benchmarks.step_settings import QUESTIONS, step_config
from benchmarks.worktrees import checked_out
from expo_kernels import CurriculumTable, linear_token_logps

ROUNDS = 15
SMALL_TABLE = 10**6  # questions
STEP_JOB, STEPS = "training step", 3  # steps of its training run; the first one is not timed

Job = Callable[[], float]  # runs once and returns its milliseconds


def make_jobs(machine: Machine, *, tiny: bool) -> dict[str, Job]:
    """The timed jobs by name; their inputs are created here."""
    kind = machine.device.type
    dtype, one_shape = dtype_for(kind), side_shape(kind, tiny=tiny)
    jobs: dict[str, Job] = {}

    def add_loss(label: str, case: Case, name: str = OURS) -> Inputs:
        inputs = make_inputs(case, machine.device)
        loss = contender(name).prepare(inputs)

        def run() -> None:
            inputs.clear()
            loss().backward()

        jobs[f"loss: {label}"] = lambda: machine.time(run)
        return inputs

    for shape in _shapes(kind, tiny=tiny):
        add_loss(shape.name, Case(shape, dtype))
    add_loss("frozen head", Case(one_shape, dtype, frozen_head=True))
    add_loss("half active", Case(one_shape, dtype, active_share=0.5))
    add_loss("ratio per sequence", Case(one_shape, dtype, ratio="sequence"))
    inputs = add_loss("on logits", Case(one_shape, dtype), f"{OURS} on logits")
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    jobs["log-probs"] = lambda: machine.time(lambda: linear_token_logps(hidden, weight, inputs.ids))
    table = CurriculumTable(SMALL_TABLE, device=machine.device)
    jobs["curriculum draw"] = lambda: machine.time(lambda: table.sample(256))
    jobs[STEP_JOB] = lambda: step_ms(questions=2 if tiny else QUESTIONS)
    return jobs


def step_ms(questions: int) -> float:
    """Median milliseconds of a training step, from the metrics of a short run."""
    from expo.train import train  # here: it imports transformers, which other jobs do not need

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run = train(step_config(Path(folder) / "run", STEPS, questions))
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return 1e3 * median(json.loads(line)["seconds"] for line in lines[1:])


def _shapes(kind: str, *, tiny: bool) -> tuple[Shape, ...]:
    """The shapes of the published table without the largest, to save time."""
    shapes = shapes_for(kind, tiny=tiny)
    largest = max(shapes, key=lambda shape: shape.num_tokens * shape.hidden_size * shape.vocab_size)
    return tuple(shape for shape in shapes if shape != largest) or shapes


def serve(machine: Machine, only: str, *, tiny: bool) -> None:
    """A worker: prints the names of its jobs, then the milliseconds of every job whose name it reads."""
    jobs = {name: job for name, job in make_jobs(machine, tiny=tiny).items() if only in name}
    for name, job in jobs.items():
        if name != STEP_JOB:  # a training run has its own warm-up step
            job()
    print("\t".join(jobs), flush=True)
    for line in sys.stdin:
        print(jobs[line.rstrip("\n")](), flush=True)


class Worker:
    """The code of one commit in its own process."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.compare", "--serve", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.names = self._read().split("\t")

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().rstrip("\n")
        if not line:
            raise SystemExit(f"a worker exited with code {self._process.wait()}; see its error above")
        return line

    def ms(self, name: str) -> float:
        """Milliseconds of one execution of a job."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """Stops the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def ratios(base: Worker, head: Worker, name: str, rounds: int) -> list[float]:
    """HEAD's time / BASE's for each round; the order alternates."""
    values = []
    for index in range(rounds):
        first, second = (base, head) if index % 2 == 0 else (head, base)
        times = {first: first.ms(name), second: second.ms(name)}
        values.append(times[head] / times[base])
    return values


def sign_test(values: Sequence[float]) -> float:
    """The two-sided p value of a sign test of ratios against 1; ratios of exactly 1 are ignored."""
    above, below = sum(value > 1 for value in values), sum(value < 1 for value in values)
    num = above + below
    return min(1.0, 2 * sum(math.comb(num, k) for k in range(min(above, below) + 1)) / 2**num)


def verdicts(ratios_of: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """For each job "slower", "faster" or "" (no significant difference); the family-wise error rate is 5 %."""
    from expo.experiments.ablation.paired import holm  # here: workers of older commits do not have it

    significant = holm([sign_test(values) for values in ratios_of.values()])
    return {
        name: ("slower" if median(values) > 1 else "faster") if is_significant else ""
        for (name, values), is_significant in zip(ratios_of.items(), significant, strict=True)
    }


def min_rounds(num_jobs: int) -> int:
    """The fewest rounds that can show a significant difference if all ratios are on one side of 1."""
    rounds = 1
    while verdicts({str(job): [2.0] * rounds if job == 0 else [1.0] for job in range(num_jobs)})["0"] == "":
        rounds += 1
    return rounds


def summarize(values: Sequence[float]) -> str:
    """Median and quartiles of ratios."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.3f} [{low:.3f}, {high:.3f}]"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="the commit to compare with")
    parser.add_argument("--head", default="HEAD", help="the other commit; uncommitted changes are not compared")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the jobs with this text in their names")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Machine(torch.device(options.device)), options.only, tiny=options.tiny)
        return 0
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; give at least 1")
    if options.base is None:
        parser.error("give the commit to compare with: make bench-compare BASE=<commit>")
    arguments = ["--device", options.device, "--only", options.only, *["--tiny"] * options.tiny]
    with ExitStack() as stack:
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        commits = {"base": options.base, "head": options.head}
        folders = [stack.enter_context(checked_out(commit, parent / name)) for name, commit in commits.items()]
        workers = [Worker(folder, arguments) for folder in folders]
        for worker in workers:
            stack.callback(worker.close)
        base, head = workers
        print(f"time of {options.head} / {options.base}: median of {options.rounds} paired rounds [quartiles]")
        results = {}
        for name in base.names:
            results[name] = ratios(base, head, name, options.rounds)
            print(f"{name:32} {summarize(results[name])}", flush=True)
        significant = [f"{name}: {verdict}" for name, verdict in verdicts(results).items() if verdict]
        print("\n".join(significant) or "no significant difference")
        needed = min_rounds(len(results))
        if options.rounds < needed:
            print(f"--rounds={options.rounds} cannot show significance for {len(results)} jobs: use {needed} or more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
