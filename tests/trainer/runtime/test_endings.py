"""How a command ends: errors of files and disks, closed stdout and Ctrl-C are one line with an exit code."""

import errno
import importlib
import os
import shlex
import subprocess
import sys

import pytest

from expo.errors import ConfigError, FolderError
from expo.runtime.console import Display
from expo.runtime.endings import disk_error, errors_on_one_line
from expo.runtime.stdout import write_stdout
from tests.ranks.running import environment

SCRIPT = """
from expo.runtime.console import Display
from expo.runtime.stdout import write_stdout
from expo.runtime.endings import errors_on_one_line
with errors_on_one_line("program"):
    {body}
"""


def ending(capsys, error):
    """The exit code and the line on stderr of a command that raises the error."""
    with pytest.raises(SystemExit) as stop, errors_on_one_line("program"):
        raise error
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EDQUOT, "Disk quota exceeded"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
        (errno.EPERM, "Operation not permitted"),
        (errno.ENAMETOOLONG, "File name too long"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_an_error_of_a_disk_is_one_line(capsys, number, expected):
    code, text = ending(capsys, OSError(number, os.strerror(number), "some/file"))
    assert code == 1
    assert text == f"program: error: some/file: {expected}; check the path, its permissions and the free space\n"


def test_errors_of_ours_and_interrupts_are_one_line(capsys):
    assert ending(capsys, ConfigError("wrong")) == (2, "program: error: wrong\n")
    assert ending(capsys, FolderError("full")) == (1, "program: error: full\n")
    assert ending(capsys, KeyboardInterrupt()) == (130, "program: ended by Ctrl-C\n")


@pytest.mark.parametrize("error", [ConnectionRefusedError(errno.ECONNREFUSED, "refused"), KeyError("x")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), errors_on_one_line("program"):
        raise error


def test_errors_of_disks_that_libraries_wrap_are_recognised():
    wrapped = Exception("Error while serializing: IoError(No space left on device (os error 28))")
    assert disk_error(wrapped).errno == errno.ENOSPC
    assert disk_error(OSError(errno.EIO, "x")).errno == errno.EIO
    assert disk_error(ValueError("x")) is None


COMMANDS = {
    "expo.train": ("train", []),
    "expo.evaluate": ("evaluate_model", ["ledger", "--sets", "ledger:held_out"]),
    "expo.export": ("export", ["run"]),
    "expo.doctor": ("examine", []),
    "expo.data.__main__": ("find_overlap", ["check", "arithmetic:train", "--against", "arithmetic:held_out"]),
    "expo.evaluation.compare": ("read_results", ["a", "b"]),
    "expo.report": ("write_report", ["run"]),
    "expo.experiments.ablation.command": ("run_all", ["--out", "ablation", "--seeds=2"]),
    "expo.experiments.ablation.page": ("section", ["ablation", "page.md"]),
    "expo.experiments.smollm2": ("convert", ["model"]),
    "expo.ledger.warm_start": ("make", ["--out", "model"]),
    "expo.serve": ("read_key", []),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("error", "codes"),
    [
        (KeyboardInterrupt(), [130]),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), [1, 2]),
        (OSError(errno.ENOSPC, "No space left on device", "f"), [1, 2]),
    ],
)
def test_every_command_ends_with_one_line(capsys, tmp_path, monkeypatch, name, error, codes):
    def work(*_, **__):
        raise error

    module, (function, argv) = importlib.import_module(name), COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "results.json").write_text("{}")
    monkeypatch.setattr(module, function, work)
    with pytest.raises(SystemExit) as stop:
        module.main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code in codes
    assert len(lines) == 1
    assert "Traceback" not in lines[0]


def test_before_the_ranks_join_the_first_of_each_node_prints_its_error(capsys, monkeypatch):
    named = "program: error: rank 3: wrong\n"
    for rank, local_rank, has_joined, printed in [
        ("3", "0", False, named),
        ("4", "1", False, ""),
        ("3", "0", True, ""),
    ]:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setattr("torch.distributed.is_initialized", lambda joined=has_joined: joined)
        assert ending(capsys, ConfigError("wrong")) == (2, printed)


PROGRAM = """
import atexit, sys, threading, time
from expo.runtime.endings import run_and_exit

class Global:
    def __del__(self):
        sys.stderr.write("the interpreter was finalized")

def work():
    time.sleep(0.2)
    print("thread")

def main():
    atexit.register(print, "exit handler", end="")
    threading.Thread(target=work).start()
    {end}

kept = Global()
run_and_exit(main)
"""


@pytest.mark.parametrize(("end", "code"), [("return 0", 0), ("return 3", 3), ("sys.exit(75)", 75)])
def test_a_program_ends_without_finalizing_the_interpreter(tmp_path, end, code):
    # there, a thread of Gloo that releases a tensor would abort the process
    command = [sys.executable, "-c", PROGRAM.format(end=end)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "thread\nexit handler", "")


def test_an_unexpected_error_of_a_program_keeps_its_traceback(tmp_path):
    command = [sys.executable, "-c", PROGRAM.format(end="raise KeyError('x')")]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "KeyError: 'x'" in done.stderr


BODIES = ["write_stdout('x' * 9)", "print('x' * 9)", "Display().line('x' * 9)"]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("stdout", ["pipe", "full"])
def test_a_stdout_that_cannot_be_written_is_one_line(tmp_path, body, stdout):
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(body=body)],
            env=environment(tmp_path),
            stdout=write if stdout == "pipe" else full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert ("Broken pipe" if stdout == "pipe" else "No space left") in done.stderr


def test_a_process_without_stdout_is_refused(tmp_path):
    command = shlex.join([sys.executable, "-c", SCRIPT.format(body="pass")]) + " >&-"
    done = subprocess.run(
        command, shell=True, env=environment(tmp_path), stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        2,
        "program: error: stdout is closed; redirect it to a file or to /dev/null\n",
    )


def test_a_display_reports_a_closed_stdout_once_and_is_silent_afterwards(monkeypatch):
    class Closed:
        encoding = "utf-8"

        def write(self, _):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        flush = isatty = fileno = lambda _: 0

    reasons = []
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr("expo.runtime.stdout.discard_stdout", lambda: None)
    display = Display(on_closed=reasons.append)
    display.line("first")
    assert reasons == ["Broken pipe"]


def test_stdout_is_written(capsys):
    write_stdout("text\n")
    Display().line("line")
    assert capsys.readouterr().out == "text\nline\n"
