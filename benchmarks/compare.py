"""Two commits side by side: `python -m benchmarks.compare BASE [--head HEAD]`, or `make bench-compare BASE=...`.

Each commit's expo_kernels is checked out into a folder of its own and runs in a process of its own, with this tree's
benchmarks. Rounds go turn by turn, so that what else the machine does falls on both; a round's ratio is HEAD's time
over BASE's. Printed are the median of the ratios, their quartiles, and which jobs got slower or faster: by a two-sided
sign test of each, corrected for all of them (Holm), so that the chance of even one false word a run is at most 5 %.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.contenders import OURS, contender
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.machine import Machine
from benchmarks.shapes import Case, Shape, dtype_for, shapes_for, side_shape
from benchmarks.worktrees import checked_out
from expo_kernels import CurriculumTable, linear_token_logps

ROUNDS = 15
SMALL_TABLE = 10**6  # questions


def jobs(machine: Machine, *, tiny: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name; inputs are made here."""
    kind = machine.device.type
    dtype, one_shape = dtype_for(kind), side_shape(kind, tiny=tiny)
    made: dict[str, Callable[[], object]] = {}

    def add_loss(label: str, case: Case, name: str = OURS) -> Inputs:
        inputs = make_inputs(case, machine.device)
        loss = contender(name).prepare(inputs)

        def run() -> None:
            inputs.clear()
            loss().backward()

        made[f"loss: {label}"] = run
        return inputs

    for shape in _shapes(kind, tiny=tiny):
        add_loss(shape.name, Case(shape, dtype))
    add_loss("frozen head", Case(one_shape, dtype, frozen_head=True))
    add_loss("half active", Case(one_shape, dtype, active_share=0.5))
    add_loss("ratio per sequence", Case(one_shape, dtype, ratio="sequence"))
    inputs = add_loss("on logits", Case(one_shape, dtype), f"{OURS} on logits")
    made["log-probs"] = lambda: linear_token_logps(inputs.hidden.detach(), inputs.weight.detach(), inputs.ids)
    table = CurriculumTable(SMALL_TABLE, device=machine.device)
    made["curriculum draw"] = lambda: table.sample(256)
    return made


def _shapes(kind: str, *, tiny: bool) -> tuple[Shape, ...]:
    """Those of the published table, the largest left out: a regression shows at the others, in less time."""
    shapes = shapes_for(kind, tiny=tiny)
    largest = max(shapes, key=lambda shape: shape.num_tokens * shape.hidden_size * shape.vocab_size)
    return tuple(shape for shape in shapes if shape != largest) or shapes


def serve(machine: Machine, *, tiny: bool) -> None:
    """A worker: prints the names of its jobs, then milliseconds for each name that it reads."""
    made = jobs(machine, tiny=tiny)
    for run in made.values():
        run()
    print("\t".join(made), flush=True)
    for line in sys.stdin:
        print(machine.time(made[line.rstrip("\n")]), flush=True)


class Worker:
    """A commit's code in a process of its own."""

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
            raise SystemExit(f"a worker ended with code {self._process.wait()}; its error stands above")
        return line

    def ms(self, name: str) -> float:
        """Milliseconds of one round of a job."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def ratios(base: Worker, head: Worker, name: str, rounds: int) -> list[float]:
    """HEAD's time over BASE's, round by round; who goes first changes at every round."""
    found = []
    for index in range(rounds):
        first, second = (base, head) if index % 2 == 0 else (head, base)
        times = {first: first.ms(name), second: second.ms(name)}
        found.append(times[head] / times[base])
    return found


def sign_test(values: Sequence[float]) -> float:
    """Two-sided p of as many ratios on one side of 1, where either side is as likely; ratios of 1 do not count."""
    above, below = sum(value > 1 for value in values), sum(value < 1 for value in values)
    num = above + below
    return min(1.0, 2 * sum(math.comb(num, k) for k in range(min(above, below) + 1)) / 2**num)


def verdicts(ratios_of: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """ "slower", "faster" or "" for each job; any false word at all has a chance of at most 5 %."""
    from expo.experiments.ablation.paired import holm  # here: the worker of an old commit has none

    beyond = holm([sign_test(values) for values in ratios_of.values()])
    return {
        name: ("slower" if median(values) > 1 else "faster") if is_beyond else ""
        for (name, values), is_beyond in zip(ratios_of.items(), beyond, strict=True)
    }


def least_rounds(num_jobs: int) -> int:
    """Rounds from which on a job can be told slower or faster at all: all of them on one side."""
    rounds = 1
    while verdicts({str(job): [2.0] * rounds if job == 0 else [1.0] for job in range(num_jobs)})["0"] == "":
        rounds += 1
    return rounds


def described(values: Sequence[float]) -> str:
    """Median and quartiles of ratios."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.3f} [{low:.3f}, {high:.3f}]"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="the commit to compare with")
    parser.add_argument("--head", default="HEAD", help="the other commit; what is not committed is not compared")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Machine(torch.device(options.device)), tiny=options.tiny)
        return 0
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; give at least 1")
    if options.base is None:
        parser.error("give the commit to compare with: make bench-compare BASE=<commit>")
    arguments = ["--device", options.device, *["--tiny"] * options.tiny]
    with ExitStack() as stack:
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        commits = {"base": options.base, "head": options.head}
        folders = [stack.enter_context(checked_out(commit, parent / name)) for name, commit in commits.items()]
        workers = [Worker(folder, arguments) for folder in folders]
        for worker in workers:
            stack.callback(worker.close)
        base, head = workers
        print(f"{options.head} over {options.base}: median of {options.rounds} paired rounds [quartiles]")
        found = {}
        for name in base.names:
            found[name] = ratios(base, head, name, options.rounds)
            print(f"{name:32} {described(found[name])}", flush=True)
        said = [f"{name}: {verdict}" for name, verdict in verdicts(found).items() if verdict]
        print("\n".join(said) or "nothing is slower or faster beyond noise")
        needed = least_rounds(len(found))
        if options.rounds < needed:
            print(f"--rounds={options.rounds} cannot tell that of {len(found)} jobs: give {needed} or more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
