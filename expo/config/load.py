"""Reads a RunConfig from a YAML file and from the command line of `python -m expo.train`."""

from collections.abc import Sequence
from pathlib import Path

from expo.config.run import RunConfig
from expo.runtime.cli import Invocation, filled, parse, read_recipe
from expo.runtime.config_errors import Overrides

RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT_RECIPE = RECIPES / "ledger.yaml"
COMMON = {
    "model.path": "transformers folder or hub id",
    "data.train": "file, hub data set or named set",
    "data.prompt": "",
    "data.system": "system message",
    "evaluation.sets": "{NAME: SOURCE} of questions for pass@k",
    "evaluation.every": "steps between evaluations",
    "reward.verifier": "math, exact, choice or module:function",
    "reward.functions": "{module:function: weight}",
    "rollout.engine": "",
    "rollout.questions_per_step": "questions of a step",
    "rollout.group_size": "replies per question",
    "rollout.max_new_tokens": "longest reply",
    "optimizer.lr": "learning rate",
    "kl.beta": "KL coefficient; 0: no reference model",
    "kl.rho": "",
    "curriculum.kind": "",
    "policy.dtype": "",
    "policy.lora_rank": "rank of adapters; 0: train all weights",
    "policy.micro_batch_tokens": "tokens of a forward and backward pass",
    "run.dir": "folder of the run",
    "run.steps": "steps of rollout and update",
    "run.checkpoint_every": "steps between checkpoints",
    "run.trackers": "tensorboard, wandb, trackio",
}
"""The settings that --help shows."""


def load_config(path: Path | None, overrides: Overrides = ()) -> RunConfig:
    """The configuration in a YAML file (None: the embedded default), with dotted overrides applied.

    A file may name another file in its folder, `base: other.yaml`, whose fields are its defaults.

    Raises: ConfigError if the file cannot be read, a key is unknown, a value has the wrong type or range, or the
        values do not go together.
    """
    source = path or DEFAULT_RECIPE
    return filled(RunConfig, read_recipe(source), overrides, f"{source.name}: " if path else "")


def parse_command_line(argv: Sequence[str], prog: str = "python -m expo.train") -> Invocation[RunConfig]:
    """Parses a command line of `prog` (without the program's name).

    Exits: 0 after --help, --help-all or --print-config; 2 with one line on stderr if the command line or
        the configuration is wrong.
    """
    return parse(RunConfig, load_config, argv, prog, COMMON)
