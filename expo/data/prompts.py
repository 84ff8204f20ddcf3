"""Turns questions into prompts: a named template, then the tokenizer's chat template."""

from collections.abc import Sequence
from typing import Any

from expo.config import DataSection
from expo.errors import ConfigError
from expo.types import Prompt, Question

PROMPTS = {
    "plain": "{question}",
    "boxed": "{question}\nReason step by step, and put your final answer within \\boxed{{}}.",
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
}
"""Templates by name; `dapo` is the wording of DAPO-17K (arXiv 2503.14476)."""


def render_prompt(question: Question, config: DataSection, tokenizer: Any) -> list[int]:
    """Token ids of a question's prompt, up to the first token of the reply.

    Raises: ConfigError if data.chat_template is true and the tokenizer has no chat template or its template fails, or
        if the question has a system message that could not be shown.
    """
    if config.template is not None:
        text = config.template.replace("{question}", question.text)
    else:
        text = PROMPTS[config.prompt].format(question=question.text)
    system = question.system if config.system is None else config.system
    if not config.chat_template:
        if system:
            raise ConfigError(
                f"question {question.id} has a system message, which only a chat template can show; set "
                f"--data.chat_template=true, or leave it out: --data.system='\"\"'"
            )
        return _without_end(list(tokenizer(text)["input_ids"]), text, tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "data.chat_template is true, but the tokenizer has none; turn it off: --data.chat_template=false, or of "
            "python -m expo.data --no-chat-template"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, **config.chat_template_kwargs
        )
    except Exception as error:  # a template is a program: it raises its own errors and those of its expressions
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the tokenizer's chat template fails on question {question.id}: {type(error).__name__}: {problem}; change "
            f"data.system or data.chat_template_kwargs, or set --data.chat_template=false"
        ) from error
    return list(encoded["input_ids"])


def _without_end(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """The ids without the special tokens that some tokenizers append: a reply cannot follow an end of sequence."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    while len(ids) > 1 and ids[-1] in special and not text.endswith(tokenizer.decode(ids[-1:])):
        ids.pop()
    return ids


def render_prompts(questions: Sequence[Question], config: DataSection, tokenizer: Any) -> list[Prompt]:
    """The questions whose prompts have at most data.max_prompt_tokens tokens, with these prompts.

    Raises: ConfigError if no prompt fits, or as `render_prompt`.
    """
    rendered = [Prompt(question, render_prompt(question, config, tokenizer)) for question in questions]
    fitting = [prompt for prompt in rendered if len(prompt.prompt_ids) <= config.max_prompt_tokens]
    if not fitting:
        shortest = min(len(prompt.prompt_ids) for prompt in rendered)
        raise ConfigError(
            f"no prompt fits data.max_prompt_tokens = {config.max_prompt_tokens}; the shortest has {shortest} tokens: "
            f"raise it"
        )
    return fitting


def render_whole_set(name: str, questions: Sequence[Question], config: DataSection, tokenizer: Any) -> list[Prompt]:
    """All questions of an evaluation set with their prompts; dropping some would change what its score means.

    Raises: ConfigError, which names the set, if a prompt exceeds data.max_prompt_tokens; or as `render_prompt`.
    """
    rendered = [Prompt(question, render_prompt(question, config, tokenizer)) for question in questions]
    lengths = [len(prompt.prompt_ids) for prompt in rendered]
    num_long = sum(length > config.max_prompt_tokens for length in lengths)
    if num_long:
        raise ConfigError(
            f"{name}: the prompts of {num_long} questions are longer than data.max_prompt_tokens = "
            f"{config.max_prompt_tokens}, and dropping them would change the set; raise it to {max(lengths)}"
        )
    return rendered
