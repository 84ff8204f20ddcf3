"""General sections: the run's folder and length, the model, the questions, and the deadlines."""

from pathlib import Path
from typing import Literal

from expo.config.section import Count, Index, Positive, Section


class RunSection(Section):
    """The run: its folder, seed, length, checkpoints and logs."""

    dir: Path | None = None
    """Folder of the run. If unset: runs/<date>-<time>-seed<seed>, or with --resume the newest folder in runs/."""
    seed: Index = 0
    """Seed of all random numbers: question draws and sampled replies. The same seed gives the same run."""
    steps: Count = 2039
    """Steps of rollout and update. 2,039 are 30 epochs (paper) of DAPO-17K's 17,398 questions at 256 a step."""
    reply_tokens: Count | None = None
    """Budget of sampled reply tokens: the run ends after the step that reaches it, or after run.steps. If unset: no
    budget."""
    checkpoint_every: Index = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep; older ones are deleted, except the best."""
    keep_best: bool = True
    """Also keep the checkpoint whose evaluation had the highest mean pass@1."""
    save_by_minutes: Positive | None = None
    """Minutes after its start at which the run saves a checkpoint and exits with code 0; --resume continues it. If
    unset: never."""
    max_bad_updates: Count = 3
    """Consecutive updates with a loss or gradient that is not finite after which the run stops. Each of them is skipped
    and its batch is saved."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers that receive the metrics in addition to metrics.jsonl; each needs its own package."""
    completions_per_step: Index = 64
    """Replies of each step that are written to completions.jsonl, whole groups first."""
    threads: Count | None = None
    """CPU threads of PyTorch. If unset: one per core. With a small model, one thread is faster if other processes use
    the cores."""
    device: str = "auto"
    """Torch device of the policy; cuda: GPU number LOCAL_RANK of each rank; auto: the same, or the CPU if there is no
    GPU; cuda:1: that GPU, for a run of one rank."""


class ModelSection(Section):
    """The initial policy, which is also the frozen reference policy (paper: the base model)."""

    path: str
    """Folder or hub id of a transformers causal language model with its tokenizer; "ledger": the embedded model."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of transformers; auto: the one that transformers chooses."""


class DataSection(Section):
    """The training questions, and how questions become prompts."""

    train: str
    """Source of the training questions: a JSON-lines or Parquet file or a folder of them,
    "owner/name[/configuration][:split][@revision]" on the Hugging Face hub, a named set such as dapo-17k,
    "reasoning-gym:FAMILY?level=1&size=500&seed=0", or a built-in set such as "ledger:train" (docs/data.md)."""
    drop_overlap: Literal["none", "exact", "near"] = "none"
    """Training questions to drop because evaluation.sets contain them; exact: with the same text, near: also with
    nearly the same text, none: they are only reported, so that the training set is the paper's and does not depend on
    the evaluation."""
    skip_bad_answers: bool = False
    """Drop and count questions whose gold answer the verifier cannot parse; false: refuse a set that has any."""
    prompt: Literal["plain", "boxed", "dapo"] = "dapo"
    """Template around a question; plain: the question alone, boxed: asks for \\boxed{}, dapo: asks for Answer:."""
    chat_template: bool = True
    """Wrap the prompt as one user message in the tokenizer's chat template."""
    max_prompt_tokens: Count = 1024
    """Longest prompt in tokens (paper: 1,024). Training questions with a longer prompt are dropped and counted; an
    evaluation set that has any is refused."""


class DeadlineSection(Section):
    """Seconds that a phase may take. After that the run counts as hung: it dumps its stacks and exits."""

    start: Positive = 1800
    """Joining the other ranks and loading the model."""
    rollout: Positive = 7200
    """Sampling the replies of one step."""
    reward: Positive = 1800
    """Grading the replies of one step."""
    reference: Positive = 3600
    """Old and reference log-probs of one step."""
    update: Positive = 7200
    """The optimizer steps of one step."""
    sync: Positive = 1800
    """Copying the policy's weights to the rollout engine."""
    evaluation: Positive = 14400
    """One evaluation of all sets within a run. In expo.evaluate: one chunk of replies, which are written together, or
    one chunk of the answers that are compared for maj@n."""
    save: Positive = 1800
    """Writing or reading one checkpoint, or exporting the model."""
