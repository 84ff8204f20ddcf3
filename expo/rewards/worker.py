r"""The processes that grade outside the trainer's process: a template, and the workers that it forks.

`pool.py` runs it as `python -m expo.rewards.worker FD MEMORY_BYTES ALARM_S METHOD`. It is a separate program, not a
`multiprocessing` child, so that starting it never runs the trainer's main module again. The template imports and warms
up the grader's libraries once (`graders.py`), then only forks and kills workers: a new worker is ready in milliseconds
and shares the memory of the libraries. Replies are parsed by grammars; no string is evaluated as Python.

The template answers each message on its socket. For a message with a socket it forks a worker that serves that socket,
and sends its process id; for a process id it ends that worker and sends DONE. A worker receives the JSON list
`[answer, gold]`, or `[null, gold]` to check the gold answer only, and sends the grader's message. If a pair needs too
much memory, the worker ends without an answer.
"""

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
from typing import Final

from expo.rewards.graders import Grader, load_grader
from expo.rewards.messages import DONE, READY

# How often an idle process checks that its parent is alive. The end of the socket shows it at once, unless another
# process that the trainer forked still holds the trainer's end open.
_PARENT_CHECK_S: Final = 5.0
Limits = tuple[int, int]  # bytes of address space, seconds until the kernel's alarm


def serve(connection: Connection, grader: Grader, alarm_s: int) -> None:
    """Grades until the connection closes, the parent dies, or a pair exceeds the memory limit.

    Args:
        connection: The worker's end of the socket.
        grader: Gives the message for a pair.
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
            outcome = grader(answer, gold)
        except MemoryError:
            return
        finally:
            signal.alarm(0)
        connection.send_bytes(outcome)


def _fork_worker(control: socket.socket, fd: int, grader: Grader, limits: Limits) -> int:
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    try:
        control.close()
        memory_bytes, alarm_s = limits
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        serve(Connection(fd), grader, alarm_s)
    finally:
        os._exit(0)  # skips the clean-up of the template


def _end_worker(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _manage(control: socket.socket, grader: Grader, limits: Limits) -> None:
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
                pid = _fork_worker(control, fds[0], grader, limits)
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
    *numbers, method = sys.argv[1:]
    fd, memory_bytes, alarm_s = (int(word) for word in numbers)
    logging.disable(logging.CRITICAL)
    grader = load_grader(method)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()  # keeps the libraries' memory shared with the workers
    # from here on, only libraries would print, about the replies they parse
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with socket.socket(fileno=fd) as control:
        control.sendall(READY)
        _manage(control, grader, (memory_bytes, alarm_s))


if __name__ == "__main__":
    _main()
