"""The end of a message about an unknown name: the known name that was probably meant."""

import difflib
from collections.abc import Sequence

MOST_SUGGESTIONS = 3
LEAST_RATIO = 0.7  # of difflib; below it a suggestion is more often wrong than right

OTHER_NAMES = {
    "accumulation_steps": ("policy.micro_batch_tokens",),
    "actor_rollout_ref.rollout.name": ("rollout.engine",),
    "adapter": ("policy.lora_rank",),
    "batch_size": ("rollout.questions_per_step", "rollout.batch_size"),
    "bf16": ("policy.dtype",),
    "checkpoint_dir": ("run.dir",),
    "clip_ratio": ("objective.clip_low", "objective.clip_high"),
    "clip_ratio_c": ("objective.dual_clip",),
    "clip_ratio_high": ("objective.clip_high",),
    "clip_ratio_low": ("objective.clip_low",),
    "continue": ("--resume",),
    "dataset": ("data.train",),
    "dataset_name": ("data.train",),
    "default_local_dir": ("run.dir",),
    "delta": ("objective.dual_clip",),
    "deepspeed": ("policy.zero_stage",),
    "entropy_coeff": ("objective.entropy_bonus",),
    "epochs": ("run.steps",),
    "epsilon": ("objective.clip_low", "objective.clip_high"),
    "epsilon_high": ("objective.clip_high",),
    "eval": ("evaluate",),
    "eval_steps": ("evaluation.every",),
    "experiment_name": ("run.dir",),
    "fp16": ("policy.dtype",),
    "grad_clip": ("optimizer.max_grad_norm",),
    "gradient_accumulation_steps": ("policy.micro_batch_tokens", "policy.updates_per_step"),
    "importance_sampling_level": ("objective.ratio",),
    "kl_coef": ("kl.beta",),
    "kl_loss_coef": ("kl.beta",),
    "kl_loss_type": ("kl.estimator",),
    "learning_rate": ("optimizer.lr",),
    "log_dir": ("run.dir",),
    "logger": ("run.trackers",),
    "lora_r": ("policy.lora_rank",),
    "loss_agg_mode": ("objective.aggregation",),
    "loss_mode": ("objective.surrogate",),
    "loss_type": ("objective.surrogate", "objective.aggregation"),
    "lr_scheduler_type": ("optimizer.schedule",),
    "lr_warmup_steps": ("optimizer.warmup_steps",),
    "mask_truncated_completions": ("objective.mask_truncated",),
    "max_completion_length": ("rollout.max_new_tokens",),
    "max_length": ("rollout.max_new_tokens", "data.max_prompt_tokens"),
    "max_num_gen_batches": ("rollout.max_resamples",),
    "max_prompt_length": ("data.max_prompt_tokens",),
    "max_response_length": ("rollout.max_new_tokens",),
    "max_steps": ("run.steps",),
    "max_tokens": ("rollout.max_new_tokens",),
    "mini_batch_size": ("policy.updates_per_step",),
    "model": ("model.path",),
    "model_name": ("model.path",),
    "merge": ("export",),
    "model_name_or_path": ("model.path",),
    "n": ("rollout.group_size", "evaluation.num_samples"),
    "norm_adv_by_std_in_grpo": ("objective.advantage_scale",),
    "num_epochs": ("run.steps",),
    "num_generations": ("rollout.group_size",),
    "num_iterations": ("policy.updates_per_step",),
    "num_train_epochs": ("run.steps",),
    "output": ("run.dir",),
    "output_dir": ("run.dir",),
    "param_offload": ("policy.offload_parameters",),
    "per_device_train_batch_size": ("policy.micro_batch_tokens", "rollout.questions_per_step"),
    "plot": ("report",),
    "ppo_epochs": ("policy.updates_per_step",),
    "ppo_max_token_len_per_gpu": ("policy.micro_batch_tokens",),
    "ppo_micro_batch_size_per_gpu": ("policy.micro_batch_tokens",),
    "ppo_mini_batch_size": ("policy.updates_per_step",),
    "report_to": ("run.trackers",),
    "resume_from_checkpoint": ("--resume",),
    "resume_mode": ("--resume",),
    "reward": ("reward.verifier", "reward.functions"),
    "reward_funcs": ("reward.functions",),
    "rollout_n": ("rollout.group_size",),
    "save_freq": ("run.checkpoint_every",),
    "save_steps": ("run.checkpoint_every",),
    "save_total_limit": ("run.keep_checkpoints",),
    "scale_rewards": ("objective.advantage_scale",),
    "system_prompt": ("data.system",),
    "tensor_model_parallel_size": ("vllm.tensor_parallel",),
    "tensor_parallel_size": ("vllm.tensor_parallel",),
    "test_freq": ("evaluation.every",),
    "total_epochs": ("run.steps",),
    "total_training_steps": ("run.steps",),
    "train_batch_size": ("rollout.questions_per_step",),
    "train_files": ("data.train",),
    "use_remove_padding": ("policy.packing",),
    "use_vllm": ("rollout.engine",),
    "val_files": ("evaluation.sets",),
    "vllm_gpu_memory_utilization": ("vllm.gpu_memory_utilization",),
    "vllm_importance_sampling_cap": ("objective.rollout_cap",),
    "vllm_tensor_parallel_size": ("vllm.tensor_parallel",),
    "wandb": ("run.trackers",),
    "warmup_ratio": ("optimizer.warmup_steps",),
}
"""Names of settings and commands elsewhere, such as in TRL and verl, without what stands before a dot, and ours."""


def nearest(given: str, known: Sequence[str], otherwise: str = "; --help-all lists the known ones") -> str:
    """The end of a message about the unknown name `given`: a question that names what was probably meant.

    Args:
        given: a flag or a key, with or without dashes before it.
        known: all flags or keys.
        otherwise: the end of the message if nothing is near.
    """
    by_plain: dict[str, str] = {}
    for name in known:
        by_plain.setdefault(_plain(name), name)
    meant = _same_names(_plain(given), by_plain) or _similar_names(_plain(given), by_plain)
    return f"; did you mean {' or '.join(meant[:MOST_SUGGESTIONS])}?" if meant else otherwise


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _field(plain: str) -> str:
    return plain.rpartition(".")[2]


def _same_names(given: str, by_plain: dict[str, str]) -> list[str]:
    """Other libraries' names of a setting, and the same field of another section."""
    if given in by_plain:
        return [by_plain[given]]
    others = OTHER_NAMES.get(given) or OTHER_NAMES.get(_field(given), ())
    same = [*(_plain(name) for name in others), *(plain for plain in by_plain if _field(plain) == _field(given))]
    return [by_plain[plain] for plain in dict.fromkeys(same) if plain in by_plain]


def _similar_names(given: str, by_plain: dict[str, str]) -> list[str]:
    """The name with the most similar spelling, as a whole or without its section."""

    def ratios(plain: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, given, plain).ratio()
        field = 0.0 if "." in given else difflib.SequenceMatcher(None, given, _field(plain)).ratio()
        return max(whole, field), whole

    best = max(by_plain, key=ratios, default="")
    return [by_plain[best]] if best and ratios(best)[0] >= LEAST_RATIO else []
