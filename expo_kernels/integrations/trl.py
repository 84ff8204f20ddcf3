"""`ExpoGRPOTrainer`: TRL's GRPOTrainer with this library's linear loss, AKL and Gaussian curriculum sampling.

    from expo_kernels.integrations.trl import ExpoGRPOTrainer  # in place of trl.GRPOTrainer

Generation, rewards, advantages and logging are TRL's; the loss is in `_trl_linear.py`. Source: TRL 1.16; FG-ExPO (arXiv
2605.11403) eq. 4 to 8 and algorithm 1.

Letters: B sequences, T completion positions, V vocabulary.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expo_kernels import _validate as validate
from expo_kernels.advantages import akl_beta
from expo_kernels.curriculum import CurriculumTable
from expo_kernels.integrations import _host

_host.check_version("trl", at_least=(1, 16), below=(1, 17))

# imported after the check of the version
from datasets import Dataset, IterableDataset  # noqa: E402
from trl import GRPOConfig  # noqa: E402

from expo_kernels.integrations._trl_linear import LinearGRPOTrainer  # noqa: E402

_STATE_FILE = "expo_curriculum.pt"
_WITHOUT_ACCURACIES = 'train without accuracies: rho="constant", curriculum="uniform"'


class ExpoGRPOTrainer(LinearGRPOTrainer):
    """TRL's GRPOTrainer with EXPO: batch accuracy scales the KL weight, and pass rates determine sampling.

    With rho="constant" and curriculum="uniform" it is GRPO and gives TRL's own numbers, without [B, T, V] logits. It
    logs TRL's metrics, except for the minimum and maximum of clip ratios over sequences, and adds `accuracy`,
    `beta_eff`, `ratio_max` and `curriculum/effective_sample_size`. Clip ratios are always shares of tokens.

    rho and the curriculum read accuracies: the scores of one reward function, in [0, 1], or None for a reply that was
    not scored. With rho="constant" and curriculum="uniform" nothing reads them: any rewards may be given, and no
    `accuracy` is logged.

    Args:
        model: as GRPOTrainer.
        reward_funcs: as GRPOTrainer.
        args: as GRPOTrainer; `loss_type` is one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo.
        train_dataset: as GRPOTrainer; a curriculum draws from a Dataset.
        positional: as GRPOTrainer.
        rho: how the batch's accuracy scales beta, as in `akl_beta`.
        curriculum: "gcs": a `CurriculumTable` with the paper's settings samples the questions; "uniform": TRL's order;
            or a table for the questions of `train_dataset`. The trainer's checkpoints contain the table.
        accuracy_reward: name of the reward function whose scores, in [0, 1], are the accuracy; it may have the reward
            weight 0. None: there is only one, or nothing reads accuracies.
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
        train_dataset: Any = None,
        *positional: Any,
        rho: Literal["tanh", "constant"] | Callable[[Tensor], Tensor] = "tanh",
        curriculum: Literal["gcs", "uniform"] | CurriculumTable = "gcs",
        accuracy_reward: str | None = None,
        logits_budget_mb: float | None = None,
        gradient_tolerance: float = 0.0,
        **options: Any,
    ) -> None:
        # before a model loads
        validate.callable_or_choice("rho", rho, ("tanh", "constant"))
        _check_questions(curriculum, train_dataset, owned_by_environment=bool(options.get("environment_factory")))
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            *positional,
            logits_budget_mb=logits_budget_mb,
            gradient_tolerance=gradient_tolerance,
            **options,
        )
        if self.beta == 0.0 and rho != "constant":
            warnings.warn(
                "beta is 0.0, GRPOConfig's default: without a KL penalty, rho has nothing to scale. Set beta (FG-ExPO "
                'uses 0.02), or rho="constant"',
                stacklevel=2,
            )
        self._rho = rho
        self._accuracy_index = self._find_accuracy(
            accuracy_reward, is_read=rho != "constant" or curriculum != "uniform"
        )
        self.curriculum = self._make_curriculum(curriculum)
        self._generator = torch.Generator(self.curriculum.pass_rates.device if self.curriculum else "cpu")
        self._generator.manual_seed(self.args.seed)
        self._beta_eff = torch.tensor(float(self.beta), device=self.accelerator.device)
        self._scores = torch.empty(0)

    def _find_accuracy(self, name: str | None, *, is_read: bool) -> int | None:
        """Index of the reward function that gives the accuracy; None: nothing reads accuracies."""
        names = self.reward_func_names
        if not is_read:
            if name is not None:
                raise ValueError(f'accuracy_reward={name!r} has no effect with rho="constant", curriculum="uniform"')
            return None
        if name is None and len(names) != 1:
            raise ValueError(
                f"there are {len(names)} reward functions: name the one whose scores are the accuracy, such as "
                f"accuracy_reward={names[0]!r}, or {_WITHOUT_ACCURACIES}"
            )
        name = names[0] if name is None else name
        if names.count(name) != 1:
            found = "several reward functions have" if name in names else "no reward function has"
            raise ValueError(f"accuracy_reward={name!r}: {found} that name; they are {', '.join(map(repr, names))}")
        index: int = names.index(name)
        if isinstance(self.reward_funcs[index], nn.Module):
            raise ValueError(
                f"the scores of the reward model {name!r} are logits, not accuracies in [0, 1]: name a reward function "
                f"by accuracy_reward (its reward weight may be 0), or {_WITHOUT_ACCURACIES}"
            )
        return index

    def _make_curriculum(self, curriculum: str | CurriculumTable) -> CurriculumTable | None:
        if curriculum == "uniform":
            return None
        table = CurriculumTable(len(self.train_dataset)) if isinstance(curriculum, str) else curriculum
        if self._questions_per_batch > table.num_questions:
            raise ValueError(
                f"a generation batch draws {self._questions_per_batch} questions, but train_dataset has "
                f'{table.num_questions}: reduce generation_batch_size, or pass curriculum="uniform"'
            )
        return table

    @property
    def _questions_per_batch(self) -> int:
        """Questions of one generation batch over all ranks."""
        return int(self.args.generation_batch_size // self.num_generations)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._questions = self.train_dataset if dataset is None else dataset
        return super()._get_train_sampler(dataset)

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args)  # of all ranks
        if self._accuracy_index is not None:
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
                f"{low if low < 0.0 else high:g}, but rho and the curriculum read accuracies in [0, 1]: give them by "
                f"another reward function (accuracy_reward; its reward weight may be 0), or {_WITHOUT_ACCURACIES}"
            )

    def _draw_questions(self, curriculum: CurriculumTable) -> Tensor:
        """Ids of the questions of one generation batch over all ranks; equal on every rank."""
        return curriculum.sample(self._questions_per_batch, generator=self._generator)

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

    def _penalty_weight(self) -> Tensor:
        return self._beta_eff

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


def _check_questions(curriculum: Any, train_dataset: Any, *, owned_by_environment: bool) -> None:
    """Refuse, before a model loads, a curriculum that is none, or that cannot draw from the data set."""
    if isinstance(curriculum, str) and curriculum == "uniform":
        return
    if curriculum != "gcs" and not isinstance(curriculum, CurriculumTable):
        raise ValueError(f'curriculum is {curriculum!r}; expected "gcs", "uniform" or a CurriculumTable')
    if isinstance(train_dataset, IterableDataset):
        raise ValueError(
            "train_dataset is an IterableDataset, but the curriculum draws questions by index: pass a Dataset, or "
            'curriculum="uniform"'
        )
    if train_dataset is None and owned_by_environment:
        raise ValueError(
            "the environment makes the questions, but the curriculum draws them from a train_dataset: pass a Dataset, "
            'or curriculum="uniform"'
        )
    if isinstance(curriculum, CurriculumTable) and isinstance(train_dataset, Dataset):
        num_questions = len(train_dataset)
        if curriculum.num_questions != num_questions:
            raise ValueError(
                f"curriculum has {curriculum.num_questions} questions, but train_dataset {num_questions}; "
                "make a table of as many"
            )
