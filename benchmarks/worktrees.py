"""Checks out another commit into a folder, for tools that compare two commits."""

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextmanager
def checked_out(commit: str, folder: Path, ours: Sequence[str] = ("benchmarks",)) -> Iterator[Path]:
    """`folder` with the files of a commit, except the folders in `ours`, which are copied from this tree."""
    _git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        for name in ours:
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _git(*arguments: str) -> None:
    if subprocess.run(["git", *arguments], cwd=ROOT, check=False).returncode:
        raise SystemExit(f"git {' '.join(arguments)} failed; both commits must be in this repository")
