"""What a run is: typed, frozen sections of one `RunConfig`; how they are read and explained, `command_line.py` says.

Defaults are the paper's (EXPO, arXiv 2605.09923 and 2605.11403, section 4.1); where the paper defers to the
DAPO-17K recipe (arXiv 2503.14476, section 4.1, and its published run script) the field says so. The embedded
demonstration overrides them in `recipes/ledger.yaml`. The text under each field is what `--help` prints.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from expo.runtime.cli import Invocation, Overrides, as_yaml, filled, parse, read_recipe
from expo_kernels import Objective
from expo_kernels.objective import READ_BY, RolloutCorrection

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = RECIPES / "ledger.yaml"

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


class RunSection(_Section):
    """The run as a whole: its folder, seed and length."""

    dir: Path | None = None
    """Folder of the run; left out: runs/<date>-<time>-seed<seed>, or with --resume the newest folder in runs/."""
    seed: Index = 0
    """Seed of everything random: question draws, sampled replies. The same seed gives the same run."""
    steps: Count = 2039
    """Rollout-and-update steps; 2,039 = 30 epochs (paper) of DAPO-17K's 17,398 questions at 256 a step."""
    reply_tokens: Count | None = None
    """Sampled reply tokens at which the run ends, with the step that reaches them, if run.steps have not ended it."""
    checkpoint_every: Index = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept; older ones are deleted, but for the best."""
    keep_best: bool = True
    """Keep also the checkpoint whose evaluation had the highest mean pass@1."""
    save_by_minutes: Positive | None = None
    """Minutes after its start at which the run saves and ends with exit code 0, to be resumed; left out: never."""
    max_bad_updates: Count = 3
    """Updates in a row with a loss or gradient that is not finite before the run stops; each is skipped and saved."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where metrics go besides metrics.jsonl; each needs its own package."""
    completions_per_step: Index = 64
    """Replies of each step written to completions.jsonl, whole groups first; the rest are only counted."""
    threads: Count | None = None
    """CPU threads of PyTorch; left out: one per core. Small models are faster alone on a core that others share."""
    device: str = "auto"
    """Torch device of the policy; auto: the first GPU, else the CPU."""


class ModelSection(_Section):
    """The policy's starting point, which is also the frozen reference policy (paper: the base model)."""

    path: str
    """Folder or hub id of a transformers causal language model with its tokenizer; "ledger": the embedded one."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of transformers; auto: its own choice."""


class DataSection(_Section):
    """Questions and how they become prompts."""

    train: str
    """JSON-lines or Parquet file or a folder of them, "owner/name[/configuration][:split][@revision]" on the Hugging
    Face hub, a set's name such as dapo-17k, "reasoning-gym:FAMILY?level=1&size=500&seed=0", or a built-in one such as
    "ledger:train" (docs/data.md)."""
    drop_overlap: Literal["none", "exact", "near"] = "none"
    """Leave out training questions that evaluation.sets hold: with the same text, or nearly so as well; none: only
    report them, so that what is trained on is the paper's set and does not depend on what is evaluated."""
    skip_bad_answers: bool = False
    """Leave out and count questions whose gold answer the verifier cannot parse; false: refuse their set."""
    prompt: Literal["plain", "boxed", "dapo"] = "dapo"
    """Template around a question: plain (the text alone), boxed (asks for \\boxed{}), dapo (asks for Answer:)."""
    chat_template: bool = True
    """Wrap the prompt as one user message in the tokenizer's chat template."""
    max_prompt_tokens: Count = 1024
    """Longer prompts of training are dropped and counted, evaluation sets that have any are refused (paper: 1,024)."""


class RolloutSection(_Section):
    """How replies are sampled."""

    engine: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    """transformers: on the policy's own weights; vllm: on a copy, in the same process; vllm-server: in others."""
    group_size: int = Field(8, ge=2)
    """G, replies per question (paper: 8); at least 2, since one reply alone has no advantage."""
    questions_per_step: Count = 256
    """Questions that a step learns from (paper: 256)."""
    max_resamples: Index = 0
    """Rounds of a step in which groups whose rewards are all equal give way to further questions (DAPO's dynamic
    sampling; verl's recipe: up to 10 batches). Accuracy, KL coefficient and pass rates count every group sampled."""
    temperature: Positive = 1.0
    """Sampling temperature (DAPO recipe: 1.0); policy, old and reference log-probs are taken at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """1 alone (DAPO recipe: 1): replies come from the whole distribution."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """null, 0 or -1 alone: none."""
    max_new_tokens: Count = 3072
    """Longest reply in tokens (paper: 3,072); a reply cut there is counted as truncated and graded as it stands."""
    batch_size: Count = 256
    """Replies generated at once; memory grows with it, results depend on it by rounding at most, in float32 on a CPU
    not at all (tested)."""
    keep_replies: bool = True
    """Keep replies in rollouts/ of the run's folder, 12 bytes a token and their text, until the next checkpoint: a run
    that died after sampling takes them up with --resume in place of sampling again."""
    sync_tolerance: Positive | None = None
    """Largest |policy - engine| log-prob of the probe after a weight sync, nats; left out: by dtype, see
    expo/rollout/weight_sync.py."""

    @field_validator("top_p", "top_k")
    @classmethod
    def _whole_distribution(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value not in {"top_p": (1.0,), "top_k": (None, 0, -1)}[str(info.field_name)]:
            raise ValueError(
                "it samples from a part of the distribution, over which log-probs would be taken anew and bias every "
                "ratio; leave it out, or lower rollout.temperature, which the trainer's log-probs follow"
            )
        return value


class VllmSection(_Section):
    """What rollout.engine = vllm takes, on each rank's device, and vllm-server; batch_size is max_num_seqs of each."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the GPU's memory for vLLM's weights, cache and work; the trainer needs the rest."""
    cache_gib: Positive | None = None
    """Memory of the key-value cache in GiB; left out: on a GPU what the share above leaves, on a CPU 1."""
    enforce_eager: bool = False
    """Neither compile nor capture CUDA graphs: slower to sample, faster to start; always so on a CPU."""
    tensor_parallel: Count = 1
    """Ranks that share one engine's weights (paper: 2); with vllm-server, GPUs of each server."""
    sleep: bool = False
    """With vllm on a GPU: give back weights and cache while the policy learns; the weights are brought again."""
    servers: list[str] = []
    """With vllm-server: [http://host:port, ...] started by `python -m expo.serve`; left out: the run starts its own."""
    num_servers: Count = 1
    """With vllm-server: how many the run starts, beside rank 0; the ranks are spread over them."""
    gpus: list[Index] = []
    """With vllm-server: CUDA devices of the servers that the run starts, tensor_parallel for each."""
    transfer: Literal["files", "broadcast"] = "files"
    """With vllm-server, how weights go there: through files, or straight, by NCCL between GPUs or gloo between CPUs."""
    weights_folder: Path | None = None
    """With transfer = files: folder that weights go through, seen by all servers; left out: /dev/shm."""
    patience_s: Positive = 600
    """Seconds that a server may be away before the run ends; a start, or a restart, must fit in."""


class RewardSection(_Section):
    """The verifier, math-verify in worker processes with a deadline; and what shapes the reward beside its verdict."""

    workers: Count = 2
    """Worker processes; started at the first answer that needs computer algebra."""
    timeout_s: Positive = 5.0
    """Seconds per answer; then the worker is killed and the verdict is `timeout` (reward 0, counted apart)."""
    correct_weight: NonNegative = 1.0
    """Weight of the verdict (1 for a correct reply, else 0) in the reward behind the advantages."""
    functions: dict[str, float] = {}
    """Reward functions and their weights, as {"package.module:function": weight}; expo/rewards/compose.py says how they
    are called. Built in: expo.formats:boxed, expo.formats:think_then_answer."""
    overlong_buffer: Index = 0
    """Tokens before rollout.max_new_tokens over which a penalty grows from 0 to 1 (DAPO eq. 13; its recipe: 4,096 of
    20,480); 0: none."""
    overlong_penalty: Positive = 1.0
    """Weight of that penalty (DAPO recipe: 1)."""


class CurriculumSection(_Section):
    """Which questions come next (paper eq. 6, 7)."""

    kind: Literal["gcs", "uniform"] = "gcs"
    """gcs: Gaussian curriculum sampling; uniform: every question alike (GRPO)."""
    mean: Fraction = 0.5
    """mu, the pass rate that is drawn most (paper: 0.5)."""
    std: Positive = 0.35
    """sigma, width of the Gaussian in pass rate (paper: 0.35)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """alpha, weight of the old pass rate in the moving average (paper: 0.9)."""
    initial_pass_rate: Fraction = 0.5
    """Pass rate of a question before its first visit (paper: 0.5)."""
    estimate: Literal["ema", "counted"] = "ema"
    """ema: the paper's moving average; counted: a running mean until 1/(1 - momentum) visits, then that average."""


class KLSection(_Section):
    """The penalty that keeps the policy near its reference (paper eq. 3, 4, 8)."""

    beta: NonNegative = 0.02
    """KL coefficient before scaling (paper: 0.02); 0: no reference model is held at all."""
    rho: Literal["tanh", "constant"] = "tanh"
    """tanh: beta * (tanh(accuracy) + 1) / 2, EXPO's accuracy-conditioned KL; constant: beta itself (GRPO)."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimator (paper: k3)."""


class ObjectiveSection(_Section):
    """The surrogate (paper eq. 2), with the DAPO recipe's constants; docs/losses.md names what the choices give."""

    surrogate: Literal["clip", "cispo", "sapo", "gmpo", "vespo"] = "clip"
    """What an action gains (paper: clip)."""
    clip_low: Fraction = 0.2
    """Lower clip: the ratio's gain ends at 1 - clip_low (DAPO recipe: 0.2)."""
    clip_high: NonNegative = 0.28
    """Upper clip: the ratio's gain ends at 1 + clip_high (DAPO recipe: 0.28)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 10.0
    """With a negative advantage the loss is capped at dual_clip * |A| (DAPO recipe: 10); null: no cap."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio per token (GRPO) or per sequence (GSPO)."""
    aggregation: Literal["token", "sequence", "sum", "constant"] = "token"
    """Mean over all tokens of an update (DAPO recipe), over sequences of means or sums, or by the longest reply."""
    rollout_correction: RolloutCorrection | None = None
    """Weigh the surrogate by w = exp(old - rollout log-prob), against what the rollout engine's numerics do: per token,
    or one w of the whole reply; w is cut at rollout_cap (truncated importance sampling), or with token_mask (IcePop)
    and sequence_mask is 0 outside rollout_floor to rollout_cap; null: not at all."""
    rollout_floor: NonNegative = 0.0
    """Lower bound of that w (IcePop: 0.5)."""
    rollout_cap: Positive = 2.0
    """Upper bound of that w (verl's and TRL's default: 2; IcePop: 5)."""
    entropy_bonus: NonNegative = 0.0
    """Loss taken off per nat of entropy (paper: none)."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Advantages divided by the group's population std (paper eq. 1), the batch's, or nothing."""
    mask_truncated: bool = False
    """Replies cut at rollout.max_new_tokens give no loss and count in none of its means (DAPO's overlong filtering);
    they are graded and count in advantages, accuracy and pass rates all the same."""


class PolicySection(_Section):
    """The model under training, by DeepSpeed."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the transformer's products; parameters, AdamW's moments, logits and log-probs are float32 in either."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ZeRO splits over the ranks; 0: nothing, 1: optimizer states, 2: gradients too, 3: parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory; needs zero_stage >= 1."""
    offload_parameters: bool = False
    """Keep parameters in CPU memory between uses; needs zero_stage = 3."""
    offload_reference: bool = False
    """Keep the reference policy in CPU memory between uses."""
    micro_batch_tokens: Count = 16384
    """Tokens (prompt, reply and padding) in one forward-backward pass; memory grows with it, the loss does not."""
    packing: bool = False
    """Lay the sequences of a micro-batch end to end, without padding; worth it with flash or flex attention."""
    updates_per_step: Count = 4
    """Optimizer steps per batch of rollouts; 4 = 2,048 replies in mini-batches of 512 (DAPO recipe)."""
    old_logps: Literal["recompute", "rollout"] = "recompute"
    """Log-probs of the policy that sampled: computed again by the trainer, or as the rollout engine gave them."""
    logits_budget_mb: Positive | None = None
    """Memory for one chunk of logits in MiB; left out: chosen by expo_kernels."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lora_rank: Index = 0
    """Rank of LoRA adapters on every linear layer but the head; 0: all parameters are trained."""
    lora_alpha: Count = 32
    """LoRA's scale: adapters act with lora_alpha / lora_rank."""


class DeadlineSection(_Section):
    """Seconds that a phase may take before the run is taken to hang: its stacks are dumped and the run ends."""

    start: Positive = 1800
    """Joining the other ranks, loading the model."""
    rollout: Positive = 7200
    """Sampling one step's replies."""
    reward: Positive = 1800
    """Grading one step's replies."""
    reference: Positive = 3600
    """Old and reference log-probs of one step."""
    update: Positive = 7200
    """The optimizer steps of one step."""
    sync: Positive = 1800
    """Bringing the policy's weights to the rollout engine."""
    evaluation: Positive = 14400
    """One evaluation of all sets within a run; of expo.evaluate, the replies that are written down together, or a
    portion of the answers that are compared for maj@n."""
    save: Positive = 1800
    """Writing or reading one checkpoint, exporting the model."""


class OptimizerSection(_Section):
    """AdamW."""

    lr: NonNegative = 1e-6
    """Learning rate after warm-up (DAPO recipe: 1e-6)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay on matrices; norms and biases have none (DAPO recipe: 0.1)."""
    warmup_steps: Index = 10
    """Steps over which the learning rate rises linearly from 0 (DAPO recipe: 10)."""
    schedule: Literal["constant", "linear"] = "constant"
    """After warm-up: constant (DAPO recipe), or linear to 0 at the last step."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm (DAPO recipe: 1.0)."""


class EvaluationSection(_Section):
    """Pass@k on questions that are not trained on, before, during and after the run."""

    sets: dict[str, str] = {}
    """Name to source of questions (as data.train); evaluated before the first and after the last step."""
    num_samples: Count = 64
    """n, replies per question; pass@k is reported for 1, 8 and 32 where k < n, or k = n = 1."""
    temperature: NonNegative = 1.0
    """Sampling temperature of evaluations; 0: always the likeliest token, then num_samples is 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluations draw from the likeliest tokens that together have this probability; 1: from all, as training does."""
    every: Index = 0
    """Steps between evaluations during the run; 0: only before and after."""

    @model_validator(mode="after")
    def _samples_differ(self) -> "EvaluationSection":
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"evaluation.num_samples = {self.num_samples} replies at evaluation.temperature = 0 would all be the "
                f"same one; take 1, or a temperature above 0"
            )
        return self


class RunConfig(_Section):
    """Everything a run depends on; saved with it as config.yaml."""

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
    def _batch_arithmetic(self) -> "RunConfig":
        replies = self.rollout.questions_per_step * self.rollout.group_size
        if replies % self.policy.updates_per_step:
            raise ValueError(
                f"rollout.questions_per_step * rollout.group_size = {replies} replies do not split into "
                f"policy.updates_per_step = {self.policy.updates_per_step} equal mini-batches; change one of the three"
            )
        longest = self.max_tokens
        if self.policy.micro_batch_tokens < longest:
            raise ValueError(
                f"policy.micro_batch_tokens = {self.policy.micro_batch_tokens} cannot hold one sequence of "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}; raise it to {longest} or shorten those"
            )
        self._partitioning()
        self._rewards()
        self._servers()
        if self.optimizer.schedule == "linear" and self.optimizer.warmup_steps >= self.run.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves nothing of run.steps = "
                f"{self.run.steps} for the linear schedule; lower it below {self.run.steps}"
            )
        if self.objective.rollout_correction and self.policy.old_logps == "rollout":
            raise ValueError(
                f"objective.rollout_correction = {self.objective.rollout_correction} would weigh every token by 1: "
                f"policy.old_logps = rollout makes old and rollout log-probs the same; leave one of the two out"
            )
        self.loss_objective()
        return self

    def _rewards(self) -> None:
        reward, longest = self.reward, self.rollout.max_new_tokens
        if reward.overlong_buffer >= longest:
            raise ValueError(
                f"reward.overlong_buffer = {reward.overlong_buffer} leaves no reply without a penalty; lower it below "
                f"rollout.max_new_tokens = {longest}"
            )
        taken = {"overlong"}
        for name in reward.functions:
            module, _, function = name.partition(":")
            if not (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
                raise ValueError(f"reward.functions names {name!r}; expected package.module:function")
            if function in taken:
                raise ValueError(
                    f"reward.functions: {name} would be logged as reward/{function}, as another is; rename one"
                )
            taken.add(function)
        if not reward.correct_weight and not any(reward.functions.values()) and not reward.overlong_buffer:
            raise ValueError("reward.correct_weight = 0 leaves no reward at all; raise it or give reward.functions")

    def _partitioning(self) -> None:
        policy = self.policy
        if policy.offload_optimizer and policy.zero_stage == 0:
            raise ValueError("policy.offload_optimizer needs policy.zero_stage >= 1; raise the stage or turn it off")
        if policy.offload_parameters and policy.zero_stage != 3:
            raise ValueError(
                f"policy.offload_parameters needs policy.zero_stage = 3, not {policy.zero_stage}; change one of the two"
            )

    def _servers(self) -> None:
        """An option that would be ignored is an error."""
        section, engine = self.vllm, self.rollout.engine
        if section.sleep and engine != "vllm":
            raise ValueError(f"vllm.sleep is for rollout.engine = vllm, not {engine}; turn it off or take that engine")
        for name in ("servers", "gpus", "weights_folder"):
            if getattr(section, name) and engine != "vllm-server":
                raise ValueError(f"vllm.{name} is for rollout.engine = vllm-server, not {engine}; leave it out")
        if section.transfer != "files" and engine != "vllm-server":
            raise ValueError(
                f"vllm.transfer = {section.transfer} is for rollout.engine = vllm-server, not {engine}; leave it out"
            )
        if section.transfer != "files" and section.weights_folder:
            raise ValueError(
                f"vllm.weights_folder is for vllm.transfer = files, not {section.transfer}; leave out either"
            )
        wrong = [url for url in section.servers if not re.fullmatch(r"http://[^/\s]+:\d+", url)]
        if wrong:
            raise ValueError(f"vllm.servers has {wrong[0]!r}; expected http://host:port")
        wanted = section.num_servers * section.tensor_parallel
        if section.gpus and not section.servers and len(section.gpus) != wanted:
            raise ValueError(
                f"vllm.gpus names {len(section.gpus)} devices, but vllm.num_servers * vllm.tensor_parallel = {wanted} "
                f"are wanted; change one of the three"
            )

    @property
    def max_tokens(self) -> int:
        """The longest prompt and its longest reply."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    def loss_objective(self) -> Objective:
        """The static choices of the policy loss, as expo_kernels takes them."""
        section, defaults = self.objective, ObjectiveSection()
        given = {name: getattr(section, name) for name in ("clip_low", "clip_high", "dual_clip", "ratio")}
        # the section's defaults are for clip; what was set though the surrogate does not read it, Objective refuses
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

    @property
    def settings(self) -> dict[str, Any]:
        """Every field by its dotted name, as it is saved."""
        return {
            f"{section}.{field}": value
            for section, fields in self.model_dump(mode="json").items()
            for field, value in fields.items()
        }

    def to_yaml(self) -> str:
        """The resolved configuration; reading it back gives an equal one."""
        return as_yaml(self)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which of the settings `now` were others before, as "run.seed (0 -> 1)"."""
    return [f"{name} ({before.get(name)} -> {value})" for name, value in now.items() if before.get(name) != value]


def load_config(path: Path | None, overrides: Overrides = ()) -> RunConfig:
    """The configuration in a YAML file (None: the embedded default) with dotted overrides applied.

    A file may name another one beside it, `base: other.yaml`, whose fields hold where it gives none itself.

    Raises: ConfigError if the file cannot be read, a key is unknown, a value has the wrong type or range, or the
        values do not fit together.
    """
    source = path or DEFAULT_RECIPE
    return filled(RunConfig, read_recipe(source), overrides, f"{source.name}: " if path else "")


def parse_command_line(argv: Sequence[str], prog: str = "python -m expo.train") -> Invocation[RunConfig]:
    """The run that a command line asks for.

    Exits: 0 after --help or --print-config; 2 with one line on stderr if the command line or config is wrong.
    """
    return parse(RunConfig, load_config, argv, prog)
