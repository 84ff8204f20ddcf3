"""EXPO, top to bottom: `python -m expo.train [CONFIG.yaml] [--section.field=value ...]`.

Source: algorithm 1 of arXiv 2605.11403. A step draws questions by the curriculum's weights, samples a group of
replies to each, grades them, and takes gradient steps on the clipped surrogate with the accuracy-conditioned KL.
`--curriculum.kind=uniform --kl.rho=constant` is GRPO.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from expo.assemble import Parts, build_parts, load_inputs, open_folder
from expo.checkpoint import load_newest, save_checkpoint
from expo.config import ConfigError, RunConfig, fail, parse_command_line
from expo.data import Prompted
from expo.evaluate import evaluate
from expo.files import write_whole
from expo.graded import Graded, grade
from expo.metrics import Display, PhaseTimer, curriculum_row, progress_note, step_row
from expo.policy import Sample
from expo.records import results_table
from expo.report import write_report
from expo.rollout import Reply, Request, Sampling, request_seed
from expo_kernels import akl_beta, group_advantages

PROGRAM = "python -m expo.train"


def train(config: RunConfig, resume: bool = False) -> Path:
    """Runs `config` to its end and returns the run's folder.

    Args:
        config: the whole run.
        resume: go on from the newest whole checkpoint in the run's folder, if it has one.

    Raises: ConfigError if the run cannot be, found before any model loads where that is possible.
    """
    inputs = load_inputs(config)
    folder, display = open_folder(config, resume), Display()
    parts = build_parts(config, inputs, folder, display)
    first_step = restore(parts) if resume else 1
    if first_step == 1 and not folder.read_rows("evaluations"):
        evaluate_now(parts, step=0)

    with display.bar("step", config.run.steps, done=first_step - 1) as bar:
        for step in range(first_step, config.run.steps + 1):
            timer = PhaseTimer()
            with timer.phase("curriculum"):
                drawn = draw_questions(parts)
            with timer.phase("rollout"):
                asked, replies = sample_replies(parts, step, drawn)
            with timer.phase("reward"):
                graded = grade(parts.verifier, asked, replies)
            with timer.phase("curriculum"):
                parts.curriculum.update(drawn, graded.rewards.mean(dim=1))
            advantages = group_advantages(
                graded.rewards.flatten(), config.rollout.group_size, scale=config.objective.advantage_scale
            )
            beta = akl_beta(graded.rewards, config.kl.beta, rho=config.kl.rho)
            with timer.phase("reference"):
                mini_batches = parts.policy.prepare(training_samples(graded, advantages))
            with timer.phase("update"):
                updates = [parts.policy.update(mini_batch, beta) for mini_batch in mini_batches]

            row = step_row(step, graded, float(beta), updates, parts.curriculum, timer)
            folder.append("completions", *graded.rows(step)[: config.run.completions_per_step])
            folder.append("curriculum", curriculum_row(step, parts.curriculum))
            folder.append("metrics", row)
            bar.advance(note=progress_note(row))
            if is_due(step, config.evaluation.every) or step == config.run.steps:
                evaluate_now(parts, step)
            if is_due(step, config.run.checkpoint_every) or step == config.run.steps:
                save(parts, step)

    finish(parts)
    return folder.path


def draw_questions(parts: Parts) -> Tensor:
    """Indices [questions_per_step] of this step's questions, none twice (paper eq. 7; or all alike)."""
    count = parts.config.rollout.questions_per_step
    if parts.config.curriculum.kind == "uniform":
        return torch.randperm(len(parts.train_set), generator=parts.generator)[:count]
    return parts.curriculum.sample(count, generator=parts.generator)


def sample_replies(parts: Parts, step: int, drawn: Tensor) -> tuple[list[Prompted], list[list[Reply]]]:
    """The drawn questions and group_size replies to each; seeds follow from run, step, question and sample alone."""
    config = parts.config
    asked = [parts.train_set[index] for index in drawn.tolist()]
    requests = []
    for prompted in asked:
        key = (config.run.seed, "rollout", step, prompted.question.id)
        seeds = [request_seed(*key, sample) for sample in range(config.rollout.group_size)]
        requests.append(Request(prompted.prompt_ids, seeds))
    sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens)
    return asked, parts.engine.generate(requests, sampling)


def training_samples(graded: Graded, advantages: Tensor) -> list[Sample]:
    """Every reply with its prompt and its advantage, question after question."""
    value = iter(advantages.tolist())
    return [
        Sample(prompted.prompt_ids, reply.token_ids, reply.logps, next(value))
        for prompted, group in zip(graded.asked, graded.replies, strict=True)
        for reply in group
    ]


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is done after this one."""
    return every > 0 and step % every == 0


def evaluate_now(parts: Parts, step: int) -> None:
    """Evaluates every set with the present policy and appends a line to evaluations.jsonl."""
    config, sets = parts.config, parts.evaluation_sets
    total = sum(len(asked) for asked in sets.values()) * config.evaluation.num_samples
    if total == 0:
        return
    with parts.display.bar(f"evaluation after step {step}, replies", total) as bar:
        result = evaluate(
            parts.engine,
            parts.verifier,
            sets,
            config.evaluation,
            config.rollout.max_new_tokens,
            config.run.seed,
            on_progress=bar.advance,
        )
    parts.folder.append("evaluations", {"step": step, **result})


def save(parts: Parts, step: int) -> None:
    """Writes everything the run needs to go on after `step`."""
    state = {
        "policy": parts.policy.state_dict(),
        "curriculum": parts.curriculum.state_dict(),
        "generator": parts.generator.get_state(),
    }
    save_checkpoint(parts.folder.path / "checkpoints", step, state, parts.config.run.keep_checkpoints)


def restore(parts: Parts) -> int:
    """Takes up the newest checkpoint, if any, and returns the step to go on with."""
    state = load_newest(parts.folder.path / "checkpoints")
    step: int = state["step"] if state is not None else 0
    if state is not None:
        parts.policy.load_state_dict(state["policy"])
        parts.curriculum.load_state_dict(state["curriculum"])
        parts.generator.set_state(state["generator"])
        parts.display.line(f"going on after step {step} of {parts.config.run.steps} in {parts.folder.path}")
    parts.folder.rewind(step)
    return step + 1


def finish(parts: Parts) -> None:
    """The exported model, summary.json, the report, and the table of before and after."""
    folder, config = parts.folder, parts.config
    write_whole(folder.path / "export", lambda path: _export(parts, path))
    evaluations = folder.read_rows("evaluations")
    summary = {
        "seed": config.run.seed,
        "steps": config.run.steps,
        "commit": folder.read_json("environment.json")["commit"],
        "seconds": sum(row["seconds"] for row in folder.read_rows("metrics") + evaluations),
        "before": evaluations[0]["sets"] if evaluations else {},
        "after": evaluations[-1]["sets"] if evaluations else {},
    }
    folder.write_json("summary.json", summary)
    if evaluations:
        parts.display.line(results_table(summary["before"], summary["after"]))
    parts.display.line(f"run:    {folder.path}\nreport: {write_report(folder.path)}")
    parts.verifier.close()


def _export(parts: Parts, path: Path) -> None:
    parts.policy.export(path)
    parts.tokenizer.save_pretrained(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when the run has ended well, 2 with one line on stderr when it cannot be."""
    invocation = parse_command_line(sys.argv[1:] if argv is None else argv, PROGRAM)
    try:
        train(invocation.config, invocation.resume)
    except ConfigError as error:
        fail(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
