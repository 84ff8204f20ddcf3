"""Warnings about replies from which nothing can be learnt: all of them are cut, or none states an answer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from expo.config import EvalConfig, RunConfig
from expo.rewards.groups import GradedRollouts
from expo.rewards.methods import what_is_read
from expo.runtime.console import printable

NUM_SHOWN = 3  # replies in a warning
MOST_SHOWN = 160  # characters of each
MANY = 0.5  # share of unparsed replies that is worth a warning where none is correct

WhyUnparsed = Callable[[str], str]  # from a reply to the reason


def step_advice(
    row: Mapping[str, Any], graded: GradedRollouts, why_unparsed: WhyUnparsed, config: RunConfig
) -> str | None:
    """What to change if every reply of a step was cut, or none states an answer; None for other steps.

    Args:
        row: of the step in metrics.jsonl.
        graded: its replies.
        why_unparsed: of the verifier.
        config: of the run.
    """
    return advice(f"step {row['step']}", row["accuracy"], row, first_unparsed(graded.rows), why_unparsed, config)


def set_advice(
    name: str,
    scores: Mapping[str, Any],
    unparsed: Iterable[str],
    why_unparsed: WhyUnparsed,
    config: RunConfig | EvalConfig,
) -> str | None:
    """The same for the replies to a set of questions.

    Args:
        name: of the set.
        scores: of the set, as `expo.evaluation.scores.score_set` gives them.
        unparsed: its first replies that state no answer.
        why_unparsed: of the verifier.
        config: of the run or the evaluation.
    """
    accuracy = scores["pass_at"]["1"]["mean"]
    return advice(f"the evaluation set {name}", accuracy, scores, unparsed, why_unparsed, config)


def first_unparsed(rows: Callable[[], Iterable[Mapping[str, Any]]]) -> Iterator[str]:
    """The first replies that state no answer, one of each question.

    Args:
        rows: gives the replies in order, each with question_id, verdict and reply; called only if a reply is needed.
    """
    seen: set[str] = set()
    for row in rows():
        if row["verdict"] == "unparsed" and row["question_id"] not in seen:
            seen.add(row["question_id"])
            yield row["reply"]


def advice(
    what: str,
    accuracy: float,
    fractions: Mapping[str, float],
    unparsed: Iterable[str],
    why_unparsed: WhyUnparsed,
    config: RunConfig | EvalConfig,
) -> str | None:
    """What to change if every reply was cut, or none is correct and many state no answer; None otherwise.

    A line of the warning, then one for each of the first unparsed replies, with the reason.
    """
    share = fractions["unparsed_fraction"]
    is_unparsed = share == 1.0 or (accuracy == 0 and share >= MANY)
    if fractions["truncated_fraction"] == 1.0:
        end = "" if config.data.chat_template else "; an instruction-tuned model also needs data.chat_template = true"
        text = (
            f"every reply of {what} was cut at rollout.max_new_tokens = {config.rollout.max_new_tokens}; raise it, or "
            f"name the token that ends a reply in rollout.stop_tokens{end}"
        )
    elif is_unparsed:
        none = f"no reply of {what} states an answer that can be read"
        few = f"no reply of {what} is correct, and {100 * share:.0f} % of them state no answer that can be read"
        read = what_is_read(config.reward.verifier)
        text = f"{none if share == 1.0 else few}; the verifier reads {read}; {_change(config)}"
    else:
        return None
    shown = islice(unparsed, NUM_SHOWN) if is_unparsed else ()
    return "\n".join([f"warning: {text}", *(_shown(reply, why_unparsed) for reply in shown)])


def _change(config: RunConfig | EvalConfig) -> str:
    data = config.data
    template = data.prompt if data.template is None else data.template
    if ":" in config.reward.verifier:
        return f"see the replies below, then change the prompt or {config.reward.verifier}"
    if template == "plain":
        field = "prompt" if data.template is None else "template"
        return f"data.{field} = plain does not ask for one: take boxed or dapo, or data.template"
    named = "data.template" if data.template is not None else f"data.prompt = {data.prompt}"
    return f"see the replies below, then change {named}, data.system or data.chat_template"


def _shown(reply: str, why_unparsed: WhyUnparsed) -> str:
    return f"  unparsed, since {why_unparsed(reply)}: {printable(reply, MOST_SHOWN)}"
