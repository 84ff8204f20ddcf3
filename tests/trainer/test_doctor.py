"""`expo-rl doctor`: versions, extras and devices as they are, and an exit code that says whether a check failed."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from expo import doctor
from expo.runtime import requirements
from expo.runtime.requirements import read_requirements
from tests.ranks.running import environment

TEXTS = [
    "torch>=2.9",
    'triton>=3.4; platform_system == "Nowhere"',
    'transformers<1; extra == "old"',
    'no-such-package[x]>=1,<2; extra == "absent"',
    'no-such-package; platform_system == "Nowhere" and extra == "elsewhere"',
    'peft>=0.17; extra == "lora"',
]


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.setattr(requirements.metadata, "requires", lambda _: TEXTS)


def test_each_extra_says_what_is_installed_and_what_is_missing(texts):
    found = read_requirements()
    assert found[""].installed == {"torch": metadata.version("torch")}
    assert found["lora"].installed == {"peft": metadata.version("peft")}
    assert found["old"].unmet == [f"transformers<1 (installed: {metadata.version('transformers')})"]
    assert found["absent"].unmet == ["no-such-package[x]>=1,<2"]
    assert (found["elsewhere"].installed, found["elsewhere"].unmet) == ({}, [])


def test_without_packaging_presence_alone_counts(texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    found = read_requirements()
    assert found["old"].installed == {"transformers": metadata.version("transformers")}
    assert found["absent"].unmet == ["no-such-package[x]>=1,<2"]
    assert found["elsewhere"].unmet == []


def test_a_source_tree_has_the_requirements_of_its_pyproject(monkeypatch):
    def not_installed(_):
        raise metadata.PackageNotFoundError

    expected = read_requirements()
    monkeypatch.setattr(requirements.metadata, "requires", not_installed)
    found = read_requirements()
    assert {"", "train", "lora", "trl", "vllm", "wandb", "dev"} <= set(found)
    assert found["lora"].installed == expected["lora"].installed
    monkeypatch.setattr(requirements, "PYPROJECT", requirements.PYPROJECT / "absent")
    assert list(read_requirements()) == [""]


def test_a_missing_extra_is_named_with_its_pip_line(texts):
    lines = "\n".join(doctor.package_lines(doctor.read_requirements()))
    assert 'missing: no-such-package[x]>=1,<2 (pip install "expo-rl[absent]")' in " ".join(lines.split())


def test_the_report_of_this_machine_fails_no_check(capsys):
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    for expected in (f"torch {torch.__version__}", f"transformers {metadata.version('transformers')}", "GiB free in"):
        assert expected in shown
    assert "cpu          25 checks agree with the float64 reference" in shown
    assert shown.endswith("\nno check failed\n")


def test_a_kernel_that_is_off_or_fails_is_a_failed_check(capsys, monkeypatch):
    def off(device):
        yield "float32", ("token_logps", float("nan"), 2e-5)
        yield "bfloat16", ("akl_beta", 1e-9, 1e-6)
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr("expo_kernels.__main__.all_checks", off)
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "FAILED  kernels on cpu: token_logps, float32: error nan, bound 2e-05\n" in shown
    assert "FAILED  kernels on cpu: RuntimeError: no kernel image\n" in shown


def test_every_gpu_is_listed_and_checked(capsys, monkeypatch):
    checked = []
    monkeypatch.setattr(doctor, "kernel_problems", lambda device: checked.append(str(device)) or (3, []))
    for name, value in {
        "device_count": 2, "mem_get_info": (2**30, 2**36), "get_device_capability": (9, 0), "get_device_name": "H200",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert doctor.main([]) == 0
    assert checked == ["cpu", "cuda:0", "cuda:1"]
    assert "  cuda:1       H200, 1.0 of 64.0 GiB free, sm_90\n" in capsys.readouterr().out


def test_a_driver_without_a_usable_gpu_is_mentioned(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "though a driver of NVIDIA is loaded: PyTorch" in " ".join(" ".join(doctor.machine_lines(torch)).split())


def test_without_torch_and_all_extras_the_report_is_still_made(tmp_path):
    script = """
import sys
class Missing:
    def find_spec(self, name, *_):
        root = name.split(".")[0]
        if root not in sys.stdlib_module_names and root != "expo":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from expo.__main__ import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "FAILED  torch cannot be imported: No module named 'torch'" in done.stdout
    assert "memory" in done.stdout
