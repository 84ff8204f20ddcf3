"""What a run writes down: one JSON line a step, pictures' raw material, and what the person watching sees.

Names and units are listed in `STEP_METRICS`; every fraction says of what.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from expo.rewards.groups import GradedRollouts
from expo.runtime.timer import PhaseTimer
from expo_kernels import CurriculumTable

CURRICULUM_BINS = 20  # of the pass-rate histogram, over [0, 1]

STEP_METRICS = {
    "step": "number of this step, from 1",
    "accuracy": "mean verifier reward over all replies of the step, those of groups that were dropped included",
    "reward": "mean reward behind the advantages, over the same replies; reward/<name> are means of what is added to "
    "the verdict, before its weight: each of reward.functions by its name, and the overlong penalty",
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
    "rollout_logp_difference_mean": "mean |policy - rollout engine| log-probability over the reply tokens trained on, "
    "both as the policy stood when they were sampled, nats; policy.old_logps = rollout: of the step's first update",
    "rollout_logp_difference_max": "the largest of these, nats",
    "rollout_ratio_median": "median over the same tokens of w = exp(policy - rollout engine)",
    "rollout_ratio_p99": "99th percentile of w: the smallest with 99 % of the tokens at or below it",
    "rollout_effective_sample_fraction": "(sum w)^2 / (tokens * sum w^2): share of the tokens that are worth as much, "
    "once weighted by w, as all would be if the engine had sampled from the policy; 1 where every w is alike",
    "sync_max_abs_dlogp": "largest |policy - rollout engine| log-probability of the fixed probe after the sync, nats; "
    "null where they share their weights",
    "sync_weights_compared": "weights that the rollout engine holds as they came, found to be exactly the policy's "
    "after the sync, by up to 4,096 elements of each; null where they share their weights",
    "unparsed_fraction": "share of replies in which no answer was found",
    "timeout_fraction": "share of replies that could not be graded within the limits",
    "truncated_fraction": "share of replies cut at max_new_tokens",
    "groups_sampled": "questions of the step that were given a group of replies, over all rounds",
    "groups_dropped": "of these, the groups that were not learnt from, their rewards being all equal",
    "resampling_rounds": "rounds in which such groups were replaced",
    "zero_variance_fraction": "share of the groups sampled whose replies were all right or all wrong",
    "effective_sample_size": "(sum w)^2 / sum w^2 of the curriculum's weights, in questions",
    "rollout_tokens_per_second": "reply tokens of all ranks over the seconds of the rollout phase",
    "training_tokens_per_second": "prompt and reply tokens of all ranks over the seconds of the update phase",
    "mfu": "model FLOPs of the reference and update phases, recomputation not counted (expo/learner/flops.py), over "
    "their seconds and the peak bfloat16 FLOP/s of all GPUs; null where that peak is not known",
    "padding_fraction": "share of the positions passed through the model in training that were padding",
    "memory_peak_gib": "most memory held so far by any rank: GPU tensors, or without a GPU the resident set; GiB",
    "memory_reserved_gib": "most GPU memory reserved so far by any rank's allocator, or the resident set; GiB",
    "skipped_updates": "optimizer steps left out because loss or gradient was not finite",
    "seconds": "the whole step; seconds/<phase> are its parts",
}


def step_row(
    step: int,
    graded: GradedRollouts,
    beta_eff: float,
    updates: Sequence[Mapping[str, float]],
    curriculum: CurriculumTable,
    timer: PhaseTimer,
) -> dict[str, Any]:
    """One line of metrics.jsonl; `STEP_METRICS` says what each entry is."""
    correct = graded.correct
    num_right, group_size = correct.sum(dim=1), correct.shape[1]
    taken = [update for update in updates if not update["skipped"]] or updates[-1:]
    return {
        "step": step,
        "accuracy": float(correct.mean()),
        "reward": float(graded.rewards.mean()),
        **{f"reward/{name}": float(values.mean()) for name, values in graded.reward_parts.items()},
        "beta_eff": beta_eff,
        **{name: sum(update[name] for update in taken) / len(taken) for name in taken[0] if name != "skipped"},
        **{name: max(update[name] for update in taken) for name in taken[0] if name.endswith("_max")},
        "learning_rate": updates[-1]["learning_rate"],
        "skipped_updates": sum(update["skipped"] for update in updates),
        "completion_length": graded.num_tokens / correct.numel(),
        "tokens_per_second": graded.num_tokens / timer.total(),
        **graded.fractions(),
        "zero_variance_fraction": float(((num_right == 0) | (num_right == group_size)).float().mean()),
        "effective_sample_size": float(curriculum.effective_sample_size),
        **timer.metrics(),
    }


def curriculum_row(step: int, curriculum: CurriculumTable) -> dict[str, Any]:
    """One line of curriculum.jsonl: where the questions' pass rates lie."""
    return {
        "step": step,
        "histogram": torch.histc(curriculum.pass_rates.float().cpu(), CURRICULUM_BINS, 0.0, 1.0).int().tolist(),
        "visited": int((curriculum.visits > 0).sum()),
        "effective_sample_size": float(curriculum.effective_sample_size),
        "num_questions": len(curriculum.pass_rates),
    }


def progress_note(row: Mapping[str, Any]) -> str:
    """What a person watching wants to see of a step."""
    return (
        f"accuracy {row['accuracy']:.3f}  kl {row['kl']:.4f}  entropy {row['entropy']:.3f}  "
        f"length {row['completion_length']:.1f}  {row['tokens_per_second']:.0f} tokens/s"
    )
