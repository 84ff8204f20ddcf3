"""Where a result comes from: every file of results carries commit, date and versions, and is written whole."""

import json
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from expo.files import write_bytes_whole

RESULTS = Path(__file__).parent / "results"


def provenance(packages: Sequence[str]) -> dict[str, Any]:
    """Commit (with -dirty if the tree has changes), date, and the versions of `packages`, None where missing."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: installed_version(name) for name in packages},
    }


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes one JSON file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_whole(path, (json.dumps(results, indent=2) + "\n").encode("utf-8"))
