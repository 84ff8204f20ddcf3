"""Which settings a resumed run may change, and why it may not change the others: the tables of docs/resuming.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from expo.errors import ConfigError

FREE = {
    "run.dir": "where the run is",
    "run.checkpoint_every": "when it saves",
    "run.keep_checkpoints": "what it keeps",
    "run.keep_best": "what it keeps",
    "run.save_by_minutes": "when it stops",
    "run.end_with_launcher": "when it stops",
    "run.completions_per_step": "what it records",
    "run.max_bad_updates": "when it counts as diverged",
    "run.collapse_kl": "when it counts as collapsed",
    "run.collapse_steps": "when it counts as collapsed",
    "run.end_on_collapse": "when it counts as collapsed",
    "run.trackers": "what it records",
    "rollout.keep_replies": "what it keeps",
    "vllm.servers": "where replies are sampled",
    "vllm.key_file": "where replies are sampled",
    "vllm.gpus": "where replies are sampled",
    "vllm.transfer": "how weights are sent",
    "vllm.weights_folder": "how weights are sent",
    "vllm.patience_s": "how long it waits",
    "deadline": "how long it waits",
}
"""Settings, or whole sections, that change no number of a run, each with what it is about; no digest contains them, so
that a setting of earlier versions cannot become one."""
STEERING = {
    "run.steps": "the run ends earlier or later; the linear schedule reaches 0 at the new end",
    "run.reply_tokens": "the run ends earlier or later",
    "optimizer.lr": "the learning rate of all further updates",
    "optimizer.warmup_steps": "the learning rate, if the warm-up is not over",
    "optimizer.schedule": "the learning rate of all further updates",
    "optimizer.max_grad_norm": "the norm to which further gradients are clipped",
    "objective.clip_low": "the clip range of all further updates",
    "objective.clip_high": "the clip range of all further updates",
    "objective.dual_clip": "the clip range of all further updates",
    "objective.rollout_floor": "the bounds of the rollout correction",
    "objective.rollout_cap": "the bounds of the rollout correction",
    "rollout.sync_tolerance": "the tolerance of all further weight syncs",
    "policy.gradient_tolerance": "the tolerance of the gradients of all further updates",
    "rollout.max_new_tokens": "the longest reply of all further steps",
    "rollout.stop_tokens": "what ends a reply in all further steps",
    "rollout.batch_size": "rounding, and memory",
    "reward.timeout_s": "verdicts on answers that take long to grade",
    "reward.workers": "speed, and verdicts on answers that take long to grade",
    "policy.micro_batch_tokens": "rounding, and memory",
    "policy.logits_budget_mb": "rounding, and memory",
    "policy.gradient_checkpointing": "rounding, and memory",
    "policy.packing": "rounding, and memory",
    "policy.offload_reference": "memory",
    "run.threads": "rounding",
    "vllm": "rounding, and memory",
    "evaluation": "further evaluations; sets without a score of the present step are evaluated at once",
}
"""Settings, or whole sections, on which the numbers of all further steps depend, each with what changes; a change is
recorded in environment.json."""
FIXED = {
    "run": "the checkpoint's random states belong to it",
    "model": "the checkpoint has the weights of this model, and the KL penalty is measured from it",
    "data": "the curriculum's pass rates belong to these questions with these prompts",
    "rollout": "all batches of a run have one size and come from one distribution",
    "reward": "rewards before and after the change would measure different things",
    "curriculum": "the pass rates in the checkpoint were estimated with it",
    "kl": "the penalty is a part of the objective, and a run has one objective",
    "objective": "a run has one objective",
    "policy": "the weights and optimizer states in the checkpoint have this form",
    "policy.updates_per_step": "the checkpoint counts the updates of the schedule by it",
    "policy.old_logps": "it is a part of the objective, and a run has one objective",
    "optimizer": "AdamW's state in the checkpoint was built with it",
}
"""Why the other settings of a section, or a setting, may not change."""
SAMPLING = ("rollout.max_new_tokens", "rollout.stop_tokens")
"""The steering settings on which sampled replies depend."""


def _listed(name: str, table: Mapping[str, str]) -> bool:
    return name in table or name.partition(".")[0] in table


def is_free(name: str) -> bool:
    """Whether no number of a run depends on the setting."""
    return _listed(name, FREE)


def is_steering(name: str) -> bool:
    """Whether the setting may change on resume, and the numbers of further steps depend on it."""
    return not is_free(name) and _listed(name, STEERING)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """[before, after] by name of the settings that no longer have the same value and on which numbers depend."""
    return {
        name: [before.get(name), value]
        for name, value in after.items()
        if not is_free(name) and before.get(name) != value
    }


def require_allowed(changed: Mapping[str, Sequence[Any]], run: object) -> None:
    """Raises: ConfigError if a setting changed that may not change on resume; it says why.

    Args:
        changed: from `changes`.
        run: the run's folder, for the message.
    """
    refused = {name: values for name, values in changed.items() if not is_steering(name)}
    if refused:
        raise ConfigError(
            f"--resume cannot change {'; '.join(_refusal(name, values) for name, values in refused.items())}. Use the "
            f"values in {run}/config.yaml, or restore that file if it was damaged, or start another run; "
            f"docs/resuming.md lists what may change"
        )


def is_record(value: object) -> bool:
    """Whether a value read from a file is a record of changes."""
    return isinstance(value, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in value.values())


def describe(changed: Mapping[str, Sequence[Any]]) -> str:
    """The changes on one line, each as "run.steps (10 -> 20)"."""
    return ", ".join(f"{name} ({before} -> {after})" for name, (before, after) in changed.items())


def _refusal(name: str, values: Sequence[Any]) -> str:
    reason = FIXED.get(name) or FIXED[name.partition(".")[0]]
    return f"{describe({name: values})}: {reason}"


def initial_settings(settings: Mapping[str, Any], starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings with which a run started.

    Args:
        settings: the present ones.
        starts: every start of the run, in order, as environment.json records them with their changes.
    """
    initial = dict(settings)
    for start in reversed(starts):
        initial.update({name: values[0] for name, values in start.get("changed", {}).items()})
    return initial
