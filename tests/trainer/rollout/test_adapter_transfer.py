"""What a server is sent when weight syncs send LoRA adapters alone, and the adapter with which it starts."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from expo import serve
from expo.config import VllmSection, load_config
from expo.errors import ConfigError, EngineError
from expo.learner.model import architecture
from expo.rollout.vllm.client import ServerUnavailable
from expo.rollout.vllm.server import ServerEngine, _require_lora
from expo.rollout.vllm.transfer import broadcast
from expo.rollout.vllm.transfer.broadcast import WeightBroadcast
from expo.rollout.vllm.transfer.files import WeightFiles

BASE = {"a.weight": torch.ones(2, 3)}
CPU = torch.device("cpu")


class FakeServer:
    """Records what it is sent.

    unknown: the layers that it cannot adapt, per worker.
    """

    def __init__(self, url="http://a:1"):
        self.url, self.version, self.calls, self.unknown = url, "default", [], [[], []]
        self.fails_to_load = False

    def get(self, path):
        assert path == "/weight_info"
        return {"weight_version": self.version}

    def post(self, path, body=None):
        if path == "/update_weight_version":
            self.version = body["new_version"]
        elif path.startswith("/reset_prefix_cache"):
            self.calls.append("reset")
            return {"success": True}
        elif body["method"] != "pack_tied_head":
            is_adapter = body["method"] in ("read_adapter", "use_received_adapter")
            if is_adapter and self.fails_to_load:
                raise ServerUnavailable("it failed")
            self.calls.append((body["method"], *body.get("args", [])))
            return {"results": self.unknown if is_adapter else [None, None]}
        return None

    @contextmanager
    def understand(self, path):
        yield


def adapter(number):
    return {"a.lora_A.weight": torch.full((1, 3), float(number)), "a.lora_B.weight": torch.ones(2, 1)}


@pytest.fixture(params=["files", "broadcast"])
def transfer(request, monkeypatch):
    """A weight transfer with base weights, and its only server."""
    server = FakeServer()
    if request.param == "files":
        found = WeightFiles(None)
    else:
        found = WeightBroadcast([], 1, CPU, 60.0)
        found._channels[server.url] = broadcast._Channel(server, 2, 60.0)

        def send(channels, buckets, backend, version, is_adapter):
            assert backend == "tcp"
            (channel,) = channels
            sent = {name: value for bucket in buckets for name, value in bucket.tensors()}
            channel.server.calls.append(("sent", *sent))
            if not is_adapter:
                broadcast.activate(channel.server, version)

        monkeypatch.setattr(broadcast, "_broadcast", send)
    found.keep_base(BASE.items())
    yield found, server
    if request.param == "broadcast":
        found._channels.clear()  # there is no server whose group could be left
    found.close()


def kinds(server):
    """The calls of a server since the last: whether base weights or an adapter was loaded."""
    names = {"read_weights": "base", "read_adapter": "adapter", "use_received_adapter": "adapter", "reset": "reset"}
    found = [
        "base" if call == ("sent", *BASE) else names.get(call if call == "reset" else call[0]) for call in server.calls
    ]
    server.calls.clear()
    return [kind for kind in found if kind is not None]


def test_a_server_is_sent_the_base_weights_once_and_every_adapter(transfer):
    weights, server = transfer
    assert weights.version is None, "base weights alone are not what the policy samples with"
    weights.publish(adapter(0).items())
    weights.send(server, weights.version)
    assert server.version == weights.version
    assert kinds(server) == ["base", "reset", "adapter", "reset"]
    weights.publish(adapter(1).items())
    assert server.version != weights.version
    weights.send(server, weights.version)
    assert kinds(server) == ["adapter", "reset"]
    staged = weights.stage(adapter(2).items())
    weights.use(staged)
    weights.send(server, staged)
    assert (server.version, kinds(server)) == (staged, ["adapter", "reset"])


def test_a_restarted_server_is_sent_base_weights_and_adapter_again(transfer):
    weights, server = transfer
    weights.publish(adapter(0).items())
    weights.send(server, weights.version)
    kinds(server)
    server.version = "default"
    weights.send(server, weights.version)
    assert kinds(server) == ["base", "reset", "adapter", "reset"]
    server.version = f"{'0' * 32}{weights.version[32:]}"  # base weights of another run
    weights.send(server, weights.version)
    assert kinds(server) == ["base", "reset", "adapter", "reset"]


def test_a_server_that_did_not_load_the_adapter_does_not_have_its_name(transfer):
    weights, server = transfer
    weights.publish(adapter(0).items())
    server.fails_to_load = True
    with pytest.raises(ServerUnavailable):
        weights.send(server, weights.version)
    assert server.version != weights.version
    server.fails_to_load = False
    kinds(server)
    weights.send(server, weights.version)
    assert server.version == weights.version
    assert kinds(server) == ["adapter", "reset"], "the base weights had arrived"


def test_layers_that_vllm_cannot_adapt_are_named_with_the_way_out(transfer):
    weights, server = transfer
    server.unknown = [["a"], ["a", "b"]]
    weights.publish(adapter(0).items())
    with pytest.raises(EngineError, match=r"cannot adapt 2 layers .* such as a, .* take vllm\.lora = merged"):
        weights.send(server, weights.version)
    assert server.version != weights.version


def test_files_hold_the_base_weights_and_the_adapters_in_use():
    weights = WeightFiles(None)
    weights.keep_base(BASE.items())
    for number in range(3):
        weights.publish(adapter(number).items())
    base, used = sorted(weights.folder.iterdir(), key=lambda folder: len(folder.name))
    assert used.name == weights.version
    assert used.name.startswith(base.name)
    assert torch.equal(load_file(base / "00000.safetensors")["a.weight"], BASE["a.weight"])
    assert torch.equal(load_file(used / "00000.safetensors")["a.lora_A.weight"], adapter(2)["a.lora_A.weight"])
    weights.close()


# --- the server's start

ADAPTER = {"rollout.engine": "vllm-server", "vllm.lora": "adapter", "policy.lora_rank": 12}


def test_a_server_starts_with_an_adapter_that_changes_nothing(tmp_path):
    config = load_config(None, list(ADAPTER.items()))
    with serve.adapter_arguments(config, tmp_path) as lora:
        arguments = serve.server_arguments(config, "127.0.0.1", 8000, is_cpu=True, lora=lora)
        assert {"--enable-lora", "--max-lora-rank=16", "--max-loras=1"} <= set(arguments)
        first = arguments.index("--lora-target-modules") + 1
        assert arguments[first : first + 7] == lora["lora_target_modules"]
        module = json.loads(arguments[arguments.index("--lora-modules") + 1])
        (folder,) = tmp_path.iterdir()
        assert module == {"name": "policy", "path": str(folder)}
        weights = load_file(folder / "adapter_model.safetensors")
        layer = architecture(config.model).model.layers[0].self_attn.q_proj
        prefix = "base_model.model.model.layers.0.self_attn.q_proj"
        assert {name: tuple(value.shape) for name, value in weights.items()} == {
            f"{prefix}.lora_A.weight": (12, layer.in_features),
            f"{prefix}.lora_B.weight": (layer.out_features, 12),
        }
        assert not weights[f"{prefix}.lora_B.weight"].any()
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 12
    assert list(tmp_path.iterdir()) == []


def test_without_adapters_a_server_starts_as_before(tmp_path):
    config = load_config(None, [("rollout.engine", "vllm-server"), ("policy.lora_rank", 12)])
    with serve.adapter_arguments(config, tmp_path) as lora:
        assert lora == {}
        arguments = serve.server_arguments(config, "h", 1, is_cpu=True, lora=lora)
    assert not any(argument.startswith(("--enable-lora", "--lora")) for argument in arguments)


def test_a_server_without_the_adapters_rank_is_refused():
    _require_lora(FakeServer(), {"lora_config": {"max_lora_rank": 16}}, 16)
    for found, shown in (({"lora_config": None}, "None"), ({"lora_config": {"max_lora_rank": 8}}, "8")):
        with pytest.raises(ConfigError, match=f"has max_lora_rank = {shown}, but .* needs 16; start it with python -m"):
            _require_lora(FakeServer(), found, 16)


@pytest.mark.parametrize(("lora", "end"), [("adapter", r"start; .* take vllm\.lora = merged"), ("merged", "start")])
def test_a_server_that_does_not_start_may_need_merged_weights(lora, end):
    class Failing:
        def wait_until_ready(self):
            raise ConfigError("it does not start")

    engine = object.__new__(ServerEngine)
    engine._section = VllmSection(lora=lora)
    with pytest.raises(ConfigError, match=f"^it does not {end}$"):
        engine._wait_until_ready(Failing())
