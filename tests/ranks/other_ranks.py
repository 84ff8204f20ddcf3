"""Optimizer states that other numbers of ranks take up: `python -m tests.ranks.other_ranks FOLDER MODEL [CASE...]`.

A case is `stage/lora_rank/ranks-ranks-...`, such as `3/0/2-1-2`: two ranks take a step and save, one rank loads that,
takes two steps and saves, two ranks load that and take two steps. Beside it, the first number of ranks takes all steps
without a save. The largest difference of a parameter after each part is printed and written to FOLDER/differences.json.
Without cases, all of the table in `CASES` are run. A step has three updates, with weight decay.

Each process is forked from this one, which has imported everything.
"""

import itertools
import json
import os
import socket
import sys
from pathlib import Path

import torch

from expo.config import load_config
from expo.learner.policy import DeepSpeedPolicy
from expo.runtime.distributed import join_ranks, leave_ranks
from expo.types import Sample
from tests.ranks.launcher import warm_up
from tests.ranks.same_step import samples

CASES = [
    f"{stage}/{lora_rank}/{sizes}"
    for stage, lora_rank, sizes in itertools.product((0, 1, 2, 3), (0, 4), ("2-1-2", "1-2"))
]
STEPS = (1, 2, 2)  # of the parts of a case
UPDATES_PER_STEP = 3


def samples_of_step(step: int) -> list[Sample]:
    """The samples of a step, equal on every rank; each step has others."""
    kept = samples(19)
    return kept[step % len(kept) :] + kept[: step % len(kept)]


def take_steps(policy: DeepSpeedPolicy, first: int, count: int) -> None:
    """Takes the updates of `count` steps."""
    for step in range(first, first + count):
        for mini_batch in policy.prepare(samples_of_step(step)):
            policy.update(mini_batch, torch.tensor(0.02))


def make_policy(model: str, stage: int, lora_rank: int) -> DeepSpeedPolicy:
    """A policy on the ranks of this process."""
    settings = {
        "model.path": model,
        "policy.zero_stage": stage,
        "policy.lora_rank": lora_rank,
        "policy.micro_batch_tokens": 40,
        "policy.updates_per_step": UPDATES_PER_STEP,
        "rollout.questions_per_step": 3,
        "rollout.group_size": 4,
        "data.max_prompt_tokens": 10,
        "rollout.max_new_tokens": 30,
        "optimizer.lr": 2e-4,
        "optimizer.weight_decay": 0.1,
        "optimizer.warmup_steps": 2,
    }
    return DeepSpeedPolicy(load_config(None, list(settings.items())), join_ranks("cpu", 120))


def parameters(policy: DeepSpeedPolicy) -> torch.Tensor:
    """All parameters in one row, float32."""
    return torch.cat([value.flatten() for _, value in policy.named_weights()])


def run_part(folder: Path, model: str, case: str, part: int) -> None:
    """Loads what the part before saved, takes this part's steps, and saves; rank 0 writes the parameters."""
    stage, lora_rank, sizes = parse(case)
    policy = make_policy(model, stage, lora_rank)
    if part:
        policy.load(folder / f"part-{part - 1}" / "policy", other_ranks=sizes[part] != sizes[part - 1])
    take_steps(policy, sum(STEPS[:part]), STEPS[part])
    policy.save(folder / f"part-{part}" / "policy")
    row = parameters(policy)
    if policy._ranks.is_rank0:
        torch.save(row, folder / f"parameters-{part}.pt")


def run_whole(folder: Path, model: str, case: str) -> None:
    """Takes all steps; rank 0 writes the parameters after each part."""
    stage, lora_rank, sizes = parse(case)
    policy = make_policy(model, stage, lora_rank)
    for part in range(len(sizes)):
        take_steps(policy, sum(STEPS[:part]), STEPS[part])
        row = parameters(policy)
        if policy._ranks.is_rank0:
            torch.save(row, folder / f"whole-{part}.pt")


def parse(case: str) -> tuple[int, int, list[int]]:
    """ZeRO stage, rank of the adapters, and number of ranks of each part."""
    stage, lora_rank, sizes = case.split("/")
    return int(stage), int(lora_rank), [int(size) for size in sizes.split("-")]


def fork_ranks(size: int, function, *arguments) -> None:
    """Calls a function in `size` forked processes, the ranks of a group of their own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(size):
        process = os.fork()
        if process == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()})
            function(*arguments)
            leave_ranks()
            os._exit(0)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert codes == [0] * size, (arguments, codes)


def differences(folder: Path, model: str, case: str) -> list[float]:
    """The largest difference of a parameter after each part."""
    folder.mkdir(parents=True)
    sizes = parse(case)[2]
    fork_ranks(sizes[0], run_whole, folder, model, case)
    for part, size in enumerate(sizes):
        (folder / f"part-{part}" / "policy").mkdir(parents=True)
        fork_ranks(size, run_part, folder, model, case, part)
    found, expected = (
        [torch.load(folder / f"{kind}-{part}.pt") for part in range(len(sizes))] for kind in ("parameters", "whole")
    )
    return [float((left - right).abs().max()) for left, right in zip(found, expected, strict=True)]


def main(folder: Path, model: str, *cases: str) -> None:
    """Runs the cases."""
    warm_up()
    found = {}
    for number, case in enumerate(cases or CASES):
        found[case] = differences(folder / f"case-{number}", model, case)
        print(case, *(f"{difference:.1e}" for difference in found[case]), flush=True)
    (folder / "differences.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
