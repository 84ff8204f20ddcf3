"""Replies kept on disk: taken up where they belong, ignored with a line where they do not."""

import gzip
import shutil

import pytest
import torch

import expo.run.lifecycle
from expo.config import load_config
from expo.rollout.cache import ReplyCache
from expo.rollout.transformers import TransformersEngine
from expo.runtime.distributed import Ranks
from expo.train import train
from expo.types import Reply
from tests.ranks.running import argv, launch, rows_of, run_launches, untimed

REPLIES = [
    [Reply([5, 16, 2], [-0.1, -1 / 3, -2.5e-8], False, "à\n"), Reply([7], [-20.0], True, "")],
    [Reply([2], [-float("inf")], False, ""), Reply([9, 9], [-0.5, 0.0], True, "99")],
]
PROBE = torch.tensor([[-0.5, -1.5]])


class Here:
    """A cache in `folder`, and what it says."""

    def __init__(self, folder, settings="settings", probe=PROBE, is_on=True):
        self.said, self.num_sampled = [], 0
        alone = Ranks(torch.device("cpu"), 0, 1)
        self.cache = ReplyCache(folder / "rollouts", alone, settings, lambda: probe, self.said.append, is_on=is_on)

    def replies(self, step=5, round_index=0, question_ids=("a", "b")):
        return self.cache.replies(step, round_index, question_ids, self.sample)

    def sample(self):
        self.num_sampled += 1
        return REPLIES


@pytest.fixture
def kept(tmp_path):
    """The only file in tmp_path/rollouts."""
    assert Here(tmp_path).replies() == REPLIES
    (path,) = (tmp_path / "rollouts").iterdir()
    return path


def test_what_belongs_is_taken_up_as_it_was(tmp_path, kept):
    later = Here(tmp_path, probe=PROBE + 2e-5)
    assert later.replies() == REPLIES
    assert later.num_sampled == 0
    assert later.said == [f"step 5: replies taken from {kept}"]


@pytest.mark.parametrize(
    ("place", "asked", "problem"),
    [
        ({"settings": "others"}, {}, "other settings"),
        ({"probe": PROBE + 1e-3}, {}, "other weights"),
        ({"probe": PROBE.expand(2, 2)}, {}, "other weights"),
        ({"probe": PROBE * float("nan")}, {}, "other weights"),
        ({}, {"question_ids": ("a", "c")}, "other questions"),
    ],
)
def test_what_was_sampled_otherwise_is_sampled_again(tmp_path, kept, place, asked, problem):
    later = Here(tmp_path, **place)
    later.replies(**asked)
    assert later.num_sampled == 1
    (line,) = later.said
    assert line.startswith(f"step 5: {kept} is ignored")
    assert problem in line
    assert Here(tmp_path, **place).replies(**asked) == REPLIES, "it was replaced"


def test_a_file_under_another_steps_name_is_ignored(tmp_path, kept):
    shutil.copy(kept, kept.with_name("step-000006-round-1.gz"))
    later = Here(tmp_path)
    later.replies(step=6, round_index=1)
    assert "other step, round" in later.said[0]


@pytest.mark.parametrize("way", ["cut", "changed", "empty", "foreign", "another's"])
def test_a_spoiled_file_is_sampled_again(tmp_path, kept, way):
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(
        {
            "cut": kept.read_bytes()[:-7],
            "changed": bytes(content),
            "empty": b"",
            "foreign": b"something else",
            "another's": gzip.compress(b"something else"),
        }[way]
    )
    later = Here(tmp_path)
    assert later.replies() == REPLIES
    assert later.num_sampled == 1
    assert "cannot be read" in later.said[0]


def test_a_checkpoint_drops_what_lies_before_it(tmp_path):
    here = Here(tmp_path)
    for step in (3, 4, 5):
        here.replies(step=step)
    (tmp_path / "rollouts" / ".step-000006-round-0.gz.part").touch()
    here.cache.drop(4)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-000005-round-0.gz"]


def test_a_disk_that_takes_no_more_is_told_of_and_survived(tmp_path):
    (tmp_path / "rollouts").write_text("in the way")
    here = Here(tmp_path)
    assert here.replies() == REPLIES
    assert here.said[0].startswith("warning: replies could not be kept")


def test_turned_off_nothing_is_written_or_read(tmp_path, kept):
    before = kept.read_bytes()
    off = Here(tmp_path, is_on=False)
    off.replies()
    off.replies(step=6)
    assert (off.num_sampled, off.said) == (2, [])
    assert [path.read_bytes() for path in kept.parent.iterdir()] == [before]


@pytest.mark.slow
def test_a_run_killed_after_sampling_samples_nothing_twice(tmp_path, monkeypatch):
    options = {"evaluation__sets": "{}", "rollout__max_resamples": 1}
    whole = argv(tmp_path, "whole", **options)
    killed = argv(tmp_path, "killed", **options)
    fault = {"phase": "gradient", "do": "kill", "nth": 5}
    codes = run_launches(
        tmp_path, [launch("whole", whole, ranks=1), launch("killed", killed, ranks=1, fault=fault)], ranks=1
    )
    assert codes == {"whole": [0], "killed": [-9]}
    steps = [row["step"] for row in rows_of(tmp_path / "killed", "metrics")]
    assert steps == [1, 2, 3, 4]
    real, calls = TransformersEngine.generate, []

    def generate(engine, requests, *rest):
        calls.append(requests)
        return real(engine, requests, *rest)

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    monkeypatch.setattr(expo.run.lifecycle, "write_report", lambda _: "left out here")
    train(load_config(tmp_path / "killed" / "config.yaml", []), resume=True)
    rounds = {row["step"]: 1 + row["resampling_rounds"] for row in rows_of(tmp_path / "whole", "metrics")}
    assert len(calls) == rounds[6]
    for name in ("metrics", "completions", "curriculum"):
        left, right = ([untimed(row) for row in rows_of(tmp_path / run, name)] for run in ("whole", "killed"))
        assert left == right
    weights = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert list((tmp_path / "killed" / "rollouts").iterdir()) == []
