"""What another user of a machine may try with a vLLM server whose port it finds."""

import http.client
import json
from urllib.parse import urlsplit

CALLS = {
    "update weights": ("POST", "/update_weights", {"update_info": {"version": "theirs"}}),
    "join the weight transfer": (
        "POST",
        "/init_weight_transfer_engine",
        {"init_info": {"host": "127.0.0.1", "port": 9, "size": 2, "backend": "tcp", "timeout_s": 1}},
    ),
    "name the weights": ("POST", "/update_weight_version", {"new_version": "theirs"}),
    "sleep": ("POST", "/sleep?level=2", None),
    "collective_rpc": ("POST", "/collective_rpc", {"method": "read_weights", "args": ["/tmp"]}),
    "generate": ("POST", "/inference/v1/generate", {"token_ids": [5], "sampling_params": {"max_tokens": 1}}),
    "completions": ("POST", "/v1/completions", {"model": "m", "prompt": [5], "max_tokens": 1}),
    "invocations": ("POST", "/invocations", {"prompt": [5]}),
    "abort": ("POST", "/abort_requests", {"request_ids": ["1"]}),
    "metrics": ("GET", "/metrics", None),
    "profile": ("POST", "/start_profile", None),
    "server_info": ("GET", "/server_info?config_format=json", None),
    "health": ("GET", "/health", None),
    "options": ("OPTIONS", "/collective_rpc", None),
    "double slash": ("POST", "//collective_rpc", {"method": "describe_weights"}),
}
WRONG_HEADERS = {
    "no key": [],
    "another key": [("Authorization", "Bearer " + 64 * "0")],
    "no scheme": [("Authorization", "{key}")],
    "another scheme": [("Authorization", "Basic {key}")],
    "longer": [("Authorization", "Bearer {key}0")],
    "shorter": [("Authorization", "Bearer ")],
    "two keys": [("Authorization", "Bearer {key}"), ("Authorization", "Bearer {key}")],
    "in another header": [("X-Api-Key", "{key}"), ("Cookie", "Authorization=Bearer {key}")],
}


def wrong_headers(name: str, key: str) -> list[tuple[str, str]]:
    """The headers of an attempt, with pieces of the right key where they should not help."""
    return [(header, value.format(key=key)) for header, value in WRONG_HEADERS[name]]


def status_of(url: str, call: str, headers: list[tuple[str, str]]) -> int:
    """The status of the answer to one of the calls."""
    method, path, body = CALLS[call]
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.putrequest(method, path)
    data = b"" if body is None else json.dumps(body).encode()
    for header, value in [*headers, ("Content-Type", "application/json"), ("Content-Length", str(len(data)))]:
        connection.putheader(header, value)
    connection.endheaders(data)
    status = connection.getresponse().status
    connection.close()
    return status
