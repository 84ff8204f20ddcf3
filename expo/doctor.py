"""What this machine can run: `python -m expo.doctor` prints versions, devices, memory, disk space, which extras are
installed, and whether the loss agrees with its float64 reference on every device.

Only the standard library is imported at first: a package that is missing is reported.
"""

import os
import platform
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from expo.errors import first_line
from expo.runtime.endings import errors_on_one_line
from expo.runtime.host import total_memory
from expo.runtime.parser import OneLineParser
from expo.runtime.requirements import Requirements, installed_version, read_requirements
from expo.runtime.stdout import write_stdout

PROGRAM = "python -m expo.doctor"
GIB = 2**30
WIDTH = 100  # columns
NAME_WIDTH = 13
GLUE = "\N{NO-BREAK SPACE}"  # a space at which no line is broken
SHARED = Path("/dev/shm")  # where processes share memory; small in many containers
NVIDIA = Path("/dev/nvidiactl")  # exists where NVIDIA's driver is loaded


def package_lines(found: Mapping[str, Requirements]) -> Iterator[str]:
    """A line for the package itself and for each extra: what is installed, what is missing, how to install it."""
    for extra, requirements in found.items():
        installed = ", ".join(f"{name}{GLUE}{version}" for name, version in requirements.installed.items())
        missing = ", ".join(requirements.unmet)
        parts = [installed] if installed else []
        if missing:
            what = f"expo-rl[{extra}]" if extra else "expo-rl"
            parts.append(f'missing: {missing} (pip install "{what}")')
        yield _line(extra or "expo-rl", "; ".join(parts))


def machine_lines(torch: Any) -> Iterator[str]:
    """A line for the processor, the memory, each GPU and each folder that takes much space.

    Args:
        torch: the module; None if it cannot be imported.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = f"; PyTorch's threads: {torch.get_num_threads()}" if torch else ""
    yield _line("processor", f"{cores} cores, {platform.machine()}{threads}")
    yield _line("memory", f"{total_memory() / GIB:.1f} GiB")
    if torch:
        yield from _gpu_lines(torch)
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    folders = {"this folder": Path.cwd(), "hub cache": hub, "temporary": Path(tempfile.gettempdir()), "shared": SHARED}
    for name, folder in folders.items():
        if folder == SHARED and not folder.is_dir():  # not on Linux
            continue
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        yield _line(name, f"{shutil.disk_usage(existing).free / GIB:.1f} GiB free in {folder}")


def _gpu_lines(torch: Any) -> Iterator[str]:
    count = torch.cuda.device_count()
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        text = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, sm_{major}{minor}"
        yield _line(f"cuda:{index}", text)
    if not count:
        hint = ""
        if NVIDIA.exists():
            build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
            hint = f", though a driver of NVIDIA is loaded: PyTorch {torch.__version__} {build}"
        yield _line("GPU", f"none{hint}")


def kernel_problems(device: Any) -> tuple[int, list[str]]:
    """How many checks of expo_kernels ran on a device, and what is wrong: errors above the documented bounds."""
    from expo_kernels.__main__ import all_checks

    count, problems = 0, []
    try:
        for dtype, (op, error, bound) in all_checks(device):
            count += 1
            if not error <= bound:  # also if it is NaN
                problems.append(f"{op}, {dtype}: error {error:.1e}, bound {bound:.0e}")
    except Exception as error:  # whatever a compiler or a driver raises
        problems.append(f"{type(error).__name__}: {first_line(error)}")
    return count, problems


def _line(name: str, text: str) -> str:
    indent = " " * (NAME_WIDTH + 2)
    lines = textwrap.fill(
        f"  {name:{NAME_WIDTH}}{text}", WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return lines.replace(GLUE, " ")


def examine() -> int:
    """Prints the report; returns the number of checks that failed."""
    version = installed_version("expo-rl") or "of a source tree"
    write_stdout(f"expo-rl {version}, Python {platform.python_version()}, {platform.platform()}\n\npackages\n")
    found = read_requirements()
    write_stdout("\n".join(package_lines(found)) + "\n\nmachine\n")
    problems = [f"{text} is needed, but missing" for text in found[""].unmet]
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        torch = None  # type: ignore[assignment]
        problems.append(f"torch cannot be imported: {first_line(error)}")
    write_stdout("\n".join(machine_lines(torch)) + "\n\nkernels\n")
    if torch is not None:
        devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
        for device in devices:
            count, wrong = kernel_problems(device)
            result = "; ".join(wrong) or f"{count} checks agree with the float64 reference"
            write_stdout(_line(str(device), result) + "\n")
            problems += [f"kernels on {device}: {problem}" for problem in wrong]
    else:
        write_stdout(_line("none", "not checked: they need torch") + "\n")
    write_stdout("\n" + ("".join(f"FAILED  {problem}\n" for problem in problems) or "no check failed\n"))
    return len(problems)


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`. Exit codes: 0 if no check failed, 1 if one did, 2 if the command line is wrong. A
    missing extra is no failure.
    """
    OneLineParser(
        prog=prog,
        description="Print versions, devices, memory, disk space and missing extras, and check the kernels against "
        "float64. The exit code is 1 if a check fails; a missing extra is no failure.",
    ).parse_args(argv)
    with errors_on_one_line(prog):
        return int(examine() > 0)


if __name__ == "__main__":
    sys.exit(main())
