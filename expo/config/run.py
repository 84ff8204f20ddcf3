"""RunConfig: the configuration of a training run, and the combinations of settings that it refuses."""

import re

from pydantic import model_validator

from expo.config.algorithm import CurriculumSection, KLSection, ObjectiveSection, RewardSection
from expo.config.general import DataSection, DeadlineSection, ModelSection, RunSection
from expo.config.policy import OptimizerSection, PolicySection
from expo.config.sampling import VLLM_LORA_RANKS, EvaluationSection, RolloutSection, VllmSection
from expo.config.section import Config
from expo_kernels import Objective
from expo_kernels.objective import READ_BY

MOST_PORT = 65535
ADDRESS = re.compile(r"http://([A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")


class RunConfig(Config):
    """Everything that a training run depends on; the run saves it as config.yaml."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    rollout: RolloutSection = RolloutSection()
    vllm: VllmSection = VllmSection()
    reward: RewardSection = RewardSection()
    curriculum: CurriculumSection = CurriculumSection()
    kl: KLSection = KLSection()
    objective: ObjectiveSection = ObjectiveSection()
    policy: PolicySection = PolicySection()
    optimizer: OptimizerSection = OptimizerSection()
    evaluation: EvaluationSection = EvaluationSection()
    deadline: DeadlineSection = DeadlineSection()

    @model_validator(mode="after")
    def _combinations(self) -> "RunConfig":
        """Refuses settings that do not go together, before any model loads."""
        self._check_batch_sizes()
        self._check_zero()
        self._check_rewards()
        self._check_vllm()
        self._check_lora()
        self._check_ahead()
        if self.optimizer.schedule == "linear" and self.optimizer.warmup_steps >= self.run.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves no step of run.steps = "
                f"{self.run.steps} for the linear schedule; lower it below {self.run.steps}"
            )
        if self.objective.rollout_correction and self.policy.old_logps == "rollout":
            raise ValueError(
                f"objective.rollout_correction = {self.objective.rollout_correction} would weigh every token by 1: "
                f"policy.old_logps = rollout makes old and rollout log-probs the same; set only one of the two"
            )
        self.loss_objective()
        return self

    def _check_batch_sizes(self) -> None:
        replies = self.rollout.questions_per_step * self.rollout.group_size
        if replies % self.policy.updates_per_step:
            raise ValueError(
                f"rollout.questions_per_step * rollout.group_size = {replies} replies do not split into "
                f"policy.updates_per_step = {self.policy.updates_per_step} equal mini-batches; change one of the three"
            )
        if self.policy.micro_batch_tokens < self.max_tokens:
            raise ValueError(
                f"policy.micro_batch_tokens = {self.policy.micro_batch_tokens} cannot hold one sequence of "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {self.max_tokens}; raise it to {self.max_tokens} "
                f"or lower those"
            )

    def _check_zero(self) -> None:
        policy = self.policy
        if policy.offload_optimizer and policy.zero_stage == 0:
            raise ValueError("policy.offload_optimizer needs policy.zero_stage >= 1; raise the stage or turn it off")
        if policy.offload_parameters and policy.zero_stage != 3:
            raise ValueError(
                f"policy.offload_parameters needs policy.zero_stage = 3, not {policy.zero_stage}; change one of the two"
            )

    def _check_rewards(self) -> None:
        reward, longest = self.reward, self.rollout.max_new_tokens
        if reward.overlong_buffer >= longest:
            raise ValueError(
                f"reward.overlong_buffer = {reward.overlong_buffer} leaves no reply without a penalty; lower it below "
                f"rollout.max_new_tokens = {longest}"
            )
        logged = {"overlong"}  # names under reward/ in the metrics
        for name in reward.functions:
            module, _, function = name.partition(":")
            if not (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
                raise ValueError(f"reward.functions names {name!r}; expected package.module:function")
            if function in logged:
                raise ValueError(
                    f"reward.functions: {name} would be logged as reward/{function}, as another is; rename one"
                )
            logged.add(function)
        if not reward.correct_weight and not any(reward.functions.values()) and not reward.overlong_buffer:
            raise ValueError("reward.correct_weight = 0 leaves no reward at all; raise it or set reward.functions")

    def _check_vllm(self) -> None:
        """Refuses options that the engine would ignore."""
        section, engine = self.vllm, self.rollout.engine
        if section.sleep and engine != "vllm":
            raise ValueError(f"vllm.sleep is for rollout.engine = vllm, not {engine}; turn it off or take that engine")
        for name in ("servers", "key_file", "gpus", "weights_folder"):
            if getattr(section, name) and engine != "vllm-server":
                raise ValueError(f"vllm.{name} is for rollout.engine = vllm-server, not {engine}; remove it")
        if section.transfer != "files" and engine != "vllm-server":
            raise ValueError(
                f"vllm.transfer = {section.transfer} is for rollout.engine = vllm-server, not {engine}; remove it"
            )
        if section.transfer != "files" and section.weights_folder:
            raise ValueError(
                f"vllm.weights_folder is for vllm.transfer = files, not {section.transfer}; remove one of the two"
            )
        wrong = [url for url in section.servers if not _is_address(url)]
        if wrong:
            raise ValueError(f"vllm.servers has {wrong[0][:80]!r}; expected http://host:port, the key in vllm.key_file")
        needed = section.num_servers * section.tensor_parallel
        if section.gpus and not section.servers and len(section.gpus) != needed:
            raise ValueError(
                f"vllm.gpus names {len(section.gpus)} devices, but vllm.num_servers * vllm.tensor_parallel = {needed} "
                f"are needed; change one of the three"
            )

    def _check_lora(self) -> None:
        """Refuses what vLLM's LoRA cannot do."""
        engine, rank = self.rollout.engine, self.policy.lora_rank
        if self.vllm.lora == "merged":
            return
        if not engine.startswith("vllm"):
            raise ValueError(
                f"vllm.lora = adapter is for rollout.engine = vllm or vllm-server, not {engine}; remove it"
            )
        if rank == 0:
            raise ValueError(
                "vllm.lora = adapter needs adapters, but policy.lora_rank = 0 trains all weights; set policy.lora_rank "
                "to 1 or more, or take vllm.lora = merged"
            )
        if rank > VLLM_LORA_RANKS[-1]:
            raise ValueError(
                f"vllm.lora = adapter needs policy.lora_rank <= {VLLM_LORA_RANKS[-1]}, the largest rank of vLLM's "
                f"LoRA, not {rank}; lower it, or take vllm.lora = merged"
            )
        if self.vllm.sleep:
            raise ValueError(
                "vllm.sleep discards the weights, but vllm.lora = adapter sends the base weights only once; turn it "
                "off, or take vllm.lora = merged"
            )

    def _check_ahead(self) -> None:
        ahead, engine = self.rollout.ahead, self.rollout.engine
        if ahead and engine != "vllm-server":
            raise ValueError(
                f"rollout.ahead = {ahead} needs rollout.engine = vllm-server, which samples in processes of its own, "
                f"not {engine}; take that engine, or set rollout.ahead to 0"
            )
        if ahead and not self.objective.rollout_correction and self.policy.old_logps != "rollout":
            raise ValueError(
                f"rollout.ahead = {ahead} trains on replies of earlier weights, for which nothing "
                f"corrects; set objective.rollout_correction = token, or policy.old_logps = rollout"
            )

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence: the longest prompt with the longest reply."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    def loss_objective(self) -> Objective:
        """The options of the policy loss that stay the same in all steps."""
        section, defaults = self.objective, ObjectiveSection()
        # The section's defaults belong to `clip`: another surrogate gets only what it reads, and what was set on
        # purpose, which Objective refuses if it has no effect.
        given = {name: getattr(section, name) for name in ("clip_low", "clip_high", "dual_clip", "ratio")}
        read = {
            name: value
            for name, value in given.items()
            if section.surrogate in READ_BY[name] or value != getattr(defaults, name)
        }
        return Objective(
            surrogate=section.surrogate,
            aggregation=section.aggregation,
            rollout_correction=section.rollout_correction,
            rollout_floor=section.rollout_floor,
            rollout_cap=section.rollout_cap,
            kl=self.kl.estimator,
            temperature=self.rollout.temperature,
            max_completion_length=(self.rollout.max_new_tokens if section.aggregation == "constant" else None),
            **read,
        )


def _is_address(url: str) -> bool:
    found = ADDRESS.fullmatch(url)
    return found is not None and 0 < int(found[2]) <= MOST_PORT
