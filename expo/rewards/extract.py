r"""Finds the answer that a reply states; the time is linear in the reply's length.

The answer is the content of the last `\boxed{...}`, the text after the last `Answer:` at the start of a line (the
format of DAPO, arXiv 2503.14476), or the content of the last `<answer>...</answer>` (the format of DeepSeek-R1-Zero,
arXiv 2501.12948), whichever begins last. Boxes separated only by "and", "or" or a comma are one list,
in which every member must be right. Earlier boxes count as working, not as answers, so listing guesses earns nothing.
A box without its closing brace (a truncated reply), tags without the closing one, and either without content do not
count.

Only what follows the last closed thinking tag is read; a reply whose thinking never ends states no answer.

A reply is searched from its end by `str.rfind`, and each candidate is read up to a fixed length, so that a reply of
10 MB made of braces or of "answer" takes as long as any other.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from expo.rewards.maths.dressing import undress

# Longer "answers" are text inside an unfinished box; gold answers have at most a few hundred characters.
MAX_ANSWER_CHARS: Final = 2_000
# Candidates read from the end of a reply: a reply has a few boxes, and a repeated pattern has thousands.
MAX_CANDIDATES: Final = 200
# Characters before the word "answer" in its line: "**Therefore, my final".
_MAX_PREFIX_CHARS: Final = 100
THINK_TAGS: Final = (("<think>", "</think>"),)

READS: Final = r"the last of \boxed{...}, a line that begins with Answer:, and <answer>...</answer>, after the thinking"
"""What is read of a reply, for messages."""
MARKS: Final = (r"\boxed", "Answer:", "<answer>")
"""What a prompt that asks for an answer which can be read has one of."""

_BOX_COMMAND = re.compile(r"\\\\?(?:boxed|fbox)\s{0,9}\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_TAGS: Final = ("<answer>", "</answer>")
_ANSWER_WORDS: Final = ("nswer", "NSWER", "答案")
_ANSWER_LINE = re.compile(
    r"[^\w\n]*(?:(?:so|thus|hence|therefore|the|my|final|correct)[^\w\n]+)*(?:answer|答案)(?:\*\*)?\s{0,9}[:：](?:\*\*)?"
    r"\s{0,99}([^\n]+)",
    re.IGNORECASE,
)
_LIST_GLUE = re.compile(r"(?:[\s$,;]|\\[()\[\],;]|\\q?quad|(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?)*")
_DISPLAY_MARKS: Final = ((r"\[", r"\]"), (r"\(", r"\)"))
_MOST_SEARCHED: Final = 100_000  # characters at the end of a reply
# What may have been meant as an answer, in the order in which it is looked for; of a reply without one.
_ALMOST: Final = (
    ("its box is empty, does not end or is too long", re.compile(r"\\(?:boxed|fbox)\s{0,9}\{")),
    ("its <answer> is empty, does not end or is too long", re.compile(r"<answer>")),
    ("it says Answer: within a line or with nothing after it", re.compile(r"(?:answer|答案)\*{0,2} ?[:：]", re.I)),
    ("it names an answer, but not after Answer: at the start of a line", re.compile(r"answer|答案", re.I)),
)
Span = tuple[int, int, int]  # of a box: start of the command, start and end of the content


def extract_answer(
    reply: str, think_tags: Sequence[tuple[str, str]] = THINK_TAGS, *, is_thinking: bool = False
) -> str | None:
    """The answer a reply states, as written; None if it states none.

    Args:
        reply: The whole reply of the model.
        think_tags: Pairs of an opening and a closing tag around the model's thinking.
        is_thinking: Whether the prompt ends with an opening tag, so that the reply starts inside the thinking.
    """
    start = _end_of_thinking(reply, think_tags, is_thinking)
    if start is None:
        return None
    last_box = next(_boxes(reply, start), None)
    after_box = start if last_box is None else last_box[0] + 1
    tagged = next(_tagged(reply, after_box), None)
    line = _answer_line(reply, after_box if tagged is None else tagged[1] + len(_TAGS[1]))
    if line is None and tagged is not None:
        content = reply[slice(*tagged)].strip()
        line = _answer_line(content, 0) or content
    if line is not None:
        answer = _without_marks(line)
        if _BOX_COMMAND.search(answer) and not has_box(answer):
            return None  # truncated inside its box
    elif last_box is not None:
        answer = _join_last_boxes(reply, start)
    else:
        return None
    return answer if len(answer) <= MAX_ANSWER_CHARS and undress(answer) else None


def why_unparsed(
    reply: str, think_tags: Sequence[tuple[str, str]] = THINK_TAGS, *, is_thinking: bool = False
) -> str | None:
    """Why `extract_answer` finds no answer in a reply, for people; None if it finds one. The arguments are the same."""
    if extract_answer(reply, think_tags, is_thinking=is_thinking) is not None:
        return None
    if not reply.strip():
        return "it is empty"
    start = _end_of_thinking(reply, think_tags, is_thinking)
    if start is None:
        closing = " or ".join(closing for _, closing in think_tags)
        return f"its thinking does not end with {closing}"
    if not reply[start:].strip():
        return "nothing follows its thinking"
    end_only = max(start, len(reply) - _MOST_SEARCHED)
    return next((reason for reason, found in _ALMOST if found.search(reply, end_only)), "it has none of these")


def has_box(reply: str) -> bool:
    """Whether a reply has a complete, non-empty box."""
    return next(_boxes(reply, 0), None) is not None


def boxed_answer(text: str) -> str | None:
    """The content of the last boxes of a text, joined as a list; None without a box."""
    return _join_last_boxes(text, 0) if has_box(text) else None


def after_thinking(reply: str, think_tags: Sequence[tuple[str, str]], *, is_thinking: bool) -> str | None:
    """The reply without its thinking; None if it ends inside its thinking."""
    start = _end_of_thinking(reply, think_tags, is_thinking)
    return None if start is None else reply[start:]


def _end_of_thinking(reply: str, think_tags: Sequence[tuple[str, str]], is_thinking: bool) -> int | None:
    """The index after the last closing tag; None if the reply ends inside its thinking."""
    start = 0
    for _, closing in think_tags:
        found = reply.rfind(closing)
        if found >= 0:
            start = max(start, found + len(closing))
    if is_thinking and not start:
        return None
    if any(reply.find(opening, start) >= 0 for opening, _ in think_tags):
        return None
    return start


def _last_positions(text: str, words: Sequence[str], start: int) -> Iterator[int]:
    """Where the words occur from `start` on, the last position first, at most MAX_CANDIDATES."""
    # each word keeps its own position: searching again for one that does not occur would read the text again each time
    positions = {word: text.rfind(word, start) for word in words}
    for _ in range(MAX_CANDIDATES):
        word = max(positions, key=positions.__getitem__)
        if positions[word] < 0:
            return
        yield positions[word]
        positions[word] = text.rfind(word, start, positions[word] + len(word) - 1)


def _boxes(reply: str, start: int) -> Iterator[Span]:
    """Complete boxes, the last one first."""
    for found in _last_positions(reply, ("boxed", "fbox"), start):
        command = max(found - 2, start)
        while command < found and reply[command] != "\\":
            command += 1
        match = _BOX_COMMAND.match(reply, command)
        closing = match and _closing_brace(reply, match.end())
        if match and closing and reply[match.end() : closing].strip():
            yield command, match.end(), closing


def _closing_brace(reply: str, start: int) -> int | None:
    """Where the group that is open at `start` ends; None if it exceeds the length of an answer."""
    depth = 1
    for token in _BRACES.finditer(reply, start, start + MAX_ANSWER_CHARS + 1):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
            if not depth:
                return token.start()
    return None


def _join_last_boxes(reply: str, start: int) -> str:
    members: dict[str, None] = {}  # an ordered set: "\boxed{5} \boxed{5}" states 5 once
    following: int | None = None
    for command, inner, end in _boxes(reply, start):
        if following is not None:
            if end > following:
                # an outer box is the answer, and the boxes inside it are dressing
                if command < following:
                    members.clear()
                    members[reply[inner:end].strip()] = None
                    following = command
                continue
            glue = reply[end + 1 : following] if following - end < MAX_ANSWER_CHARS else "-"
            # white space alone does not make a list
            if not glue.strip() or not _LIST_GLUE.fullmatch(glue):
                break
        members[reply[inner:end].strip()] = None
        following = command
    return ", ".join(reversed(members))


def _tagged(reply: str, start: int) -> Iterator[tuple[int, int]]:
    """Start and end of the content of complete `<answer>` tags that begin at `start` or later, the last one first."""
    for closing in _last_positions(reply, (_TAGS[1],), start):
        opening = reply.rfind(_TAGS[0], start, closing)
        if opening < 0:
            return
        inner = opening + len(_TAGS[0])
        if reply[inner:closing].strip():
            yield inner, closing


def _answer_line(reply: str, start: int) -> str | None:
    """The text after the last "Answer:" at the start of a line; None if there is none."""
    for found in _last_positions(reply, _ANSWER_WORDS, start):
        line_start = max(reply.rfind("\n", max(found - _MAX_PREFIX_CHARS, 0), found) + 1, start)
        if found - line_start >= _MAX_PREFIX_CHARS or (line_start == start and start and reply[start - 1] not in "\n>"):
            continue
        match = _ANSWER_LINE.match(reply, line_start, found + MAX_ANSWER_CHARS + 20)
        if match and match.start(1) > found:
            return match[1]
    return None


def _without_marks(line: str) -> str:
    """The text of an answer line without emphasis and without display marks that open or close outside it."""
    answer = line.lstrip("* ").rstrip("* \r\t")
    if answer.endswith((".", "。")) and answer[:-1].endswith("*"):  # "**7**."
        answer = answer[:-1].rstrip("* ")
    for opening, closing in _DISPLAY_MARKS:
        if answer.endswith(closing) and answer.count(opening) < answer.count(closing):
            answer = answer.removesuffix(closing).rstrip()
    if answer.endswith("$$") and answer.count("$$") == 1:
        answer = answer.removesuffix("$$").rstrip()
    return answer
