"""Wheel and source distribution: what is in them, and that an environment with PyTorch alone can use the wheel."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests import ROOT
from tests.ranks.running import environment_of_no_rank

pytestmark = pytest.mark.slow

BUILD = "from setuptools import build_meta; build_meta.build_sdist({out!r}); build_meta.build_wheel({out!r})"
PACKAGES = ("expo/", "expo_kernels/")


def tracked():
    """The files of the source tree that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def closure(name, found):
    """The installed distributions that one needs, itself included."""
    if name.lower() in found:
        return found
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:  # of another platform
        return found
    found[name.lower()] = distribution
    for text in distribution.requires or []:
        if "extra ==" not in text:
            closure(re.match(r"[\w.-]+", text)[0], found)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of both distributions, built from a copy of the tracked files as `python -m build` does it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-c", BUILD.format(out=str(out))]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return out


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory):
    """The folder of executables of an environment that has the wheel, PyTorch, Triton and what they need."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    needed = closure("torch", {})
    closure("triton", needed)
    for distribution in needed.values():
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--no-cache-dir"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return python.parent


def call(bare, folder, *command):
    outer = {name: value for name, value in environment_of_no_rank().items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [bare / command[0], *command[1:]], cwd=folder, env=outer, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == {
        name for name in tracked() if name.startswith(PACKAGES)
    }
    assert entry_points.split() == ["[console_scripts]", "expo-rl", "=", "expo.__main__:console"]


def test_the_source_distribution_holds_the_packages_and_no_tests(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    packaged = {name for name in tracked() if name.startswith(PACKAGES)}
    assert packaged | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs", "runs"))]


def test_the_metadata_is_that_of_the_project(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(path).decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.findall(r"^Classifier: (.*)$", text, flags=re.MULTILINE) == project["classifiers"]
    assert re.findall(r"^Provides-Extra: (.*)$", text, flags=re.MULTILINE) == list(project["optional-dependencies"])
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert text.partition("\n\n")[2] == Path(ROOT / "README.md").read_text(encoding="utf-8")


def test_with_pytorch_alone_the_loss_works_and_the_commands_say_what_is_missing(bare, tmp_path):
    where = call(bare, tmp_path, "python", "-c", "import expo; print(expo.__file__)").stdout
    assert where.startswith(str(bare.parent))
    assert not (bare / "expo").exists()  # another tool's name
    shown = call(bare, tmp_path, "expo-rl", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: expo-rl COMMAND")
    trained = call(bare, tmp_path, "expo-rl", "train")
    assert trained.returncode == 2
    assert trained.stderr.splitlines()[-1].startswith("expo-rl train: error: the package pydantic is not installed; ")
    doctor = call(bare, tmp_path, "expo-rl", "doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert '(pip install "expo-rl[train]")' in " ".join(doctor.stdout.split())
    assert "checks agree with the float64 reference" in doctor.stdout
