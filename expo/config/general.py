"""General sections: the run's folder and length, the model, the questions, and the deadlines."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from expo.config.section import YEAR_S, Count, Index, Length, Positive, Seconds, Section, Several
from expo.config.templates import read_template

Column = Literal["question", "answer", "accepted", "context", "options", "choices", "id", "level"]
MOST_OPTIONS = 26
OPTIONS: tuple[Column, ...] = ("options", "choices")  # two names for the same


class RunSection(Section):
    """The run: its folder, seed, length, checkpoints and logs."""

    dir: Path | None = None
    """Folder of the run. If unset: runs/<date>-<time>-seed<seed>, or with --resume the newest folder in runs/."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of all random numbers: question draws and sampled replies. The same seed gives the same run."""
    steps: Count = 2039
    """Steps of rollout and update. 2,039 are 30 epochs (paper) of DAPO-17K's 17,398 questions at 256 a step."""
    reply_tokens: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """Budget of sampled reply tokens: the run ends after the step that reaches it, or after run.steps. If unset: no
    budget."""
    checkpoint_every: Index = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep; older ones are deleted, except the best and the last good one: the newest
    from which a whole step without a sign of divergence was taken."""
    keep_best: bool = True
    """Also keep the checkpoint whose evaluation had the highest mean pass@1."""
    save_by_minutes: Annotated[float, Field(gt=0, le=YEAR_S / 60)] | None = None
    """Minutes after its start at which the run saves a checkpoint and exits with code 0; --resume continues it. If
    unset: never."""
    end_with_launcher: bool = False
    """Save a checkpoint and exit with code 0 once the process that started this one, such as torchrun, has ended. If
    false, the run goes on without it."""
    max_bad_updates: Count = 3
    """Consecutive updates with a loss or gradient that is not finite after which the run stops. Each of them is skipped
    and its batch is saved."""
    collapse_kl: Positive = 5.0
    """KL estimate per reply token in nats above which a step shows a sign of collapse. The other signs: a gradient of
    exactly 0, accuracy 0 where it was above 0.05, and replies that are all truncated."""
    collapse_steps: Count = 8
    """Consecutive steps with the same sign (for the gradient: updates) after which the policy has collapsed. The
    progress line names a sign from its first step on; a gradient of 0 only then."""
    end_on_collapse: bool = False
    """End the run with exit code 3 when the policy has collapsed; --resume goes back to the last good checkpoint."""
    trackers: Several[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers that receive the metrics in addition to metrics.jsonl; each needs its own package."""
    completions_per_step: Index = 64
    """Replies of each step that are written to completions.jsonl, whole groups first."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of PyTorch. If unset: one per core. With a small model, one thread is faster if other processes use
    the cores."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")] = "auto"
    """Torch device of the policy; cuda: GPU number LOCAL_RANK of each rank; auto: the same, or the CPU if there is no
    GPU; cuda:1: that GPU, for a run of one rank."""

    @field_validator("dir", mode="before")
    @classmethod
    def _is_named(cls, value: Any) -> Any:
        if value == "":  # a path would read it as the current folder
            raise ValueError("expected the name of a folder; leave it out for a new one, or give . for this folder")
        return value


class ModelSection(Section):
    """The initial policy, which is also the frozen reference policy (paper: the base model)."""

    path: str
    """Folder or hub id of a transformers causal language model with its tokenizer; "ledger": the embedded model."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of transformers; auto: the one that transformers chooses."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face hub. If unset: its main branch."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model, where transformers has no class for it. Set it only for code that
    you have read."""

    @field_validator("revision", mode="before")
    @classmethod
    def _digits_are_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value  # as YAML reads a commit


class DataSection(Section):
    """The training questions, and how questions become prompts."""

    train: str
    """Source of the training questions: a JSON-lines or Parquet file or a folder of them,
    "owner/name[/configuration][:split][@revision]" on the Hugging Face hub, a named set such as dapo-17k,
    "reasoning-gym:FAMILY?level=1&size=500&seed=0", or a built-in set such as "ledger:train" (docs/data.md)."""
    columns: dict[Column, str | list[str] | None] = {}
    """Columns of the questions, for a table whose columns are not known (docs/data.md): {question: Q, answer: A}, with
    accepted in place of answer for a list of which any member is right; context, options (also choices; a list names a
    column for each option), id and level where there are such columns, null to leave one out. An evaluation set without
    these columns is read by the known ones."""
    drop_overlap: Literal["none", "exact", "near"] = "none"
    """Training questions to drop because evaluation.sets contain them; exact: with the same text, near: also with
    nearly the same text, none: they are only reported, so that the training set is the paper's and does not depend on
    the evaluation."""
    skip_bad_answers: bool = False
    """Drop and count questions whose gold answer is missing or cannot be parsed; false: refuse a set that has any."""
    prompt: Literal["plain", "boxed", "answer", "think-answer", "dapo"] = "dapo"
    """Template around a question; plain: the question alone, boxed: asks for \\boxed{}, answer and dapo: ask for a line
    Answer:, think-answer: asks for <think> and <answer>."""
    template: str | None = None
    """Template in place of data.prompt: a name as there, a text with {question} where the question belongs, a Jinja
    template with the variables question, options and context, or a Jinja file (.jinja, .jinja2, .j2). If unset:
    data.prompt."""
    chat_template: bool = True
    """Wrap the prompt as one user message in the tokenizer's chat template."""
    system: str | None = None
    """System message before the user message, for a chat template. If unset: that of the question's row, if it has one;
    "": none."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further arguments of the tokenizer's chat template, such as {enable_thinking: false} of Qwen3."""
    max_prompt_tokens: Length = 1024
    """Longest prompt in tokens (paper: 1,024). Training questions with a longer prompt are dropped and counted; an
    evaluation set that has any is refused."""

    @field_validator("template")
    @classmethod
    def _template_is_one(cls, value: str | None) -> str | None:
        return None if value is None else read_template(value)

    @field_validator("columns")
    @classmethod
    def _columns_go_together(cls, value: dict[Column, str | list[str] | None]) -> dict[Column, str | list[str] | None]:
        lists = [name for name, column in value.items() if isinstance(column, list) and name not in OPTIONS]
        if lists:
            raise ValueError(f"{lists[0]} is one column; only options may be a list of columns")
        if any(isinstance(column, list) and len(column) > MOST_OPTIONS for column in value.values()):
            raise ValueError(f"give at most {MOST_OPTIONS} columns of options, one for each letter")
        if all(name in value for name in OPTIONS) or any(column in ([], "") for column in value.values()):
            raise ValueError("give each of them a column, or null, and only one of options and choices")
        has_question = value.get("question") is not None
        num_answers = sum(value.get(name) is not None for name in ("answer", "accepted"))
        if num_answers != has_question:
            raise ValueError("give question with either answer or accepted, as in {question: Q, answer: A}")
        return value

    @model_validator(mode="after")
    def _chat_settings_are_used(self) -> "DataSection":
        given = [name for name in ("system", "chat_template_kwargs") if getattr(self, name)]
        if given and not self.chat_template:
            raise ValueError(f"data.{given[0]} is for a chat template; set data.chat_template to true, or remove it")
        return self


class DeadlineSection(Section):
    """Seconds that a phase may take. After that the run counts as hung: it dumps its stacks and exits."""

    start: Seconds = 1800
    """Joining the other ranks and loading the model."""
    rollout: Seconds = 7200
    """Sampling the replies of one step."""
    reward: Seconds = 1800
    """Grading the replies of one step."""
    reference: Seconds = 3600
    """Old and reference log-probs of one step."""
    update: Seconds = 7200
    """The optimizer steps of one step."""
    sync: Seconds = 1800
    """Copying the policy's weights to the rollout engine."""
    evaluation: Seconds = 14400
    """One evaluation of all sets within a run. In expo.evaluate: one chunk of replies, which are written together, or
    one chunk of the answers that are compared for maj@n."""
    save: Seconds = 1800
    """Writing or reading one checkpoint, or exporting the model."""
