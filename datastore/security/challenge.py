"""Who is at the other end of a connection?

    speaker   -- magic, role, number, name, wanted role, wanted name, nonce ----------->   listener     176 bytes
    speaker   <------------ nonce, HMAC(key, "listener" | hello | nonce) ---------------   listener      64
    speaker   -- HMAC(key, "speaker" | hello | nonce) --------------------------------->   listener      32
    speaker   -- frames or lines, as the role may send -------------------------------->   listener

The key is the speaker's (`secret.py`); the listener derives it. Each end proves with a nonce of the other's that it knows the key
now, over both ends' roles and names, and neither proof can be sent back as the other (ISO/IEC 9798-4, three-pass mutual
authentication). A listener that is not convinced closes the connection and says nothing.

No byte is read beyond the exchange: frames or lines that follow it are left in the socket.
"""

from __future__ import annotations

import hmac
import os
import select
import socket
import struct
import time
from typing import NamedTuple

from datastore.security.secret import ADMINISTRATOR, CLIENT, NAME_BYTES, STORE, Credential, Secret

MAGIC = b"nst-ask1"
HELLO = struct.Struct(f"<8sBBHI{NAME_BYTES}s{NAME_BYTES}s32s")
NONCE_BYTES = PROOF_BYTES = 32


class Distrust(ConnectionError):
    """The other end did not prove to be who it should."""


class Identity(NamedTuple):
    """Who has proven to be at the other end. number: a client's id, 0 of others."""

    role: int
    name: str
    number: int


class Exchange:
    """One end of a challenge, a step at a time: bytes that go out, and how many must come in before the next."""

    def __init__(self, output: bytes, expected: int) -> None:
        self._output, self._input, self._expected = output, b"", expected

    def step(self, connection: socket.socket) -> bool:
        """Go on as far as a non-blocking socket lets it; tell whether all is said and proven.

        Raises OSError when the connection is lost or closed; Distrust, which is one, when the other end's proof is wrong.
        """
        try:
            while self._output or self._expected:
                if self._output:
                    self._output = self._output[connection.send(self._output) :]
                else:
                    self._receive(connection)
        except BlockingIOError:
            return False
        return True

    def _receive(self, connection: socket.socket) -> None:
        data = connection.recv(self._expected - len(self._input))
        if not data:
            raise ConnectionResetError("it closed the connection during the challenge: it takes nobody of this role and name")
        self._input += data
        if len(self._input) == self._expected:
            whole, self._input = self._input, b""
            self._output, self._expected = self._answer(whole)

    def _answer(self, said: bytes) -> tuple[bytes, int]:
        """Return what to send, and how many bytes must come in then. Raises Distrust."""
        raise NotImplementedError


class Speaker(Exchange):
    """The end that connects."""

    def __init__(self, credential: Credential, wanted: int, name: str = "") -> None:
        """wanted, name: role and name of whoever should listen; "": any of that role."""
        self._key = credential.key
        self._hello = HELLO.pack(MAGIC, credential.role, wanted, 0, credential.number, credential.name.encode(), name.encode(),
                                 os.urandom(NONCE_BYTES))  # fmt: skip
        super().__init__(self._hello, NONCE_BYTES + PROOF_BYTES)

    def _answer(self, said: bytes) -> tuple[bytes, int]:
        nonce, told = said[:NONCE_BYTES], said[NONCE_BYTES:]
        if not hmac.compare_digest(told, proof(self._key, b"listener", self._hello, nonce)):
            raise Distrust("it does not prove that it knows the secret: give both ends the same one")
        return proof(self._key, b"speaker", self._hello, nonce), 0


class Listener(Exchange):
    """The end that accepts. `identity`: who speaks, once that is proven."""

    def __init__(self, secret: Secret, role: int, name: str) -> None:
        self._secret, self._role, self._name = secret, role, name
        self._key = self._hello = self._nonce = b""
        self._claimed = Identity(0, "", 0)
        self.identity: Identity | None = None
        super().__init__(b"", HELLO.size)

    def _answer(self, said: bytes) -> tuple[bytes, int]:
        if not self._hello:
            return self._challenge(said), PROOF_BYTES
        if not hmac.compare_digest(said, proof(self._key, b"speaker", self._hello, self._nonce)):
            raise Distrust("it proves nothing")
        self.identity = self._claimed
        return b"", 0

    def _challenge(self, hello: bytes) -> bytes:
        magic, role, wanted, spare, number, *names, _ = HELLO.unpack(hello)
        name, wanted_name = (_read_name(padded) for padded in names)
        may_speak = role in (CLIENT, STORE, ADMINISTRATOR) and (number > 0) == (role == CLIENT)
        if magic != MAGIC or spare or not may_speak or wanted != self._role or wanted_name not in ("", self._name):
            raise Distrust("it wants to speak to somebody else")
        self._claimed = Identity(role, name, number)
        self._key, self._hello = self._secret.credential(role, name, number).key, hello
        self._nonce = os.urandom(NONCE_BYTES)
        return self._nonce + proof(self._key, b"listener", hello, self._nonce)


def proof(key: bytes, end: bytes, hello: bytes, nonce: bytes) -> bytes:
    """Return the proof of one end: HMAC-SHA256 (RFC 2104) over what both said; all but `end` are of fixed lengths."""
    return hmac.digest(key, end + hello + nonce, "sha256")


def _read_name(padded: bytes) -> str:
    """Return a name that is filled up with zeros. Raises Distrust for one that is no text."""
    name = padded.rstrip(b"\0")
    try:
        if b"\0" not in name:
            return name.decode()
    except UnicodeDecodeError:
        pass
    raise Distrust("its name is no text")


def prove(connection: socket.socket, credential: Credential, wanted: int, name: str = "", timeout_s: float = 5.0) -> None:
    """Be the speaker on a connection, waiting up to `timeout_s`. Raises OSError as `Exchange.step`, TimeoutError."""
    exchange, deadline, before = Speaker(credential, wanted, name), time.monotonic() + timeout_s, connection.gettimeout()
    connection.setblocking(False)
    while not exchange.step(connection):
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([connection], [], [], left_s)[0]:
            raise TimeoutError(f"it did not answer the challenge in {timeout_s:g} s")
    connection.settimeout(before)
