"""Connections between rank 0 and the workers of a server, on which both sides have proved that they know the key.

PyTorch's TCPStore and gloo accept whoever connects, so neither is used here. Each side sends a random number and an
HMAC of both numbers, so the key itself is never sent, and what was sent cannot be used again. What follows on a
connection is neither encrypted nor signed: the network must be trusted, the other users of its machines need not be.
"""

import hmac
import secrets
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Any

from expo.errors import first_line

NONCE_BYTES = PROOF_BYTES = 32
HANDSHAKE_S = 10.0  # within which a client must prove that it knows the key
MOST_HANDSHAKES = 64  # at once; further clients are turned away
MOST_MESSAGE_BYTES = 2**28  # of a message other than a bucket's data
LENGTH = struct.Struct("!Q")
RANK0, WORKER = b"rank 0", b"worker"


class GroupError(Exception):
    """The other side is gone or did not come in time; this group cannot be used any more."""


class Connection:
    """Messages over a socket, each after its length in bytes; every send and receive has a deadline.

    Args:
        sock: of the connection, which `close` closes.
        timeout_s: seconds that may pass without progress.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._socket = sock
        sock.settimeout(timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: Any) -> None:
        """Sends bytes, or any contiguous buffer of bytes. Raises: GroupError."""
        view = memoryview(data)
        try:
            self._socket.sendall(LENGTH.pack(view.nbytes))
            self._socket.sendall(view)
        except OSError as error:
            raise GroupError(f"the other side does not receive: {first_line(error)}") from error

    def receive(self) -> bytes:
        """A message. Raises: GroupError."""
        size = self._receive_length()
        if size > MOST_MESSAGE_BYTES:
            raise GroupError(f"a message of {size} bytes came; expected at most {MOST_MESSAGE_BYTES}")
        buffer = bytearray(size)
        self._receive_exactly(memoryview(buffer))
        return bytes(buffer)

    def receive_into(self, buffer: Any) -> None:
        """Fills a writable buffer of bytes with a message of its size. Raises: GroupError."""
        view = memoryview(buffer)
        size = self._receive_length()
        if size != view.nbytes:
            raise GroupError(f"a message of {size} bytes came; expected {view.nbytes}")
        self._receive_exactly(view)

    def _receive_length(self) -> int:
        header = bytearray(LENGTH.size)
        self._receive_exactly(memoryview(header))
        return int(LENGTH.unpack(header)[0])

    def _receive_exactly(self, view: memoryview) -> None:
        while view.nbytes:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise GroupError(f"the other side does not send: {first_line(error)}") from error
            if count == 0:
                raise GroupError("connection closed by peer")
            view = view[count:]

    def close(self) -> None:
        """Closes the connection, also while another thread sends or receives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Listener:
    """Accepts connections at one address, at a port of its own, from clients that know the key.

    Args:
        address: of this machine, at which to listen.
        key: that clients must know.
        timeout_s: of the connections.

    Raises: GroupError if it cannot listen there.
    """

    def __init__(self, address: str, key: str, timeout_s: float) -> None:
        self.address, self._key, self._timeout_s = address, key, timeout_s
        self._connections: dict[str, Connection] = {}
        self._handshakes = threading.BoundedSemaphore(MOST_HANDSHAKES)
        try:
            family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((address, 0), family=family)
        except OSError as error:
            raise GroupError(f"cannot listen at {address}: {first_line(error)}") from error
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name=f"listener at port {self.port}", daemon=True).start()

    def take(self, name: str) -> Connection | None:
        """The connection of the client that gave this name, once it has come."""
        return self._connections.pop(name, None)

    def close(self) -> None:
        """Stops listening, and closes connections that were not taken."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends the wait in `accept`
        self._socket.close()
        for connection in list(self._connections.values()):
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            if self._handshakes.acquire(blocking=False):
                threading.Thread(target=self._handshake, args=(sock,), daemon=True).start()
            else:
                sock.close()

    def _handshake(self, sock: socket.socket) -> None:
        try:
            own = secrets.token_bytes(NONCE_BYTES)
            deadline = time.monotonic() + HANDSHAKE_S
            sock.settimeout(HANDSHAKE_S)
            sock.sendall(own)
            answer = _receive_by(sock, NONCE_BYTES + PROOF_BYTES, deadline)
            nonces = own + answer[:NONCE_BYTES]
            if not hmac.compare_digest(answer[NONCE_BYTES:], _proof(self._key, WORKER, nonces)):
                raise GroupError("the client does not know the key")
            sock.sendall(_proof(self._key, RANK0, nonces))
            connection = Connection(sock, HANDSHAKE_S)
            name = connection.receive().decode()
            sock.settimeout(self._timeout_s)
            self._connections[name] = connection
        except (OSError, GroupError, UnicodeDecodeError):
            sock.close()
        finally:
            self._handshakes.release()


def connect(address: tuple[str, int], key: str, name: str, timeout_s: float) -> Connection:
    """A connection to a listener, to which this client is known by `name`.

    Raises: GroupError if nothing listens there, or it does not know the key.
    """
    deadline = time.monotonic() + HANDSHAKE_S
    try:
        sock = socket.create_connection(address, HANDSHAKE_S)
    except OSError as error:
        raise GroupError(f"cannot reach rank 0 at {address[0]}:{address[1]}: {first_line(error)}") from error
    try:
        own = secrets.token_bytes(NONCE_BYTES)
        nonces = _receive_by(sock, NONCE_BYTES, deadline) + own
        sock.sendall(own + _proof(key, WORKER, nonces))
        if not hmac.compare_digest(_receive_by(sock, PROOF_BYTES, deadline), _proof(key, RANK0, nonces)):
            raise GroupError("it does not know the key")
        connection = Connection(sock, timeout_s)
        connection.send(name.encode())
        return connection
    except (OSError, GroupError) as error:
        sock.close()
        raise GroupError(f"{address[0]}:{address[1]} is not rank 0 of this run: {first_line(error)}") from error


def _proof(key: str, side: bytes, nonces: bytes) -> bytes:
    """What shows that a side knows the key; the two sides' proofs differ, so neither can be sent back."""
    return hmac.digest(key.encode(), side + nonces, "sha256")


def _receive_by(sock: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly `count` bytes. Raises: OSError, GroupError."""
    data = b""
    while len(data) < count:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        part = sock.recv(count - len(data))
        if not part:
            raise GroupError("connection closed by peer")
        data += part
    return data
