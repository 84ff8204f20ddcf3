"""EvalConfig: the configuration of `python -m expo.evaluate`."""

from collections import defaultdict
from typing import Any

from pydantic import model_validator

from expo.config.algorithm import RewardSection
from expo.config.general import DataSection, DeadlineSection, ModelSection, RunSection
from expo.config.policy import PolicySection
from expo.config.run import RunConfig
from expo.config.sampling import EvaluationSection, RolloutSection, VllmSection
from expo.config.section import Config

EVALUATION_FIELDS = (
    "evaluation.num_samples",
    "evaluation.temperature",
    "evaluation.top_p",
    "rollout.max_new_tokens",
    "rollout.engine",
    "data.prompt",
    "run.seed",
    "run.dir",
    "model.attention",
    "model.revision",
    "model.trust_remote_code",
    "data.template",
    "data.chat_template",
    "data.system",
    "data.chat_template_kwargs",
    "data.max_prompt_tokens",
    "data.columns",
    "data.skip_bad_answers",
    "rollout.stop_tokens",
    "rollout.batch_size",
    "rollout.sync_tolerance",
    "vllm.gpu_memory_utilization",
    "vllm.cache_gib",
    "vllm.enforce_eager",
    "vllm.tensor_parallel",
    "reward.verifier",
    "reward.unevaluated",
    "reward.think_tags",
    "reward.workers",
    "reward.timeout_s",
    "policy.dtype",
    "run.threads",
    "run.device",
    "deadline.start",
    "deadline.evaluation",
)
"""The fields that an evaluation reads and that can be set for it, in the order of --help-all."""
RUN_FIELDS = (
    "model.path",
    "evaluation.sets",
    "policy.zero_stage",
    "policy.lora_rank",
    "policy.lora_alpha",
    "policy.logits_budget_mb",
)
"""The fields that an evaluation of a run takes from the run alone: its sets, and the format of its checkpoints."""


class EvaluationDataSection(DataSection):
    """How questions become prompts."""

    train: str = ""
    """Not read: the questions of an evaluation are those of evaluation.sets."""


class EvalConfig(Config):
    """What an evaluation reads; the fields of its sections that EVALUATION_FIELDS and RUN_FIELDS do not name keep their
    defaults.
    """

    run: RunSection = RunSection()
    model: ModelSection
    data: EvaluationDataSection = EvaluationDataSection()
    rollout: RolloutSection = RolloutSection()
    vllm: VllmSection = VllmSection()
    reward: RewardSection = RewardSection()
    policy: PolicySection = PolicySection()
    evaluation: EvaluationSection = EvaluationSection()
    deadline: DeadlineSection = DeadlineSection()

    @model_validator(mode="after")
    def _engine_needs_no_servers(self) -> "EvalConfig":
        if self.rollout.engine == "vllm-server":
            raise ValueError(
                "rollout.engine = vllm-server is for training; give --engine=vllm or --engine=transformers"
            )
        return self

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence: the longest prompt with the longest reply."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens


def evaluation_values(run: RunConfig) -> dict[str, dict[str, Any]]:
    """The fields of a run's configuration that an evaluation of the run reads, by section."""
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    for name in (*EVALUATION_FIELDS, *RUN_FIELDS):
        section, field = name.split(".")
        values[section][field] = getattr(getattr(run, section), field)
    return dict(values)
