"""Requests to stop: signals are recorded, and the second Ctrl-C ends a process that computes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from expo.errors import Interrupted, OutputError, StopRequested
from expo.runtime.signals import CLOSED_STDOUT, StopSwitch, raise_reason
from tests.ranks.running import environment

COMPUTING = """
import hashlib, sys
from expo.runtime.signals import StopSwitch
switch = StopSwitch(on_interrupt="it saves")
with switch.listening():
    print("computing", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))  # no handler of Python's runs meanwhile
    print(switch.reason)
"""
FOREVER, BRIEF = 2 * 10**9, 3 * 10**6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_recorded_and_the_handlers_are_restored(number, capfd):
    switch, before = StopSwitch(on_interrupt="it saves"), signal.getsignal(number)
    with switch.listening():
        switch.check()
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequested, match=number.name):
            switch.check()
        time.sleep(0.1)
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1
    said = capfd.readouterr().err
    assert said == ("Ctrl-C: it saves; press Ctrl-C again to end at once without saving\n" * (number == signal.SIGINT))


def compute(tmp_path, rounds):
    process = subprocess.Popen(
        [sys.executable, "-c", COMPUTING, str(rounds)],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "computing\n"
    process.send_signal(signal.SIGINT)
    return process


def test_the_second_interrupt_ends_a_computation_at_once(tmp_path):
    process = compute(tmp_path, FOREVER)
    assert process.stderr.readline().startswith("Ctrl-C: it saves"), "it is answered during the computation"
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, problems = process.communicate(timeout=20)
    assert process.returncode == 130
    assert problems == "Ctrl-C again: ended at once\n"


def test_an_interrupt_that_a_launcher_repeats_counts_once(tmp_path):
    process = compute(tmp_path, BRIEF)
    process.send_signal(signal.SIGINT)
    out, problems = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "SIGINT\n")
    assert problems.count("\n") == 1


def test_the_reason_decides_the_exit_code():
    raise_reason("SIGTERM", "text")
    raise_reason(None, "text")
    with pytest.raises(Interrupted, match="text") as stop:
        raise_reason("SIGINT", "text")
    assert stop.value.exit_code == 130
    with pytest.raises(OutputError, match="stdout cannot be written: text") as stop:
        raise_reason(CLOSED_STDOUT, "text")
    assert stop.value.exit_code == 1
