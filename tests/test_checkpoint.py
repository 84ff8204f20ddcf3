"""Checkpoints: whole or not at all, newest first, and a broken one passed over."""

import pytest
import torch

from expo.checkpoint import list_checkpoints, load_newest, save_checkpoint
from expo.files import write_whole


def test_state_comes_back_with_equal_bits(tmp_path):
    weights = torch.randn(5)
    save_checkpoint(tmp_path, 3, {"weights": weights}, keep=2)
    state = load_newest(tmp_path)
    assert state["step"] == 3
    assert torch.equal(state["weights"], weights)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000010"]


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert load_newest(tmp_path / "nothing") is None


def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    save_checkpoint(tmp_path, 1, {"value": 1}, keep=5)
    newest = save_checkpoint(tmp_path, 2, {"value": 2}, keep=5)
    content = (newest / "state.pt").read_bytes()
    (newest / "state.pt").write_bytes(content[: len(content) // 2])
    assert load_newest(tmp_path)["value"] == 1
    assert "step-000002 cannot be read" in capsys.readouterr().err


def test_a_write_that_dies_leaves_the_old_contents(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def die(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, die)
    assert path.read_text() == "old"
    write_whole(path, lambda temporary: temporary.write_text("new"))
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 1, {"value": "old"}, keep=1)
    save_checkpoint(tmp_path, 1, {"value": "new"}, keep=1)
    assert load_newest(tmp_path)["value"] == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["step-000001"]
