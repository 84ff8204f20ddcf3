"""`ExpoGRPOTrainer`: TRL's GRPOTrainer with this library's linear loss, AKL and Gaussian curriculum sampling.

    from expo_kernels.integrations.trl import ExpoGRPOTrainer  # in place of trl.GRPOTrainer

Generation, rewards, advantages and logging are TRL's. The head is applied inside the model's forward, where ZeRO 3 can
gather it. Source: TRL 1.16; FG-ExPO (arXiv 2605.11403) eq. 4 to 8 and algorithm 1.

Letters: B sequences, T completion positions, L positions of prompt and completion, V vocabulary, H hidden.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expo_kernels.advantages import akl_beta
from expo_kernels.curriculum import CurriculumTable
from expo_kernels.integrations import _host
from expo_kernels.integrations._trl_loss import WINDOW_LOSS_TYPES, TrlLoss, check_loss_type, with_correction
from expo_kernels.linear_loss import linear_expo_loss
from expo_kernels.objective import Objective

_host.check_version("trl", at_least=(1, 16), below=(1, 17))

# imported after the check of the version
from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from expo_kernels.integrations._trl_head import apply_head_in_forward, base_model  # noqa: E402

# options of GRPOConfig that this loss does not support, each with the value that disables it
_REFUSED = {
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
}
# fields of a model's config that scale its logits
_LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_STATE_FILE = "expo_curriculum.pt"


class ExpoGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer with EXPO: batch accuracy scales the KL weight, and pass rates determine sampling.

    With rho="constant" and curriculum="uniform" it is GRPO and gives TRL's own numbers, without [B, T, V] logits. It
    logs TRL's metrics, except for the minimum and maximum of clip ratios over sequences, and adds `accuracy`,
    `beta_eff`, `ratio_max` and `curriculum/effective_sample_size`. Clip ratios are always shares of tokens.

    Scores are accuracies, in [0, 1] or None for a reply that was not scored, unless rho="constant" and
    curriculum="uniform": then any rewards may be given, and no `accuracy` is logged. beta=0 makes no difference.

    Args:
        model: as GRPOTrainer.
        reward_funcs: as GRPOTrainer.
        args: as GRPOTrainer; `loss_type` is one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo.
        positional: as GRPOTrainer.
        rho: how the batch's accuracy scales beta, as in `akl_beta`.
        curriculum: "gcs": a `CurriculumTable` with the paper's settings samples the questions; "uniform": TRL's order;
            or a table for the questions of `train_dataset`. The trainer's checkpoints contain the table.
        accuracy_reward: name of the reward function whose scores, in [0, 1], are the accuracy; None: there is only one.
        logits_budget_mb: MiB for the logits of one chunk; None: a default for the device.
        gradient_tolerance: as in `linear_expo_loss`; above 0, the largest `gradient_error_bound` is logged.
        options: as GRPOTrainer.

    Raises:
        ValueError: a setting would have no effect, or an `Objective` cannot express it; in training, a score that is no
            accuracy.
        NotImplementedError: the model or the kind of parallelism is not supported yet.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        rho: Literal["tanh", "constant"] | Callable[[Tensor], Tensor] = "tanh",
        curriculum: Literal["gcs", "uniform"] | CurriculumTable = "gcs",
        accuracy_reward: str | None = None,
        logits_budget_mb: float | None = None,
        gradient_tolerance: float = 0.0,
        **options: Any,
    ) -> None:
        if args is not None:  # before a model loads
            _check_config(args)
        super().__init__(model, reward_funcs, args, *positional, **options)
        self._accuracy_index = self._find_accuracy(accuracy_reward)
        self._rho, self._budget_mb, self._gradient_tolerance = rho, logits_budget_mb, gradient_tolerance
        self.curriculum = self._make_curriculum(curriculum)
        self._generator = torch.Generator(self.curriculum.pass_rates.device if self.curriculum else "cpu")
        self._generator.manual_seed(self.args.seed)
        self._check_model()
        self._objective = self._make_objective()
        self._beta_eff = torch.tensor(float(self.beta), device=self.accelerator.device)
        self._scores = torch.empty(0)
        for scored in filter(None, (self.model, self.ref_model)):
            inner = base_model(self.accelerator.unwrap_model(scored))
            in_float32 = self.args.cast_lm_head_to_fp32
            apply_head_in_forward(inner, self._objective, logits_budget_mb, in_float32=in_float32)

    def _make_objective(self) -> Objective:
        args = self.args
        return TrlLoss(
            loss_type=args.loss_type,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            beta=self.beta,
            temperature=self.temperature,
            importance_sampling_level=args.importance_sampling_level,
            max_completion_length=self.max_completion_length,
            delta=args.delta,
            use_bias_correction_kl=args.use_bias_correction_kl,
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
            vespo_k_pos=args.vespo_k_pos,
            vespo_lambda_pos=args.vespo_lambda_pos,
            vespo_k_neg=args.vespo_k_neg,
            vespo_lambda_neg=args.vespo_lambda_neg,
            logit_softcap=getattr(self.model.config.get_text_config(), "final_logit_softcapping", None),
        ).objective()

    def _make_curriculum(self, curriculum: str | CurriculumTable) -> CurriculumTable | None:
        if curriculum == "uniform":
            return None
        if not isinstance(self.train_dataset, Dataset):
            kind = type(self.train_dataset).__name__
            raise ValueError(
                f'curriculum draws questions by index, but train_dataset is a {kind}; pass a Dataset or "uniform"'
            )
        num_questions = len(self.train_dataset)
        if curriculum == "gcs":
            return CurriculumTable(num_questions)
        if not isinstance(curriculum, CurriculumTable):
            raise ValueError(f'curriculum is {curriculum!r}; expected "gcs", "uniform" or a CurriculumTable')
        if curriculum.num_questions != num_questions:
            raise ValueError(
                f"curriculum has {curriculum.num_questions} questions, but train_dataset {num_questions}; "
                "make a table of as many"
            )
        return curriculum

    def _find_accuracy(self, name: str | None) -> int:
        names = self.reward_func_names
        if name is None and len(names) != 1:
            raise ValueError(
                f"there are {len(names)} reward functions; name the verifier's: accuracy_reward={names[0]!r}"
            )
        if name is not None and name not in names:
            raise ValueError(f"accuracy_reward is {name!r}; expected one of {', '.join(map(repr, names))}")
        return 0 if name is None else names.index(name)

    def _check_model(self) -> None:
        if self.is_fsdp_enabled:
            raise NotImplementedError("FSDP is not supported yet: it shards lm_head; use DDP or DeepSpeed")
        if self.aux_loss_enabled:
            raise NotImplementedError("the router's auxiliary loss is not supported; set router_aux_loss_coef=0.0")
        config = self.model.config.get_text_config()
        if scales := [name for name in _LOGIT_SCALES if getattr(config, name, None) not in (None, 1.0)]:
            raise NotImplementedError(f"the model's config has {scales[0]}: scaled logits are not supported yet")
        head = base_model(self.model).get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise NotImplementedError(
                f"lm_head is a {type(head).__module__}.{type(head).__name__}, of which the loss would read the weight "
                "alone; leave lm_head out of target_modules, modules_to_save and trainable_token_indices"
            )

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._questions = self.train_dataset if dataset is None else dataset
        return super()._get_train_sampler(dataset)

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args)  # of all ranks
        self._scores = rewards[:, self._accuracy_index]
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            made: dict[str, Any] = super()._generate_and_score_completions(inputs)
            return made
        # sampled here and not by a sampler, because data loaders prefetch batches before the table is updated
        question_ids = None
        if self.curriculum is not None:
            question_ids = self._draw_questions(self.curriculum)
            inputs = self._share_of(question_ids, len(inputs))
        made = super()._generate_and_score_completions(inputs)
        graded = self._scores[~self._scores.isnan()]  # NaN: the reward function returned None
        if graded.numel() > 0:
            if self._rho != "constant" or self.curriculum is not None:
                self._check_accuracies(graded)
                self._log_value("accuracy", graded.mean())
            self._beta_eff = akl_beta(graded, self.beta, rho=self._rho)
        self._log_value("beta_eff", self._beta_eff)
        if self.curriculum is not None and question_ids is not None:
            self._update_curriculum(self.curriculum, question_ids)
        return made

    def _check_accuracies(self, scores: Tensor) -> None:
        low, high = (float(value) for value in scores.aminmax())  # once per generation batch
        if low < 0.0 or high > 1.0:
            raise ValueError(
                f"reward function {self.reward_func_names[self._accuracy_index]!r} gave the score "
                f"{low if low < 0.0 else high:g}; expected accuracies in [0, 1]; name another function by "
                'accuracy_reward, or train without accuracies: rho="constant", curriculum="uniform"'
            )

    def _draw_questions(self, curriculum: CurriculumTable) -> Tensor:
        """Ids of the questions of one generation batch over all ranks; equal on every rank."""
        return curriculum.sample(self.args.generation_batch_size // self.num_generations, generator=self._generator)

    def _share_of(self, question_ids: Tensor, count: int) -> list[dict[str, Any]]:
        """This rank's contiguous share of the rollouts; those of a question are adjacent."""
        rollouts = question_ids.repeat_interleave(self.num_generations).tolist()
        first = self.accelerator.process_index * count
        return [self._questions[index] for index in rollouts[first : first + count]]

    def _update_curriculum(self, curriculum: CurriculumTable, question_ids: Tensor) -> None:
        pass_rates = self._scores.view(-1, self.num_generations).nanmean(dim=1).to(question_ids.device)
        is_graded = ~pass_rates.isnan()
        curriculum.update(question_ids[is_graded], pass_rates[is_graded])
        self._log_value("curriculum/effective_sample_size", curriculum.effective_sample_size)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if "pixel_values" in inputs:
            raise NotImplementedError("images in prompts are not supported yet; train with text alone")
        ids, attended = inputs["completion_ids"], inputs["completion_mask"]
        mask = attended * inputs["tool_mask"] if "tool_mask" in inputs else attended
        old_logps = inputs.get("old_per_token_logps")
        corrected = with_correction(
            self._objective, inputs["advantages"], inputs.get("importance_sampling_ratio"), old_logps, mask
        )

        def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
            made = linear_expo_loss(
                hidden[:, -ids.shape[1] - 1 : -1],  # the last position predicts nothing
                weight,
                ids,
                mask,
                bias=bias,
                logits_budget_mb=self._budget_mb,
                gradient_tolerance=self._gradient_tolerance,
                old_logps=old_logps,
                ref_logps=inputs.get("ref_per_token_logps"),
                beta=0.0 if self.beta == 0.0 else self._beta_eff,
                normalizer=self._normalizer(inputs, mask),
                return_entropy=True,
                **corrected,
            )
            return {"loss": made.loss, **made.metrics}

        with self.accelerator.autocast():
            output = model(
                input_ids=torch.cat([inputs["prompt_ids"], ids], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], attended], dim=1),
                expo_head=loss_of,
            )
        self._log_loss(output)
        loss: Tensor = output["loss"]
        return loss

    def _normalizer(self, inputs: dict[str, Any], mask: Tensor) -> Tensor | float:
        """The denominator over the accumulation window, as in TRL; gradients are averaged over ranks afterwards."""
        is_training = self.model.training
        steps = self.current_gradient_accumulation_steps if is_training else 1
        if self.args.loss_type in WINDOW_LOSS_TYPES:
            # tokens of the whole generation batch, which contains this window
            tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            return tokens * steps / self.args.steps_per_generation if is_training else tokens
        if self._objective.aggregation == "token":
            return mask.sum().clamp(min=1) * steps
        return float(mask.shape[0] * steps)

    def _log_loss(self, output: dict[str, Tensor]) -> None:
        names = ("kl", "entropy", "clip_low_fraction", "clip_high_fraction")
        sums = torch.stack([output[name] for name in names] + [torch.ones_like(output["tokens"])]) * output["tokens"]
        *sums, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        kl, entropy, clipped_low, clipped_high = (value / max(tokens, 1.0) for value in sums)
        if self.beta != 0.0:
            self._log_value("kl", kl)
        self._log_value("entropy", entropy)
        self._log_value("clip_ratio/low_mean", clipped_low)
        self._log_value("clip_ratio/high_mean", clipped_high)
        self._log_value("clip_ratio/region_mean", clipped_low + clipped_high)
        for name in ("ratio_max", "gradient_error_bound"):
            if name in output:
                self._log_value(name, self.accelerator.gather(output[name]).max())

    def _log_value(self, name: str, value: Tensor | float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(float(value))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.curriculum is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            partial = folder / f"{_STATE_FILE}.partial"
            state = {"table": self.curriculum.state_dict(), "generator": self._generator.get_state()}
            torch.save(state, partial)
            partial.replace(folder / _STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.curriculum is None or checkpoint is None:
            return
        path = Path(checkpoint) / _STATE_FILE
        if not path.exists():
            raise FileNotFoundError(
                f'{path} is missing; resume with the trainer that saved it, or curriculum="uniform"'
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.curriculum.load_state_dict(state["table"])
        self._generator.set_state(state["generator"])


def _check_config(args: GRPOConfig) -> None:
    check_loss_type(args.loss_type)
    for name, neutral in _REFUSED.items():
        if getattr(args, name) != neutral:
            raise ValueError(f"{name}={getattr(args, name)!r} would be ignored; leave it at {neutral!r}")
