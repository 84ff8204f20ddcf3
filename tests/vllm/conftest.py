"""Models, policies and engines for tests on a real vLLM.

These tests run in the environment that `make vllm` sets up; elsewhere, without vLLM, they are not collected.
"""

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expo.config import load_config
from expo.errors import SyncError
from expo.learner.lora import adapted_layers
from expo.learner.policy import DeepSpeedPolicy
from expo.rollout import RolloutEngine, end_ids
from expo.rollout.vllm.common import lora_settings
from expo.rollout.vllm.in_process import VllmEngine
from expo.rollout.vllm.server import ServerEngine
from expo.rollout.vllm.transfer.files import WeightFiles
from expo.rollout.weight_sync import WeightSync, make_probe
from expo.runtime.distributed import join_ranks
from tests.leftovers import no_running_processes

MAX_TOKENS = 96
CACHE_GIB = 0.1  # of an engine; several live at once, and memory filled with NaN is not free
MOST_SERVERS = 2  # of `pairs` at once; each is three processes of about 0.7 GB
BY_PROBE = "nats on the probe"
LORA_RANK, LORA_ALPHA = 6, 12  # vLLM allocates rank 8
PROMPTS = [[5, 16, 7, 18, 9], [4, 4, 17, 3, 18], [8, 16, 2, 16, 6, 18], [15, 18]]

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@dataclass
class Pair:
    """A policy and an engine that holds a copy of its weights."""

    path: str
    policy: DeepSpeedPolicy
    engine: RolloutEngine
    sync: WeightSync
    start: dict[str, torch.Tensor]

    def restart(self):
        """Resets the policy's weights, so that rounding errors do not grow from test to test."""
        self.policy.model.load_state_dict(self.start)

    def move(self, seed, size=0.2):
        """Adds noise to every parameter that the policy trains; by default much noise."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)

    def require_large_updates_to_arrive(self):
        """Before each of three syncs the probe finds a difference, and afterwards none."""
        for seed in range(3):
            self.move(seed)
            with pytest.raises(SyncError, match="sync_tolerance"):
                self.sync.difference()
            assert self.sync.run() < 1e-5

    def require_small_updates_to_arrive(self, skip_sync):
        """A small update is below the probe's tolerance; after a skipped sync the comparison of weights finds it."""
        self.sync.run()
        assert self.sync.num_compared > 0
        self.move(20, size=3e-3)
        self.sync.difference()
        skip_sync()
        with pytest.raises(SyncError, match="does not hold the policy's"):
            self.sync.run()


def new_engine(path, policy, num_replies=32, *, takes_adapters=False):
    return VllmEngine(
        path,
        policy.tokenizer,
        end_ids(policy.model, policy.tokenizer),
        load_config(None).vllm.model_copy(update={"cache_gib": CACHE_GIB}),
        dtype=policy.dtype,
        device=torch.device("cpu"),
        num_replies=num_replies,
        max_tokens=MAX_TOKENS,
        engine_args=lora_settings(LORA_RANK, adapted_layers(policy.model)) if takes_adapters else None,
    )


def new_pair(path, dtype, folder=None, transfer="files", *, takes_adapters=False):
    """A pair with an in-process engine, or with a `folder` for its log, with a server and that weight transfer."""
    values = {
        "model.path": path, "data.max_prompt_tokens": 32, "rollout.max_new_tokens": MAX_TOKENS - 32,
        "rollout.batch_size": 32, "run.device": "cpu", "policy.dtype": dtype, "vllm.cache_gib": CACHE_GIB,
    }  # fmt: skip
    if folder is not None:
        values |= {"rollout.engine": "vllm-server", "vllm.transfer": transfer}
    if takes_adapters:
        values |= {"policy.lora_rank": LORA_RANK, "policy.lora_alpha": LORA_ALPHA, "vllm.lora": "adapter"}
        values |= {"optimizer.lr": 0.05, "optimizer.warmup_steps": 0}
        values.setdefault("rollout.engine", "vllm")
    config, ranks = load_config(None, list(values.items())), join_ranks("cpu", 60)
    policy = DeepSpeedPolicy(config, ranks)
    if folder is None:
        engine = new_engine(path, policy, takes_adapters=takes_adapters)
    else:
        (folder / "config.yaml").write_text(config.to_yaml())
        engine = ServerEngine(config, policy.tokenizer, end_ids(policy.model, policy.tokenizer), ranks, folder)
    sync = WeightSync(engine, policy, ranks, make_probe(PROMPTS, MAX_TOKENS), 1.0, None)
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    return Pair(path, policy, engine, sync, start)


def save_model(path, tokenizer, *, tied):
    config = AutoConfig.for_model(
        "qwen3", vocab_size=19, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=MAX_TOKENS, tie_word_embeddings=tied,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True, scope="session")
def _no_running_processes():
    """Checked when all of these tests have run, because `pairs` keeps its servers for several test files."""
    with no_running_processes():
        yield


@pytest.fixture(scope="session")
def pairs(ledger_model, tmp_path_factory):
    """Pairs by kind of output head, weight transfer (None: in-process engine), dtype, and whether weight syncs send
    LoRA adapters alone; created on first use and shared, since engines are slow to start. Of the servers, those that
    were used last keep running.
    """
    made = {}

    def close(key):
        engine = made.pop(key).engine
        engine.close()
        if isinstance(engine, ServerEngine) and isinstance(engine._weights, WeightFiles):
            assert not engine._weights.folder.exists()

    def pair(kind, transfer=None, *, dtype="float32", takes_adapters=False):
        key = (kind, transfer, dtype, takes_adapters)
        if key not in made:
            served = [other for other in made if other[1] is not None]
            if transfer is not None and len(served) == MOST_SERVERS:
                close(served[0])
            path = save_model(tmp_path_factory.mktemp(kind), ledger_model[1], tied=kind == "tied")
            folder = () if transfer is None else (tmp_path_factory.mktemp("server"), transfer)
            made[key] = new_pair(path, dtype, *folder, takes_adapters=takes_adapters)
        made[key] = made.pop(key)  # in the order of their last use
        made[key].restart()
        return made[key]

    yield pair
    for key in list(made):
        close(key)


@pytest.fixture
def pair(pairs):
    """The pair with a tied head and an in-process engine, after a sync."""
    found = pairs("tied")
    found.sync.run()
    return found


@pytest.fixture(params=["files", "broadcast"])
def served(pairs, request):
    """The pair with a tied head and a server, after a sync, for each weight transfer."""
    found = pairs("tied", request.param)
    found.sync.run()
    return found
