"""Copies of the kernels with planted faults, imported in place of `expo_kernels._triton`."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import expo_kernels

PACKAGE = "expo_kernels._triton"


class Edit(NamedTuple):
    """Replace the first occurrence of a text after an anchor, which one file has once."""

    after: str
    old: str
    new: str

    def apply(self, folder: Path) -> None:
        """Edit the file of this folder that has the anchor."""
        sources = {path: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
        found = [path for path, source in sources.items() for _ in range(source.count(self.after))]
        assert len(found) == 1, f"{self.after!r} occurs in {[path.name for path in found]}; expected one occurrence"
        before, anchor, rest = sources[found[0]].partition(self.after)
        assert self.old in anchor + rest, f"{found[0].name} has no {self.old!r} after {self.after!r}"
        found[0].write_text(before + (anchor + rest).replace(self.old, self.new, 1), encoding="utf-8")


@contextmanager
def edited_kernels(folder: Path, *edits: Edit) -> Iterator[None]:
    """Inside the block, the kernels are those of an edited copy in `folder`."""
    copied = folder / "expo_kernels" / "_triton"
    shutil.copytree(Path(next(iter(expo_kernels.__path__))) / "_triton", copied)
    for edit in edits:
        edit.apply(copied)
    before = _forget()
    expo_kernels.__path__.insert(0, str(copied.parent))
    importlib.invalidate_caches()
    try:
        assert Path(importlib.import_module(f"{PACKAGE}.rows").__file__ or "").parent == copied
        yield
    finally:
        expo_kernels.__path__.remove(str(copied.parent))
        _forget()
        sys.modules.update(before)
        if PACKAGE in before:
            expo_kernels._triton = before[PACKAGE]


def _forget() -> dict[str, ModuleType]:
    """Remove the kernels' modules from the imported ones, and return them."""
    names = [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]
    if hasattr(expo_kernels, "_triton"):
        del expo_kernels._triton
    return {name: sys.modules.pop(name) for name in names}
