r"""The processes that grade outside the trainer's process: a template, and the workers that it forks.

`pool.py` runs it as `python -m expo.rewards.worker FD MEMORY_BYTES ALARM_S`. It is a separate program, not a
`multiprocessing` child, so that starting it never runs the trainer's main module again. The template imports and warms
up math-verify once, then only forks and kills workers: a new worker is ready in milliseconds and shares the memory of
the libraries. Replies are parsed by math-verify's LaTeX grammar; no string is evaluated as Python.

The template answers each message on its socket. For a message with a socket it forks a worker that serves that socket,
and sends its process id; for a process id it ends that worker and sends DONE. A worker receives the JSON list
`[answer, gold]`, or `[null, gold]` to check the gold answer only, and sends CORRECT, WRONG or BAD_GOLD. If a pair needs
too much memory, the worker ends without an answer.
"""

import functools
import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
from multiprocessing.connection import Connection
from typing import Any, Final

from expo.rewards.answers import words_of
from expo.rewards.messages import BAD_GOLD, CORRECT, DONE, READY, WRONG

# How often an idle process checks that its parent is alive. The end of the socket shows it at once, unless another
# process that the trainer forked still holds the trainer's end open.
_PARENT_CHECK_S: Final = 5.0
# Loose enough for 0.333333 against 1/3 (1e-6), and for values below 1 given to the six places compared.
_RELATIVE_TOLERANCE: Final = 1e-4
# The grammar fills its tables lazily: up to 0.1 s for the first use of each construction.
_WARM_UP: Final = (
    *(
        "1",
        "-2.5",
        r"\frac{1}{2}",
        "1/2",
        r"-\frac{\sqrt{3}}{2}",
        r"2\sqrt{5}+1",
        r"\frac{3\pi}{4}",
        "x=3",
        "3x^2-4x+1",
    ),
    *(
        "(1,2)",
        r"\left(\frac{1}{2},-3\right)",
        "[1,2)",
        r"(-\infty,2)\cup[3,\infty)",
        r"\{1,2,3\}",
        "1,2",
        "x>3",
        "2+3i",
    ),
    *(
        "50\\%",
        r"30^\circ",
        r"5\text{ cm}",
        r"\text{even}",
        "2^{10}",
        "y=2x+1",
        r"\log_2 3",
        r"\sin x",
        r"x\in[0,1]",
        "5!",
    ),
)


def serve(connection: Connection, alarm_s: int) -> None:
    """Grades until the connection closes, the parent dies, or a pair exceeds the memory limit.

    Args:
        connection: The worker's end of the socket.
        alarm_s: Seconds after which the kernel ends this process if a pair is still being graded. The trainer's own
            timeout is shorter: the alarm only matters if the trainer has died.
    """
    parent = os.getppid()
    # the default action runs no Python code: big-integer arithmetic would not let a handler run
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        while not connection.poll(_PARENT_CHECK_S):
            if os.getppid() != parent:
                return
        try:
            answer, gold = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        signal.alarm(alarm_s)
        try:
            outcome = _check(gold) if answer is None else _grade(answer, gold)
        except MemoryError:
            return
        finally:
            signal.alarm(0)
        connection.send_bytes(outcome)


def _check(gold: str) -> bytes:
    try:
        expression = _parse_gold(gold)
        return CORRECT if _is_equal(expression, expression) else BAD_GOLD
    except MemoryError:
        raise
    except Exception:  # the grammar and the algebra raise many unrelated types
        return BAD_GOLD


def _grade(answer: str, gold: str) -> bytes:
    try:
        gold_expression = _parse_gold(gold)
    except MemoryError:
        raise
    except Exception:
        return BAD_GOLD
    try:
        return CORRECT if _is_equal(gold_expression, _parse(answer)) else WRONG
    except MemoryError:
        raise
    except Exception:  # not a formula, or one that cannot be compared with the gold answer
        return WRONG


def _parse(latex: str) -> Any:
    from math_verify.parser import LatexExtractionConfig, normalize_latex, parse_latex_cached

    return parse_latex_cached(normalize_latex(latex, LatexExtractionConfig().normalization_config))


@functools.lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> Any:
    try:
        return _parse(gold)
    except MemoryError:
        raise
    except Exception:  # the grammar raises many unrelated types
        if words_of(gold) is None:
            raise
        # "north-east" is not a product of variables; as \text it is one symbol
        return _parse(rf"\text{{{gold}}}")


def _is_equal(gold_expression: Any, expression: Any) -> bool:
    from math_verify import verify

    # No time limit here: math-verify's is a signal handler, which long integer arithmetic does not let run.
    # An interval may be stated as an inequality, and vice versa.
    is_equal = verify(
        gold_expression, expression, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
    )
    return bool(is_equal) and not _differ_in_size(gold_expression, expression)


def _differ_in_size(gold_expression: Any, expression: Any) -> bool:
    """Whether two decimals that math-verify finds equal, since it compares six places, differ in relative terms.

    Six places alone would make 1e-8 equal to 1e-9 and to 0.
    """
    pair = (gold_expression, expression)
    if not all(getattr(side, "is_number", False) for side in pair):
        return False
    if not any(atom.is_Float for side in pair for atom in side.atoms()):
        return False
    gold, stated = (complex(side.doit()) for side in pair)
    return abs(gold - stated) > _RELATIVE_TOLERANCE * max(abs(gold), abs(stated))


def _fork_worker(control: socket.socket, fd: int, memory_bytes: int, alarm_s: int) -> int:
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    try:
        control.close()
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        serve(Connection(fd), alarm_s)
    finally:
        os._exit(0)  # skips the clean-up of the template


def _end_worker(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _manage(control: socket.socket, memory_bytes: int, alarm_s: int) -> None:
    """Forks and kills workers on request, until the trainer closes the socket or dies; then kills all workers."""
    trainer = os.getppid()
    workers: set[int] = set()
    try:
        while True:
            while not select.select([control], [], [], _PARENT_CHECK_S)[0]:
                if os.getppid() != trainer:
                    return
            message, fds, _, _ = socket.recv_fds(control, 64, 1)
            if not message:
                return
            if fds:
                pid = _fork_worker(control, fds[0], memory_bytes, alarm_s)
                workers.add(pid)
                control.sendall(str(pid).encode())
            else:
                # a dead worker is a zombie until now, so its process id cannot have been reused
                _end_worker(int(message))
                workers.remove(int(message))
                control.sendall(DONE)
    finally:
        for pid in workers:
            _end_worker(pid)


def _main() -> None:
    # the trainer handles an interrupt from the keyboard, and then closes the socket
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fd, memory_bytes, alarm_s = (int(word) for word in sys.argv[1:])
    logging.disable(logging.CRITICAL)
    for latex in _WARM_UP:
        _grade(latex + " ", latex)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()  # keeps the libraries' memory shared with the workers
    # from here on, only libraries would print, about the replies they parse
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with socket.socket(fileno=fd) as control:
        control.sendall(READY)
        _manage(control, memory_bytes, alarm_s)


if __name__ == "__main__":
    _main()
