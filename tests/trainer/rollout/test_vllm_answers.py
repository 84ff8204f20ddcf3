"""Answers of a server that is not what it should be: one line that names the server and the call, and no wait."""

import json
import threading
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import pytest

from expo.config import load_config
from expo.errors import ConfigError, EngineError
from expo.rollout import GenerationRequest, Sampling
from expo.rollout.vllm import client
from expo.rollout.vllm.client import Server
from expo.rollout.vllm.server import ServerEngine, require_settings
from expo.rollout.vllm.transfer.interface import activate, weight_version


class Answering(BaseHTTPRequestHandler):
    """Answers every call with the same bytes."""

    content: ClassVar = b""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        with suppress(BrokenPipeError):  # the client has seen enough
            self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield Server(f"http://127.0.0.1:{found.server_port}", 20.0)
        found.shutdown()


REQUEST = uuid.UUID(int=7)  # of every request here


def choice(**changes):
    entry = {"logprob": -0.5, "top_logprobs": [{"token_id": 5, "logprob": -0.5}]}
    found = {"finish_reason": "stop", "token_ids": [5], "logprobs": {"content": [entry]}}
    answer = {"choices": [{**found, "weight_versions": [{"version": "v"}], **changes}]}
    return {"request_id": f"generate-tokens-{REQUEST.hex}", **answer}


FORMS = {
    "no JSON": b"<html>",
    "not UTF-8": b"\xff\xfe",
    "100,000 brackets": b"[" * 100_000,
    "5,000 digits": b"9" * 5000,
    "a number": b"5",
    "a text": b'"a"',
    "a list": b"[1]",
    "an empty mapping": b"{}",
    "null": b"null",
    "nothing": b"",
}
CHOICES = {
    "no choice": {"request_id": REQUEST.hex, "choices": []},
    "two choices": {"request_id": REQUEST.hex, "choices": [5, 5]},
    "no request": {"choices": choice()["choices"]},
    "no tokens": choice(token_ids=[], logprobs={"content": []}),
    "tokens without log-probs": choice(token_ids=[5, 6]),
    "more tokens than wanted": choice(token_ids=[5] * 9, logprobs={"content": [{"logprob": 0.0}] * 9}),
    "negative tokens": choice(token_ids=[-1]),
    "tokens that are text": choice(token_ids=["5"]),
    "huge tokens": choice(token_ids=[2**40]),
    "log-probs that are text": choice(logprobs={"content": [{"logprob": "x"}]}),
    "log-probs that are NaN": choice(logprobs={"content": [{"logprob": float("nan")}]}),
    "versions that are none": choice(weight_versions=[5]),
    "no log-probs": choice(logprobs=None),
}


@pytest.fixture
def engine(server, ledger_model, monkeypatch):
    found = object.__new__(ServerEngine)
    found._config = SimpleNamespace(rollout=SimpleNamespace(batch_size=4))
    found._section = SimpleNamespace(patience_s=20.0, lora="merged")
    found._tokenizer, found._end_ids, found._version = ledger_model[1], frozenset({1}), "v"
    found._servers, found._supervisors = [server], []
    monkeypatch.setattr("expo.rollout.vllm.server.uuid.uuid4", lambda: REQUEST)
    return found


def answer_with(monkeypatch, content):
    monkeypatch.setattr(Answering, "content", content)


@pytest.mark.parametrize("name", [*FORMS, *CHOICES])
def test_replies_of_another_form_are_named(engine, monkeypatch, name):
    answer_with(monkeypatch, FORMS[name] if name in FORMS else json.dumps(CHOICES[name]).encode())
    expected = rf"{engine._servers[0].url} answers /inference/v1/generate in another form"
    with pytest.raises(EngineError, match=expected) as error:
        engine.generate([GenerationRequest([5], [0, 1])], Sampling(1.0, 8))
    assert "\n" not in str(error.value)


def test_answers_of_vllms_form_are_read(engine, monkeypatch):
    answer_with(monkeypatch, json.dumps(choice()).encode())
    ((reply, _),) = engine.generate([GenerationRequest([5], [0, 1])], Sampling(1.0, 8))
    assert (reply.token_ids, reply.logps) == ([5], [-0.5])
    assert engine.score([[4]], [[5]], 1.0) == [[-0.5]]


def test_the_reply_to_another_request_is_not_taken(engine, monkeypatch):
    answer_with(monkeypatch, json.dumps({**choice(), "request_id": "generate-tokens-another"}).encode())
    with pytest.raises(EngineError, match="with the reply to 'generate-tokens-another'"):
        engine.generate([GenerationRequest([5], [0, 1])], Sampling(1.0, 8))


@pytest.mark.parametrize("name", FORMS)
def test_other_answers_of_another_form_are_named(server, engine, monkeypatch, name):
    answer_with(monkeypatch, FORMS[name])
    with pytest.raises(ConfigError, match="in another form"):
        require_settings(load_config(None), server, on_gpu=False)
    with pytest.raises(EngineError, match="in another form"):
        weight_version(server)
    if name != "nothing":  # what the other calls of `activate` are answered
        with pytest.raises(EngineError, match="in another form"):
            activate(server, "v")
    monkeypatch.setattr("expo.rollout.vllm.server.weight_version", lambda server: "v")
    with pytest.raises(EngineError, match="in another form"):
        engine._describe(server)


def test_an_endless_answer_is_cut(server, monkeypatch):
    monkeypatch.setattr(client, "MOST_ANSWER_BYTES", 1000)
    answer_with(monkeypatch, b" " * 10_000)
    with pytest.raises(EngineError, match="with too many bytes"):
        server.get("/")
