"""The text of --gpus, and GPUs by the names that drivers report."""

import pytest

from expo.errors import ConfigError
from expo.learner.flops import PEAK_FLOPS
from expo.planning.gpus import KINDS, kind_named, parse_gpus


@pytest.mark.parametrize(
    ("text", "count", "memory_gib", "name"),
    [
        ("1x24GiB", 1, 24, None),
        ("8x80gb", 8, 80, None),
        ("40G", 1, 40, None),
        ("2 x 22.5 GiB", 2, 22.5, None),
        ("H100", 1, KINDS["h100"].memory_gib, "H100"),
        ("16xa100", 16, KINDS["a100"].memory_gib, "A100"),
        ("4xA100-40GB", 4, 40, "A100"),
        ("L4", 1, KINDS["l4"].memory_gib, "L4"),
        ("2x4090", 2, KINDS["rtx 4090"].memory_gib, "RTX 4090"),
        ("RTX 4090", 1, KINDS["rtx 4090"].memory_gib, "RTX 4090"),
    ],
)
def test_numbers_memories_and_names(text, count, memory_gib, name):
    gpus = parse_gpus(text)
    assert (gpus.count, gpus.memory_gib) == (count, memory_gib)
    assert (gpus.kind.name if gpus.kind else None) == name


WRONG = ["", "many", "0x80GiB", "8x", "x", "8x0GiB", "-1x80GiB", "8xH101", "1e9x80GiB", "9" * 99]


@pytest.mark.parametrize("text", WRONG)
def test_other_texts_are_refused_with_the_known_names(text):
    with pytest.raises(ConfigError, match=r"is not understood; expected .* 8x80GiB or 8xH100; .* A100, .* 4090"):
        parse_gpus(text)


def test_every_kind_has_a_peak():
    assert {kind.name for kind in KINDS.values()} <= set(PEAK_FLOPS)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla T4", None),
    ],
)
def test_devices_by_the_names_of_their_drivers(device, name):
    kind = kind_named(device)
    assert (kind.name if kind else None) == name
