"""Checkpoints on one rank: atomic writes, damage and retention. Many ranks: tests/ranks/test_saving.py."""

import json
import random

import numpy
import pytest
import torch

from expo.errors import CheckpointError
from expo.run.checkpoint import Checkpoints, Position
from expo.runtime.distributed import join_ranks

pytestmark = pytest.mark.medium


class Weights:
    """A policy with one tensor."""

    def __init__(self, value):
        self.value = value

    def save(self, folder):
        torch.save(self.value, folder / "weights.pt")

    def load(self, folder, other_ranks=False):
        self.value = torch.load(folder / "weights.pt")


def checkpoints(folder, config_hash="a"):
    return Checkpoints(folder, join_ranks("cpu", 60), config_hash)


def position(step, **more):
    return Position(step, {"pass_rates": torch.arange(3.0)}, torch.Generator().manual_seed(step).get_state(), **more)


def names(store):
    return [path.name for path in store.list()]


def test_the_whole_state_of_a_run_is_restored_with_equal_bits(tmp_path):
    store, weights = checkpoints(tmp_path), torch.randn(5)
    random.seed(3), numpy.random.seed(4), torch.manual_seed(5)
    store.save(position(3, bad_updates=2), Weights(weights))
    expected = random.random(), numpy.random.random(), torch.rand(())
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    restored = Weights(None)
    found = store.load(store.newest_whole(), restored)
    assert (found.step, found.bad_updates) == (3, 2)
    assert torch.equal(found.curriculum["pass_rates"], torch.arange(3.0))
    assert torch.equal(found.generator, position(3).generator)
    assert torch.equal(restored.value, weights)
    assert (random.random(), numpy.random.random(), torch.rand(())) == expected


def test_the_newest_and_the_best_are_kept(tmp_path):
    store = checkpoints(tmp_path)
    for step, score in ((1, 0.2), (2, 0.9), (3, None), (4, 0.3), (10, None)):
        store.save(position(step), Weights(step), score)
    store.retain(2, best=True)
    assert names(store) == ["step-000002", "step-000004", "step-000010"]
    store.retain(1, best=False)
    assert names(store) == ["step-000010"]
    assert (tmp_path / "latest").read_text() == "step-000010"


def test_the_last_good_checkpoint_is_kept_until_there_is_a_newer_one(tmp_path):
    store = checkpoints(tmp_path)
    for step, good_step in ((2, 1), (4, 3), (6, 3), (8, 3), (10, 3)):  # step 4 is in doubt
        store.save(position(step, good_step=good_step), Weights(step))
        store.retain(1, best=False, good_step=good_step)
    assert names(store) == ["step-000002", "step-000010"]
    assert store.newest_step(up_to=3) == 2
    assert store.newest_whole(up_to=3).name == "step-000002"
    assert store.newest_whole(up_to=1) is None
    store.save(position(12, good_step=11), Weights(12))
    store.retain(1, best=False, good_step=11)
    assert names(store) == ["step-000010", "step-000012"]
    store.delete_after(10)
    assert names(store) == ["step-000010"]


def test_scores_of_another_evaluation_do_not_count(tmp_path):
    store = checkpoints(tmp_path)
    for step, score in ((1, 0.9), (2, 0.3), (3, 0.2), (4, 0.1)):
        store.save(position(step), Weights(step), score)
    store.retain(1, best=True, scored_since=2)
    assert names(store) == ["step-000002", "step-000004"]


def test_a_checkpoint_with_the_digest_of_an_earlier_version_is_accepted(tmp_path):
    checkpoints(tmp_path, "earlier").save(position(1), Weights(1))
    store = Checkpoints(tmp_path, join_ranks("cpu", 60), "now", earlier_hash="earlier")
    assert store.newest_whole().name == "step-000001"


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert checkpoints(tmp_path / "nothing").newest_whole() is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "damage", "expected"),
    [
        ("policy/weights.pt", truncate, "bytes, expected"),
        ("policy/weights.pt", flip, "policy/weights.pt has changed"),
        ("position.pt", lambda path: path.unlink(), "position.pt is missing"),
        ("manifest.json", truncate, "JSONDecodeError"),
        ("manifest.json", lambda path: path.unlink(), "FileNotFoundError"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_skipped(tmp_path, capsys, file, damage, expected):
    store = checkpoints(tmp_path)
    store.save(position(1), Weights(torch.randn(100)))
    damage(store.save(position(2), Weights(torch.randn(100))) / file)
    assert store.newest_whole().name == "step-000001"
    message = capsys.readouterr().err
    assert "step-000002 is not whole" in message
    assert expected in message


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, capsys):
    checkpoints(tmp_path, "a").save(position(1), Weights(1))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoints(tmp_path, "b").newest_whole()
    assert "belongs to a run with other settings" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(tmp_path):
    store = checkpoints(tmp_path)
    store.save(position(1), Weights(1))

    class Full(Weights):
        def save(self, folder):
            (folder / "weights.pt").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        store.save(position(2), Full(2))
    assert store.newest_whole().name == "step-000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_an_existing_checkpoint_is_not_overwritten(tmp_path):
    store = checkpoints(tmp_path)
    store.save(position(1), Weights("first"))
    path = store.save(position(1), Weights("second"))
    assert torch.load(path / "policy/weights.pt") == "first"


def test_a_manifest_describes_the_checkpoint(tmp_path):
    path = checkpoints(tmp_path).save(position(7), Weights(1), score=0.5)
    facts = json.loads((path / "manifest.json").read_text())
    assert (facts["step"], facts["ranks"], facts["score"], facts["config_hash"]) == (7, 1, 0.5, "a")
    assert set(facts["files"]) == {"policy/weights.pt", "position.pt", "random-rank0.pt"}
