"""The provenance of results: every file of results has commit, date, machine and versions."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from expo.runtime.atomic_io import write_bytes_whole

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("torch", "triton", "transformers", "deepspeed", "math-verify"),
    *("liger-kernel", "trl", "cut-cross-entropy", "quack-kernels"),
)


def stamp(device: torch.device) -> dict[str, Any]:
    """Commit, date, device, driver, versions (None if not installed), threads, and the current load average."""
    values = {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        values |= {"cuda": str(torch.version.cuda or torch.version.hip), "driver": driver()}
    return values


def commit() -> str:
    """Commit of the tree, with -dirty if files other than results were changed.

    Without git it is what the variable EXPO_COMMIT says, or "unknown".
    """
    commit_hash = _git("rev-parse", "--short=9", "HEAD")
    if commit_hash is None:
        return os.environ.get("EXPO_COMMIT", "unknown")
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{commit_hash}-dirty" if changed else commit_hash


def is_committed(commit_hash: str) -> bool:
    """Whether results of this commit, as `commit` names it, are those of a committed tree."""
    return commit_hash != "unknown" and not commit_hash.endswith("-dirty")


def cpu_name() -> str:
    """Model of the CPU."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def driver() -> str:
    """Version of the GPU's driver; "unknown" without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_whole(path, (json.dumps(results, indent=1) + "\n").encode("utf-8"))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
