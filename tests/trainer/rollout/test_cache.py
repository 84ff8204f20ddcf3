"""The reply cache: it is used if the same replies would be sampled again, and otherwise ignored with a message."""

import gzip
import io
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

pytestmark = pytest.mark.medium

REPLIES = [
    [Reply([5, 16, 2], [-0.1, -1 / 3, -2.5e-8], False, "à\n"), Reply([7], [-20.0], True, "")],
    [Reply([2], [-float("inf")], False, ""), Reply([9, 9], [-0.5, 0.0], True, "99")],
]
PROBE = torch.tensor([[-0.5, -1.5]])


class CacheUser:
    """A cache in `folder`; records its messages and the number of calls of `sample`."""

    def __init__(self, folder, settings="settings", probe=PROBE, is_on=True):
        self.messages, self.num_sampled = [], 0
        one_rank = Ranks(torch.device("cpu"), 0, 1)
        self.probe = probe
        self.cache = ReplyCache(folder / "rollouts", one_rank, settings, self.messages.append, is_on=is_on)

    def replies(self, step=5, round_index=0, question_ids=("a", "b")):
        return self.cache.replies(step, round_index, question_ids, lambda: self.probe, self.sample)

    def sample(self):
        self.num_sampled += 1
        return REPLIES


@pytest.fixture
def cached(tmp_path):
    """The only file in tmp_path/rollouts."""
    assert CacheUser(tmp_path).replies() == REPLIES
    (path,) = (tmp_path / "rollouts").iterdir()
    return path


def test_matching_replies_are_returned_unchanged(tmp_path, cached):
    later = CacheUser(tmp_path, probe=PROBE + 2e-5)
    assert later.replies() == REPLIES
    assert later.num_sampled == 0
    assert later.messages == [f"step 5: replies taken from {cached}"]


@pytest.mark.parametrize(
    ("options", "requested", "problem"),
    [
        ({"settings": "others"}, {}, "other settings"),
        ({"probe": PROBE + 1e-3}, {}, "other weights"),
        ({"probe": PROBE.expand(2, 2)}, {}, "other weights"),
        ({"probe": PROBE * float("nan")}, {}, "other weights"),
        ({}, {"question_ids": ("a", "c")}, "other questions"),
    ],
)
def test_replies_of_other_circumstances_are_sampled_again(tmp_path, cached, options, requested, problem):
    later = CacheUser(tmp_path, **options)
    later.replies(**requested)
    assert later.num_sampled == 1
    (line,) = later.messages
    assert line.startswith(f"step 5: {cached} is ignored")
    assert problem in line
    assert CacheUser(tmp_path, **options).replies(**requested) == REPLIES, "the file was not replaced"


def test_a_file_with_the_name_of_another_step_is_ignored(tmp_path, cached):
    shutil.copy(cached, cached.with_name("step-000006-round-1.gz"))
    later = CacheUser(tmp_path)
    later.replies(step=6, round_index=1)
    assert "other step, round" in later.messages[0]


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "empty", "not gzip", "not torch"])
def test_a_damaged_file_is_sampled_again(tmp_path, cached, damage):
    content = bytearray(cached.read_bytes())
    content[len(content) // 2] ^= 1
    cached.write_bytes(
        {
            "truncated": cached.read_bytes()[:-7],
            "one bit flipped": bytes(content),
            "empty": b"",
            "not gzip": b"something else",
            "not torch": gzip.compress(b"something else"),
        }[damage]
    )
    later = CacheUser(tmp_path)
    assert later.replies() == REPLIES
    assert later.num_sampled == 1
    assert "cannot be read" in later.messages[0]


def rewrite(path, change):
    """Changes the content of a file and leaves the file valid, as a script or an editor would."""
    content = torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)
    change(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(gzip.compress(buffer.getvalue(), compresslevel=0))


def set_first_logp(content):
    content["logps"][0] = -0.2


CHANGES = {
    "a log-probability": (set_first_logp, "its replies were changed"),
    "a text": (lambda content: content["texts"].__setitem__(0, "b"), "its replies were changed"),
    "an end": (lambda content: content["is_truncated"].__setitem__(0, True), "its replies were changed"),
    "the order": (lambda content: content["group_sizes"].__setitem__(slice(None), [1, 3]), "its replies were changed"),
    "the sizes": (lambda content: content["lengths"].__setitem__(0, 2), "cannot be read (ValueError)"),
    "a type": (lambda content: content.update(token_ids=content["token_ids"].long()), "its replies were changed"),
    "no tensor": (lambda content: content.update(token_ids=list(range(7))), "cannot be read (AttributeError)"),
    "no checksum": (lambda content: content.pop("checksum"), "an earlier version wrote it without a checksum"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_but_valid_file_is_not_trained_on(tmp_path, cached, change):
    function, problem = CHANGES[change]
    rewrite(cached, function)
    later = CacheUser(tmp_path)
    assert later.replies() == REPLIES
    assert later.num_sampled == 1
    assert problem in later.messages[0]
    rewrite(cached, lambda content: None)
    assert CacheUser(tmp_path).replies() == REPLIES, "a file that was not changed is used"


def test_a_file_that_unpacks_to_more_than_its_size_is_not_unpacked(tmp_path, cached):
    cached.write_bytes(gzip.compress(bytes(10**8)))
    later = CacheUser(tmp_path)
    later.replies()
    assert "cannot be read (EOFError)" in later.messages[0]


def test_a_checkpoint_drops_the_files_of_earlier_steps(tmp_path):
    user = CacheUser(tmp_path)
    for step in (3, 4, 5):
        user.replies(step=step)
    for name in (".step-000006-round-0.gz.part", "step-a-round-b.gz"):
        (tmp_path / "rollouts" / name).touch()
    user.cache.drop(4)
    left = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert left == ["step-000005-round-0.gz", "step-a-round-b.gz"]


def test_a_failed_write_gives_a_warning_and_the_replies(tmp_path):
    (tmp_path / "rollouts").write_text("in the way")
    user = CacheUser(tmp_path)
    assert user.replies() == REPLIES
    assert user.messages[0].startswith("warning: replies could not be kept")


def test_a_disabled_cache_writes_and_reads_nothing(tmp_path, cached):
    before = cached.read_bytes()
    off = CacheUser(tmp_path, is_on=False)
    off.replies()
    off.replies(step=6)
    assert (off.num_sampled, off.messages) == (2, [])
    assert [path.read_bytes() for path in cached.parent.iterdir()] == [before]


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
    original, calls = TransformersEngine.generate, []

    def generate(engine, requests, *rest):
        calls.append(requests)
        return original(engine, requests, *rest)

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    monkeypatch.setattr(expo.run.lifecycle, "write_report", lambda _: "not written")
    train(load_config(tmp_path / "killed" / "config.yaml", []), resume=True)
    rounds = {row["step"]: 1 + row["resampling_rounds"] for row in rows_of(tmp_path / "whole", "metrics")}
    assert len(calls) == rounds[6]
    for name in ("metrics", "completions", "curriculum"):
        left, right = ([untimed(row) for row in rows_of(tmp_path / run, name)] for run in ("whole", "killed"))
        assert left == right
    weights = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert list((tmp_path / "killed" / "rollouts").iterdir()) == []
