"""Checks of the vLLM engines that need no vLLM: what is installed, its version, and settings that cannot work."""

import importlib.util

import pytest
import torch

from expo.config import VllmSection
from expo.errors import ConfigError
from expo.rollout.vllm.common import version_warning
from expo.rollout.vllm.in_process import VllmEngine
from expo.train import main


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_missing_vllm_is_reported_with_the_command_that_installs_it(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main(["--rollout.engine=vllm", f"--run.dir={tmp_path / 'run'}"])
    assert exit_info.value.code == 2
    assert "make vllm-cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sleep_on_a_cpu_and_incomplete_tensor_parallel_groups_are_refused():
    def engine(num_ranks, **section):
        VllmEngine("m", None, frozenset(), VllmSection(**section), dtype=torch.float32, device=torch.device("cpu"),
                   num_replies=1, max_tokens=2, num_ranks=num_ranks)  # fmt: skip

    with pytest.raises(ConfigError, match=r"vllm\.sleep = true needs a GPU"):
        engine(1, sleep=True)
    with pytest.raises(ConfigError, match="does not divide the 3 ranks"):
        engine(3, tensor_parallel=2)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("0.31.2", "outside the versions"),
        ("0.32.0", None),
        ("0.32.1.post1+cpu", None),
        ("0.33.1", "never tested"),
        ("0.34.0", "outside the versions"),
        ("?", "outside the versions"),
    ],
)
def test_an_untested_vllm_version_gives_a_warning(found, expected):
    warning = version_warning(found)
    assert warning is None if expected is None else expected in warning
