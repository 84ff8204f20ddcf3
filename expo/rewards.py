r"""Reply and gold answer in, verdict out: the mathematics verifier and its killable workers.

The answer of a reply is what its last `\boxed{...}` holds, or what follows its last line-opening `Answer:` (the
format of DAPO, arXiv 2503.14476), whichever comes later. Boxes joined by nothing but "and", "or" or a comma are one
list, in which every member must be right. Earlier boxes are working, not answers, so listing guesses earns
nothing. (math-verify by itself joins boxes up to 70 characters apart and calls two different ones wrong.)
A box without its closing brace (a truncated reply) or without contents is no box.

Plain numbers and equal texts are judged here, exactly. All else goes to math-verify in worker processes: an
answer such as `9^{9^{9}}` can hang computer algebra for hours or fill the memory, and only killing the
process ends that. The deadline is kept here, by the wall clock; an overdue worker is killed and replaced.
"""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from expo import _grading

Kind = Literal["correct", "wrong", "unparsed", "timeout"]
_Pair = tuple[str, str]  # answer and gold answer, both normalised

# Longer "answers" are text that ran on inside a box; gold answers have at most a few hundred characters.
MAX_ANSWER_CHARS: Final = 2_000
# Verdicts and normal forms remembered: the distinct answers of a dozen steps of 2,048 replies; some 10 MB.
_MEMO_SIZE: Final = 32_768
# An answer graded for longer than this is likely to hang: the longest of the golden table takes 0.1 s.
_SLOW_S: Final = 0.15
# Most processes at a time, as a multiple of the number of workers: three slow answers beside each brisk one.
_MAX_WIDTH: Final = 4
# Starting the template imports computer algebra: 2 s on an idle core, more on a loaded machine or a cold disk.
_START_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True)
class Verdict:
    """What one reply earned.

    Attributes:
        kind: "correct"; "wrong"; "unparsed" when the reply states no answer; "timeout" when its answer could
            not be graded within the limits on time and memory.
        answer: The answer as the reply states it, None when unparsed.
    """

    kind: Kind
    answer: str | None

    @property
    def reward(self) -> float:
        """1 for a correct reply, 0 for any other."""
        return 1.0 if self.kind == "correct" else 0.0


# ---- finding the answer in a reply

_BRACES = re.compile(r"\\\\?(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(
    r"^[^\w\n]*(?:(?:so|thus|hence|therefore|the|my|final|correct)[^\w\n]+)*answer(?:\*\*)?\s*[:：](?:\*\*)?\s*([^\n]+)",
    re.IGNORECASE | re.MULTILINE,
)
_LIST_GLUE = re.compile(r"(?:[\s$,;]|\\[()\[\],;]|\\q?quad|(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?)*")


def extract_answer(reply: str) -> str | None:
    """The answer a reply states, as written; None if it states none.

    Args:
        reply: The whole reply of the model, of any length; read in linear time.
    """
    boxes = _find_boxes(reply)
    answer_line = None
    for answer_line in _ANSWER_LINE.finditer(reply):  # noqa: B007 (the last one is wanted)
        pass
    if answer_line is not None and (not boxes or boxes[-1][2] < answer_line.start()):
        answer = answer_line[1].strip().strip("*").strip()
        if _INNER_BOX.search(answer):
            return None  # cut off inside its box
    elif boxes:
        answer = _join_last_boxes(reply, boxes)
    else:
        return None
    return answer if len(answer) <= MAX_ANSWER_CHARS and _normalise(answer) else None


def _find_boxes(reply: str) -> list[tuple[int, int, int]]:
    """Complete boxes by where they end: start of the command, start and end of the contents."""
    if "box" not in reply:
        return []
    boxes = []
    open_braces: list[tuple[int, int] | None] = []
    for token in _BRACES.finditer(reply):
        text = token[0]
        if text == "{":
            open_braces.append(None)
        elif text == "}":
            opening = open_braces.pop() if open_braces else None
            if opening is not None:
                boxes.append((*opening, token.start()))
        elif text.endswith("{") and "box" in text:
            open_braces.append((token.start(), token.end()))
    return [(start, inner, end) for start, inner, end in boxes if reply[inner:end].strip()]


def _join_last_boxes(reply: str, boxes: list[tuple[int, int, int]]) -> str:
    start, inner, end = boxes[-1]
    members = {reply[inner:end].strip(): None}  # a set that keeps its order
    for earlier_start, earlier_inner, earlier_end in reversed(boxes[:-1]):
        if earlier_end > start:
            continue  # nested in a box already taken
        glue = reply[earlier_end + 1 : start]
        # "\boxed{5} \boxed{5}" states 5 once; blank space alone does not make a list either
        if not glue.strip() or not _LIST_GLUE.fullmatch(glue):
            break
        members[reply[earlier_inner:earlier_end].strip()] = None
        start = earlier_start
    return ", ".join(reversed(members))


# ---- normal form of answers

_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "﹣": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": r"\div ",
        "±": r"\pm ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "²": "^{2}",
        "³": "^{3}",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⁄": "/",
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
        # the full-width forms of ASCII, as Chinese keyboards give them
        **{chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)},
    }
)
_UNICODE_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\w+))")
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_INNER_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_THIN_SPACE = re.compile(r"(?<!\\)\\[,;:]|~")
_FINAL_STOP = re.compile(r"\s*(?<!\\right)[.,;]\s*\Z")
_BRACED = re.compile(r"\A\s*\{([^{}]*)\}\s*\Z")
_REPEATING = re.compile(r"(?<![\d.])(\d+)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?")
_NUMBER = re.compile(
    r"([+-]?)\s?(?:(\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.(\d*))?|\.(\d+))(?:[eE]([+-]?\d{1,3}))?",
    re.ASCII,
)
_SIZED_BRACKET = re.compile(r"\\(?:left|right)(?![A-Za-z])\s*")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '\-]*")


@functools.lru_cache(maxsize=_MEMO_SIZE)
def _normalise(text: str) -> str:
    """The same answer without its dressing: dollars, display marks, a final stop, signs outside ASCII."""
    if not text.isascii():
        text = text.translate(_UNICODE)
        text = _UNICODE_ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    if text.isdigit():
        return text.lstrip("0") or "0"
    text = text.replace(r"\$", "").replace("$", "").replace(r"\!", "").replace("{,}", ",")
    text = _FINAL_STOP.sub("", _THIN_SPACE.sub(" ", text)).strip()
    for opening, closing in _WRAPPERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    text = _INNER_BOX.sub("", text).replace(r"\varnothing", r"\emptyset")
    text = _REPEATING.sub(_repeating_to_fraction, text)
    text = _BRACED.sub(r"\1", _FINAL_STOP.sub("", text)).strip()
    return _canonical_number(text) or text


def _repeating_to_fraction(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    # 0.1(6) = (16 - 1) / 90
    if len(fixed) + len(repeated) > 50:
        return match[0]
    numerator = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def _canonical_number(text: str) -> str | None:
    """A plain integer or decimal in its one shortest form ("-1,234.50" is "-1234.5"); None for anything else.

    A string, so that numbers of any length are compared exactly and cheaply.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals, bare_decimals, exponent = match.groups()
    whole = (whole or "").replace(",", "").replace(" ", "")
    decimals = decimals or bare_decimals or ""
    shift = int(exponent or 0)
    if shift > 0:
        decimals = decimals.ljust(shift, "0")
        whole, decimals = whole + decimals[:shift], decimals[shift:]
    elif shift < 0:
        whole = whole.rjust(-shift, "0")
        whole, decimals = whole[:shift], whole[shift:] + decimals
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    magnitude = f"{whole}.{decimals}" if decimals else whole
    return f"-{magnitude}" if sign == "-" and magnitude != "0" else magnitude


def _squash(text: str) -> str:
    """The text without what never changes its meaning in LaTeX, for telling equal texts."""
    text = _SIZED_BRACKET.sub("", text).replace(r"\displaystyle", "")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)


def _words(text: str) -> str | None:
    r"""The words of an answer that is only words ("no solution", `\text{Monday}`); None for any other."""
    text = _TEXT_COMMAND.sub(r"\1", text).strip().rstrip(".")
    choice = re.fullmatch(r"\(([A-Z])\)", text)
    if choice:
        return choice[1]
    if not _WORDS.fullmatch(text):
        return None
    # a letter alone is a choice or a variable: there A and a differ
    return " ".join(text.split()).casefold() if len(text) > 1 else text


def _bracketed_numbers(text: str) -> list[str] | None:
    """The brackets, then the numbers, of a point or interval such as "(1, -2.5)"; None for other texts."""
    text = _SIZED_BRACKET.sub("", text)
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]"):
        return None
    numbers = [_canonical_number(member.strip()) for member in text[1:-1].split(",")]
    if len(numbers) < 2 or None in numbers:
        return None
    return [text[0] + text[-1], *(number for number in numbers if number is not None)]


@functools.lru_cache(maxsize=_MEMO_SIZE)
def _normalise_gold(answer: str) -> str:
    """A gold answer in the form `_normalise` gives; data sets also hold lists as strings: "['9.6\\n']"."""
    text = answer.strip()
    listed = re.fullmatch(r"\[\s*(['\"])(.*)\1\s*\]", text, re.DOTALL)
    if listed:
        # split by hand: in some sets the backslashes of LaTeX are doubled, in others not
        quote = listed[1]
        members = re.split(rf"{quote}\s*,\s*{quote}", listed[2].replace("\\\\", "\\"))
        text = ", ".join(member.removesuffix(r"\n").strip() for member in members)
    elif text.startswith("[") and _canonical_number(text[1:-1].strip()) is not None:
        text = text[1:-1]
    box = _find_boxes(text)
    if box:
        text = _join_last_boxes(text, box)
    return _normalise(text)


def _judge_here(answer: str, gold: str) -> bool | None:
    """Whether a normalised answer is right, where that needs no algebra; None where it does."""
    if answer == gold:
        return True
    if _canonical_number(answer) is not None and _canonical_number(gold) is not None:
        return False
    if _squash(answer) == _squash(gold):
        return True
    answer_numbers, gold_numbers = _bracketed_numbers(answer), _bracketed_numbers(gold)
    if answer_numbers is not None and gold_numbers is not None and answer_numbers[0] == gold_numbers[0]:
        return answer_numbers == gold_numbers
    answer_words, gold_words = _words(answer), _words(gold)
    if answer_words is None or gold_words is None:
        return None
    if answer_words == gold_words:
        return True
    # a gold answer marked as text is no product of variables, so other words are another answer
    return False if _TEXT_COMMAND.search(gold) else None


# ---- workers


@dataclass
class _Worker:
    """Our side of one grading process."""

    pid: int
    connection: Connection
    pair: _Pair | None = None  # what it is grading
    started: float = 0.0  # s, monotonic clock

    def send(self, pair: _Pair, *, check_gold_only: bool) -> None:
        """Starts on a pair; if the worker turns out to be dead, that shows when its outcome is awaited."""
        self.pair, self.started = pair, time.monotonic()
        answer, gold = pair
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps([None if check_gold_only else answer, gold]).encode())

    def receive(self) -> bytes | None:
        """What the worker says; None if it has died."""
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            return None


class _Template:
    """The process that workers are forked from, and our side of the socket that steers it."""

    def __init__(self, memory_bytes: int, alarm_s: int) -> None:
        self._control, theirs = socket.socketpair()
        package_root = str(Path(__file__).resolve().parent.parent)
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", _grading.__name__, str(theirs.fileno()), str(memory_bytes), str(alarm_s)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
            )
        self._control.settimeout(_START_TIMEOUT_S)
        try:
            is_ready = self._control.recv(64) == _grading.READY
        except OSError:
            is_ready = False
        if not is_ready:
            self.close()
            raise RuntimeError(
                f"the grading process did not start (status {self.process.returncode}); its error is on standard "
                "error, and `pip install 'expo-rl[train]'` installs what it needs"
            )

    def fork_worker(self) -> _Worker:
        ours, theirs = Pipe()
        with theirs:
            return _Worker(int(self._ask(b"fork", [theirs.fileno()])), ours)

    def end_worker(self, worker: _Worker) -> None:
        """Kills the worker, whatever it is doing, and waits until it is gone."""
        worker.connection.close()
        reply = self._ask(str(worker.pid).encode(), [])
        assert reply == _grading.DONE

    def close(self) -> None:
        """Ends the template, which ends its workers first."""
        self._control.close()
        try:
            self.process.wait(_START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def disown(self) -> None:
        """Lets go of another process's template without ending it."""
        self._control.close()
        self.process.returncode = 0  # tells Popen that there is nothing to wait for

    def _ask(self, message: bytes, fds: list[int]) -> bytes:
        try:
            socket.send_fds(self._control, [message], fds)
            reply = self._control.recv(64)
        except OSError:
            reply = b""
        if not reply:
            raise RuntimeError("something outside ended the grading process; grade again, which starts a new one")
        return reply


class _Pool:
    """The worker processes of one verifier. Not thread-safe: its verifier holds a lock."""

    def __init__(self, num_workers: int, timeout_s: float, memory_bytes: int) -> None:
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._owner = os.getpid()
        self._template: _Template | None = None
        self._workers: list[_Worker] = []

    def close(self) -> None:
        """Ends all processes; `run` starts new ones."""
        template, workers = self._template, self._workers
        self._template, self._workers = None, []
        for worker in workers:
            worker.connection.close()
        if template is not None:
            # in a process forked from the owner these are copies: the workers are not its own
            template.close() if os.getpid() == self._owner else template.disown()

    def run(self, pairs: Iterable[_Pair], *, check_gold_only: bool = False) -> dict[_Pair, bytes | None]:
        """What the workers say about each pair, None where a worker died or was killed over it."""
        queue = deque(pairs)
        outcomes: dict[_Pair, bytes | None] = {}
        if not queue:
            return outcomes
        if os.getpid() != self._owner or (self._template is not None and self._template.process.poll() is not None):
            self.close()
        try:
            if self._template is None:
                self._owner = os.getpid()
                # a worker's own alarm, for when this process has died, comes after the deadline kept here
                self._template = _Template(self._memory_bytes, int(self._timeout_s) + 2)
            for worker in list(self._workers):
                if worker.connection.poll():  # the end of the file: it was killed while idle
                    self._end(worker)
            while queue or any(worker.pair for worker in self._workers):
                self._hand_out(queue, check_gold_only)
                self._collect(outcomes, is_queue_empty=not queue)
            for worker in self._workers[self._num_workers :]:
                self._end(worker)
            while len(self._workers) < self._num_workers:
                self._workers.append(self._template.fork_worker())
        except BaseException:
            # an outcome still on its way would be taken for that of a later pair
            self.close()
            raise
        return outcomes

    def _end(self, worker: _Worker) -> None:
        assert self._template is not None
        self._workers.remove(worker)
        self._template.end_worker(worker)

    def _hand_out(self, queue: deque[_Pair], check_gold_only: bool) -> None:
        """Gives out pairs until `num_workers` are at work, not counting those that take suspiciously long."""
        assert self._template is not None
        now = time.monotonic()
        num_brisk = sum(worker.pair is not None and now - worker.started < _SLOW_S for worker in self._workers)
        idle = [worker for worker in self._workers if worker.pair is None]
        while queue and num_brisk < self._num_workers:
            if idle:
                worker = idle.pop()
            elif len(self._workers) < _MAX_WIDTH * self._num_workers:
                worker = self._template.fork_worker()
                self._workers.append(worker)
            else:
                return
            worker.send(queue.popleft(), check_gold_only=check_gold_only)
            num_brisk += 1

    def _collect(self, outcomes: dict[_Pair, bytes | None], *, is_queue_empty: bool) -> None:
        """Waits until a worker speaks, becomes slow or is overdue, and settles what that concerns."""
        at_work = {worker.connection: worker for worker in self._workers if worker.pair is not None}
        now = time.monotonic()
        limits = [worker.started + self._timeout_s for worker in at_work.values()]
        if not is_queue_empty:
            limits += [worker.started + _SLOW_S for worker in at_work.values() if now - worker.started < _SLOW_S]
        spoken = wait(list(at_work), max(0.0, min(limits) - now))
        now = time.monotonic()
        for connection, worker in at_work.items():
            assert worker.pair is not None
            message = worker.receive() if connection in spoken else None
            if connection not in spoken and now - worker.started < self._timeout_s:
                continue
            outcomes[worker.pair] = message
            worker.pair = None
            if message is None:
                self._end(worker)


class Verifier:
    """Grades replies against gold answers; never hangs, whatever the replies hold.

    May be called from any thread and under asyncio (with `asyncio.to_thread`, to keep the loop free): no signals are
    used. Calls from several threads at once take turns at the workers. Processes start at the first answer that needs
    algebra, stay until `close` or the end of this object, and die with the process that started them.

    An answer gets `timeout_s` from when a worker takes it up. One that takes long does not hold up the others: a
    worker more is started beside it, up to four times `workers`, for the rest of the batch.

    Args:
        workers: Number of processes, each grading one pair at a time.
        timeout_s: Seconds of wall clock for one answer; then its worker is killed, and the verdict is "timeout".
        memory_bytes: Address space of one worker. A worker that ends for want of memory, or dies in any other way
            over an answer, gives "timeout" too: the answer could not be graded within its limits. Where the algebra
            itself recovers from the want of memory, it finds the two sides unequal: "wrong".
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_bytes: int = 2 * 1024**3) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; give at least 1")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; give a number of seconds above 0")
        if memory_bytes < 256 * 1024**2:
            raise ValueError(
                f"memory_bytes is {memory_bytes}; computer algebra needs room, give at least {256 * 1024**2}"
            )
        self._lock = threading.Lock()  # held while the pool or the memo is in use
        self._memo: OrderedDict[_Pair, bool] = OrderedDict()
        self._pool = _Pool(workers, timeout_s, memory_bytes)
        weakref.finalize(self, self._pool.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. Grading again afterwards starts new ones."""
        with self._lock:
            self._pool.close()

    def grade(self, replies: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each reply, in order.

        Args:
            replies: Whole replies of the model, B of them.
            answers: The gold answer of each reply's question, B of them, as the data set has it.

        Raises:
            ValueError: The lengths differ, or a gold answer cannot be parsed (see `check_answers`).
            RuntimeError: Workers cannot be started, for example because math-verify is not installed.
        """
        if len(replies) != len(answers):
            raise ValueError(f"{len(replies)} replies but {len(answers)} answers; give one answer for each reply")
        stated = [extract_answer(reply) for reply in replies]
        pairs = [
            None if text is None else (_normalise(text), _normalise_gold(answer))
            for text, answer in zip(stated, answers, strict=True)
        ]
        known: dict[_Pair, Kind] = {}
        undecided: list[_Pair] = []
        for pair in dict.fromkeys(pairs):
            if pair is not None:
                is_right = _judge_here(*pair)
                if is_right is None:
                    undecided.append(pair)
                else:
                    known[pair] = "correct" if is_right else "wrong"
        if undecided:
            known |= self._grade_by_algebra(undecided)
        return [
            Verdict("unparsed" if pair is None else known[pair], text) for pair, text in zip(pairs, stated, strict=True)
        ]

    def _unusable(self, golds: Sequence[str]) -> list[str]:
        """Those of some normalised gold answers that the algebra cannot take."""
        with self._lock:
            outcomes = self._pool.run([("", gold) for gold in golds], check_gold_only=True)
        return [gold for (_, gold), outcome in outcomes.items() if outcome != _grading.CORRECT]

    def _grade_by_algebra(self, pairs: list[_Pair]) -> dict[_Pair, Kind]:
        known: dict[_Pair, Kind] = {}
        with self._lock:
            for pair in pairs:
                if pair in self._memo:
                    self._memo.move_to_end(pair)
                    known[pair] = "correct" if self._memo[pair] else "wrong"
            outcomes = self._pool.run([pair for pair in pairs if pair not in known])
            for pair, outcome in outcomes.items():
                if outcome == _grading.BAD_GOLD:
                    raise ValueError(f"gold answer {pair[1]!r} cannot be parsed; run check_answers on the data at load")
                if outcome is None:
                    # not remembered: on a less busy machine it may be graded in time
                    known[pair] = "timeout"
                    continue
                self._memo[pair] = outcome == _grading.CORRECT
                known[pair] = "correct" if self._memo[pair] else "wrong"
            while len(self._memo) > _MEMO_SIZE:
                self._memo.popitem(last=False)
        return known


def check_answers(answers: Iterable[str], timeout_s: float = 30.0) -> None:
    """Makes sure, once at load, that every gold answer can be graded against.

    Args:
        answers: Gold answers as the data set has them. Numbers and words cost nothing; formulas take workers.
        timeout_s: Seconds of wall clock for one answer.

    Raises:
        ValueError: Some answers are empty, not mathematics, or take longer than `timeout_s`; they are named.
    """
    bad = []
    formulas: dict[str, str] = {}
    for answer in dict.fromkeys(answers):
        if not isinstance(answer, str):
            raise TypeError(f"answer {answer!r} is of type {type(answer).__name__}; give answers as strings")
        gold = _normalise_gold(answer)
        if not gold:
            bad.append(answer)
        elif _canonical_number(gold) is None and _words(gold) is None:
            formulas[gold] = answer
    with Verifier(timeout_s=timeout_s) as verifier:
        bad += [formulas[gold] for gold in verifier._unusable(list(formulas))]
    if bad:
        named = ", ".join(repr(answer) for answer in bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise ValueError(f"{len(bad)} gold answers cannot be parsed: {named}; correct or drop these rows")
