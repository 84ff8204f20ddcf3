"""The metrics of a training step: their names and units, and the rows of metrics.jsonl and curriculum.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from expo.rewards.groups import GradedRollouts, has_unequal_rewards
from expo.runtime.console import Note
from expo.runtime.timer import PhaseTimer
from expo_kernels import CurriculumTable

CURRICULUM_BINS = 20  # of the pass-rate histogram, over [0, 1]

STEP_METRICS = {
    "step": "number of this step, from 1",
    "accuracy": "mean verifier reward over all replies of the step, those of dropped groups included",
    "reward": "mean reward that advantages are computed from, over the same replies; reward/<name> are the means of "
    "its terms before their weights: each of reward.functions by its name, and the overlong penalty",
    "beta_eff": "KL coefficient of the step, after scaling by rho(accuracy)",
    "kl": "mean KL estimate per reply token, nats",
    "entropy": "mean entropy of the next-token distribution over reply tokens, nats",
    "loss": "the minimised loss, mean over the step's updates",
    "grad_norm": "global gradient norm before clipping, mean over the step's updates",
    "learning_rate": "AdamW's learning rate at the step's last update",
    "completion_length": "mean tokens per reply, end-of-sequence token included",
    "tokens_per_second": "reply tokens over the seconds of the whole step",
    "clip_low_fraction": "share of reply tokens clipped at 1 - clip_low",
    "clip_high_fraction": "share of reply tokens clipped at 1 + clip_high",
    "ratio_mean": "mean importance ratio over reply tokens",
    "ratio_max": "largest importance ratio of the step",
    "gradient_error_bound": "bound on the relative error of the gradients of the output head and its input that "
    "policy.gradient_tolerance allows, the largest of the step's micro-batches; only if that is above 0",
    "kept_columns": "mean share of the vocabulary in the products of these gradients; only with that tolerance",
    "rollout_logp_difference_mean": "mean |policy - rollout engine| log-probability over the reply tokens trained on, "
    "both of the policy that sampled them (with rollout.ahead, the policy is the step's and the engine's weights are "
    "older), nats; with policy.old_logps = rollout, of the step's first update only",
    "rollout_logp_difference_max": "the largest of these, nats",
    "rollout_ratio_median": "median over the same tokens of w = exp(policy - rollout engine)",
    "rollout_ratio_p99": "99th percentile of w: the smallest with 99 % of the tokens at or below it",
    "rollout_effective_sample_fraction": "(sum w)^2 / (tokens * sum w^2): effective sample size of the tokens weighted "
    "by w, as a share of their number; 1 if all w are equal",
    "sync_max_abs_dlogp": "largest |policy - rollout engine| log-probability of the fixed probe after the sync, nats; "
    "null if they share their weights; with rollout.ahead, of the weights that sampled the step",
    "sync_weights_compared": "weights of the rollout engine that equal the policy's exactly after the sync, compared "
    "by up to 4,096 elements of each; null if they share their weights; with rollout.ahead as above",
    "rollout_weights_age": "steps between the weights that sampled the replies and those that the step began with: 0, "
    "or up to rollout.ahead",
    "unparsed_fraction": "share of replies that state no answer",
    "timeout_fraction": "share of replies that could not be graded within the limits on time and memory",
    "unevaluated_fraction": "share of replies of the right value that are still to be computed (12 * 12 for 144)",
    "truncated_fraction": "share of replies that max_new_tokens ended",
    "groups_sampled": "groups of replies sampled in the step, one for each question, over all rounds",
    "groups_dropped": "of these, the groups not trained on, since their rewards are all equal",
    "resampling_rounds": "rounds in which further groups were sampled to replace them",
    "zero_variance_fraction": "share of the groups sampled whose rewards, those that advantages are computed from, are "
    "all equal",
    "effective_sample_size": "(sum w)^2 / sum w^2 of the curriculum's weights, in questions",
    "rollout_tokens_per_second": "reply tokens of all ranks over the seconds of sampling",
    "seconds_sampling": "seconds of sampling and grading; with rollout.ahead they pass while the policy learns, and "
    "seconds/rollout is what the step waited for them",
    "training_tokens_per_second": "prompt and reply tokens of all ranks over the seconds of the update phase",
    "mfu": "model FLOPs of the reference and update phases, recomputation not counted (expo/learner/flops.py), over "
    "their seconds and the peak bfloat16 FLOP/s of all GPUs; null if that peak is unknown",
    "padding_fraction": "share of the positions in training batches that are padding",
    "memory_peak_gib": "peak memory so far, the largest of all ranks: GPU tensors, without a GPU the resident set; GiB",
    "memory_reserved_gib": "peak GPU memory reserved so far, the largest of all ranks; without a GPU as above; GiB",
    "skipped_updates": "optimizer steps skipped because loss or gradient was not finite",
    "seconds": "wall-clock seconds of the whole step; seconds/<phase> are those of its phases",
}


def step_row(
    step: int,
    graded: GradedRollouts,
    beta_eff: float,
    updates: Sequence[Mapping[str, float]],
    curriculum: CurriculumTable,
    timer: PhaseTimer,
) -> dict[str, Any]:
    """The row of a step in metrics.jsonl; `STEP_METRICS` describes its entries."""
    correct = graded.correct
    applied = [update for update in updates if not update["skipped"]] or updates[-1:]
    return {
        "step": step,
        "accuracy": float(correct.mean()),
        "reward": float(graded.rewards.mean()),
        **{f"reward/{name}": float(values.mean()) for name, values in graded.reward_parts.items()},
        "beta_eff": beta_eff,
        **{name: sum(update[name] for update in applied) / len(applied) for name in applied[0] if name != "skipped"},
        **{name: max(update[name] for update in applied) for name in applied[0] if name.endswith(("_max", "_bound"))},
        "learning_rate": updates[-1]["learning_rate"],
        "skipped_updates": sum(update["skipped"] for update in updates),
        "completion_length": graded.num_tokens / correct.numel(),
        "tokens_per_second": graded.num_tokens / timer.total(),
        **graded.fractions(),
        "zero_variance_fraction": float((~has_unequal_rewards(graded.rewards)).float().mean()),
        "effective_sample_size": float(curriculum.effective_sample_size),
        **timer.metrics(),
    }


def curriculum_row(step: int, curriculum: CurriculumTable) -> dict[str, Any]:
    """The row of a step in curriculum.jsonl: the distribution of the questions' pass rates."""
    return {
        "step": step,
        "histogram": torch.histc(curriculum.pass_rates.float().cpu(), CURRICULUM_BINS, 0.0, 1.0).int().tolist(),
        "visited": int((curriculum.visits > 0).sum()),
        "effective_sample_size": float(curriculum.effective_sample_size),
        "num_questions": len(curriculum.pass_rates),
    }


def progress_note(row: Mapping[str, Any], signs: Sequence[str] = ()) -> Note:
    """The metrics of a step that the progress bar shows, the most important first; alarms are that no reply has an
    answer or an end, and signs of a collapse.
    """
    alarms = [f"COLLAPSE: {', '.join(signs)}"] if signs else []
    alarms += [f"ALL REPLIES {name.upper()}" for name in ("truncated", "unparsed") if row[f"{name}_fraction"] == 1.0]
    metrics = (
        f"acc {row['accuracy']:.3f}",
        f"unparsed {share_text(row['unparsed_fraction'])}",
        f"truncated {share_text(row['truncated_fraction'])}",
        f"kl {row['kl']:.4f}",
        f"len {row['completion_length']:.1f}",
        f"entropy {row['entropy']:.3f}",
        f"{row['tokens_per_second']:.0f} tokens/s",
    )
    return Note(tuple(alarms), metrics)


def share_text(share: float) -> str:
    """A share in whole per cent; 0 % and 100 % are exactly that, as in "<1%" for a small one."""
    percent = round(100 * share)
    if share in (0.0, 1.0) or 0 < percent < 100:
        return f"{percent}%"
    return "<1%" if percent == 0 else ">99%"
