"""Runs with rollout.ahead, whose engine copies the policy's weights as servers do: which weights sample which step,
equal bits after an interruption at any moment, and syncs that did not happen.
"""

import itertools
import threading

import pytest
import torch

import expo.rollout.build
import expo.run.inputs
import expo.run.lifecycle
import expo.train
from expo.config import load_config
from expo.errors import CheckpointError, ConfigError, SyncError
from expo.learner.model import empty_copy
from expo.learner.policy import DeepSpeedPolicy
from expo.run.ahead import RolloutQueue
from expo.runtime.signals import StopSwitch
from expo.train import train
from tests.trainer.rollout.staging_engine import StagingEngine, skip_second_use
from tests.trainer.run.short_runs import quick, records_of, rewrite_manifest, weights_of

pytestmark = pytest.mark.medium

AHEAD = {"rollout__engine": "vllm-server", "objective__rollout_correction": "token", "run__steps": 6}


class CopyingEngine(StagingEngine):
    """An engine with a copy of the policy's weights."""

    def __init__(self, policy, config):
        model = empty_copy(policy.model, policy.dtype, torch.device("cpu"))
        super().__init__(model, policy, config.rollout.batch_size)
        self.sampled_in_main_thread = []

    def generate(self, requests, sampling, on_progress=None):
        self.sampled_in_main_thread.append(threading.current_thread() is threading.main_thread())
        return super().generate(requests, sampling, on_progress)


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    """The engines that runs have built."""
    built = []

    def build(config, policy, *_):
        built.append(CopyingEngine(policy, config))
        return built[-1]

    monkeypatch.setattr(expo.rollout.build, "_build_rank_engine", build)
    monkeypatch.setattr(expo.run.inputs, "check_engine", lambda _: None)  # that vLLM is installed
    monkeypatch.setattr(expo.run.lifecycle, "write_report", lambda _: "left out here")
    return built


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never interrupted, by rollout.ahead."""
    made = {}

    def run(ahead):
        if ahead not in made:
            made[ahead] = train(quick(tmp_path_factory.mktemp("whole"), rollout__ahead=ahead, **AHEAD))
        return made[ahead]

    return run


@pytest.mark.parametrize(("ahead", "ages"), [(0, [0] * 6), (1, [0, 1, 1, 1, 1, 1]), (2, [0, 1, 2, 2, 2, 2])])
def test_the_weights_of_a_step_follow_from_its_number(whole, engines, ahead, ages):
    rows = records_of(whole(ahead))["metrics"]
    assert [row["rollout_weights_age"] for row in rows] == ages
    assert all(row["sync_max_abs_dlogp"] < 5e-5 for row in rows)
    assert all(row["sync_weights_compared"] > 0 for row in rows)
    in_main_thread = [is_main for engine in engines for is_main in engine.sampled_in_main_thread]
    assert in_main_thread.count(ahead == 0) >= 6


def test_ahead_changes_the_run(whole):
    assert len({weights_of(whole(ahead)) for ahead in (0, 1, 2)}) == 3


PHASES = {
    "before a step is recorded": (expo.train, "step_row"),
    "before an update": (DeepSpeedPolicy, "update"),
    "while replies are prepared": (DeepSpeedPolicy, "prepare"),
    "while weights are staged": (RolloutQueue, "update_weights"),
    "while a step is taken": (RolloutQueue, "take"),
}


class Killed(BaseException):
    """Ends a run at a moment at which it saves nothing."""


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize(("phase", "call"), [(phase, call) for phase in PHASES for call in (2, 5)])
def test_a_run_killed_at_any_moment_ends_with_equal_bits(whole, tmp_path, monkeypatch, ahead, phase, call):
    config = quick(tmp_path, rollout__ahead=ahead, **{**AHEAD, "run__checkpoint_every": 2})
    owner, name = PHASES[phase]
    real, calls = getattr(owner, name), itertools.count(1)

    def call_or_die(*arguments):
        if next(calls) == call:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call_or_die)
        with pytest.raises(Killed):
            train(config)
    run = train(config, resume=True)
    assert weights_of(run) == weights_of(whole(ahead))
    assert records_of(run) == records_of(whole(ahead))


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("keeps", [True, False])
def test_a_stopped_run_ends_with_equal_bits(whole, tmp_path, monkeypatch, ahead, keeps):
    config = quick(tmp_path, rollout__ahead=ahead, rollout__keep_replies=keeps, **AHEAD)
    real, calls = DeepSpeedPolicy.prepare, itertools.count(1)

    def prepare(policy, samples):
        if next(calls) == 3:
            switches[-1].request("a test")
        return real(policy, samples)

    switches, listening = [], StopSwitch.listening
    with monkeypatch.context() as patch:
        patch.setattr(DeepSpeedPolicy, "prepare", prepare)
        patch.setattr(StopSwitch, "listening", lambda switch: switches.append(switch) or listening(switch))
        run = train(config)
    assert len(records_of_metrics(run)) == 2
    run = train(config, resume=True)
    assert weights_of(run) == weights_of(whole(ahead))


def records_of_metrics(run):
    return (run / "metrics.jsonl").read_text().splitlines()


def test_a_sync_that_did_not_happen_is_caught_before_its_replies_are_trained_on(tmp_path, monkeypatch):
    skip_second_use(monkeypatch, CopyingEngine)
    with pytest.raises(SyncError, match=r"rollout engine (and the policy differ|does not hold)"):
        train(quick(tmp_path, rollout__ahead=1, **{**AHEAD, "evaluation__every": 0}))
    assert len(records_of_metrics(tmp_path / "run")) == 3


def test_stale_weights_are_caught_before_their_replies_are_trained_on(tmp_path, monkeypatch):
    stage, stale = CopyingEngine.stage_weights, []

    def stage_stale(engine, weights):
        weights = [(name, weight.clone()) for name, weight in weights]
        stale.append(weights)
        return stage(engine, stale[-2] if len(stale) == 3 else weights)

    monkeypatch.setattr(CopyingEngine, "stage_weights", stage_stale)
    with pytest.raises(SyncError, match=r"rollout engine (and the policy differ|does not hold)"):
        train(quick(tmp_path, rollout__ahead=2, **AHEAD))


def test_an_error_of_the_engine_ends_the_run_where_its_step_is_taken(tmp_path, monkeypatch):
    real, calls = CopyingEngine.generate, itertools.count(1)

    def generate(engine, *arguments):
        if threading.current_thread() is not threading.main_thread() and next(calls) == 3:
            raise expo.errors.EngineError("planted")
        return real(engine, *arguments)

    monkeypatch.setattr(CopyingEngine, "generate", generate)
    with pytest.raises(expo.errors.EngineError, match="planted"):
        train(quick(tmp_path, rollout__ahead=1, **AHEAD))


@pytest.mark.parametrize(
    "damage",
    [
        lambda ahead: ahead.reverse(),
        lambda ahead: ahead.append(dict(ahead[-1], step=99)),
        lambda ahead: ahead[0].pop("rounds"),
        lambda ahead: ahead[0]["rounds"][0]["kinds"].pop(),
        lambda ahead: ahead[0].update(drawn=torch.tensor([10**6, 0])),
        lambda ahead: ahead[0].update(drawn="none"),
    ],
)
def test_a_checkpoint_whose_replies_do_not_fit_is_refused(tmp_path, damage):
    config = quick(tmp_path, rollout__ahead=2, **{**AHEAD, "run__checkpoint_every": 2, "run__keep_checkpoints": 9})
    run = train(config)
    checkpoint = run / "checkpoints" / "step-000002"
    position = torch.load(checkpoint / "position.pt", weights_only=True)
    assert [entry["step"] for entry in position["ahead"]] == [3, 4]
    damage(position["ahead"])
    torch.save(position, checkpoint / "position.pt")
    rewrite_manifest(checkpoint)
    for later in (run / "checkpoints").glob("step-*"):
        if later != checkpoint:
            later.rename(tmp_path / later.name)
    with pytest.raises(CheckpointError, match="step-000002"):
        train(config, resume=True)


def test_groups_without_signal_are_replaced_ahead_too(tmp_path):
    run = train(quick(tmp_path, rollout__ahead=1, rollout__max_resamples=2, **AHEAD))
    assert max(row["resampling_rounds"] for row in records_of(run)["metrics"]) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout.engine": "transformers"}, "rollout.ahead = 1 needs rollout.engine = vllm-server"),
        ({"objective.rollout_correction": None}, "rollout.ahead = 1 trains on replies of earlier weights"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    values = {"rollout.engine": "vllm-server", "rollout.ahead": 1, "objective.rollout_correction": "token", **settings}
    with pytest.raises(ConfigError, match=message):
        load_config(None, list(values.items()))


def test_old_logps_of_the_rollout_need_no_correction():
    values = {"rollout.engine": "vllm-server", "rollout.ahead": 1, "policy.old_logps": "rollout"}
    assert load_config(None, list(values.items())).rollout.ahead == 1
