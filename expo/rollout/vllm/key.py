"""The key of the vLLM servers: who knows it may change their weights and read their replies.

A run draws a new key for the servers that it starts. For servers that others start, the key is in a file that other
users cannot read, or in an environment variable. It is never part of a configuration, a command line or a log.
"""

import os
import re
import secrets
from pathlib import Path

from expo.errors import ConfigError

VARIABLE = "VLLM_API_KEY"  # vLLM reads it too, and then requires the key for /v1 and /inference by itself
NEW_KEY = "(umask 077; openssl rand -hex 32 > FILE)"
KEY = re.compile(r"[!-~]{16,512}")  # what an HTTP header can hold, and nobody guesses


def new_key() -> str:
    """A random key of 64 hexadecimal digits."""
    return secrets.token_hex(32)


def read_key(path: Path | None) -> str:
    """The key in a file, or without a file in the environment variable VLLM_API_KEY.

    Raises: ConfigError if there is no key, other users can read the file, or its content cannot be a key.
    """
    if path is None:
        key, source = os.environ.get(VARIABLE, ""), f"the environment variable {VARIABLE}"
        if not key:
            raise ConfigError(
                f"vLLM servers need a key: make a file with {NEW_KEY}, and give it to the run and to python -m "
                f"expo.serve as vllm.key_file, or its content as {VARIABLE} in their environment"
            )
    else:
        key, source = _read_file(path), f"vllm.key_file = {path}"
    if not KEY.fullmatch(key):
        raise ConfigError(f"{source} holds no key; expected 16 to 512 printable ASCII characters, as from {NEW_KEY}")
    return key


def _read_file(path: Path) -> str:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(1024).strip()
    except OSError as error:
        raise ConfigError(f"cannot read vllm.key_file = {path}: {error.strerror}; make one with {NEW_KEY}") from error
    if mode & 0o077:
        raise ConfigError(f"vllm.key_file = {path} is accessible to other users; make a new key with {NEW_KEY}")
    return text


def authorization(key: str) -> str:
    """The value of the header Authorization."""
    return f"Bearer {key}"
