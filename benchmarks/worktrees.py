"""Another commit's tree beside this one, for whatever sets two commits side by side."""

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextmanager
def checked_out(commit: str, folder: Path, ours: Sequence[str] = ("benchmarks",)) -> Iterator[Path]:
    """`folder` with a commit's tree, but this tree's folders of the names `ours`."""
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
        raise SystemExit(f"git {' '.join(arguments)} failed; give two commits of this repository")
