"""The payloads of errors, as far as the core makes and reads them: it never unpickles.

The first byte tells whose error it is. One of the system's own is a kind (the name of an exception class) and a
sentence. One of user code is its traceback as text, behind its length, and the pickled exception.
"""

import msgspec

USER_ERROR = b"\x02"
SYSTEM_ERROR = b"\x03"
_LENGTH = 4
"""Bytes of the text's length, little-endian."""


def system_error(kind: str, sentence: str) -> bytes:
    """The payload of an error of the system's own."""
    return SYSTEM_ERROR + msgspec.msgpack.encode([kind, sentence])


def user_error(text: str, pickled: bytes) -> bytes:
    """The payload of an exception that user code raised."""
    encoded = text.encode(errors="replace")
    return USER_ERROR + len(encoded).to_bytes(_LENGTH, "little") + encoded + pickled


def pickle_of(payload: bytes | bytearray | memoryview) -> memoryview:
    """The pickled exception of a user error's payload."""
    start = 1 + _LENGTH
    return memoryview(payload)[start + int.from_bytes(payload[1:start], "little") :]


def kind_of(payload: bytes) -> str:
    """The exception class of an error of the system's own; empty for one of user code."""
    return str(msgspec.msgpack.decode(payload[1:])[0]) if payload[:1] == SYSTEM_ERROR else ""


def text_of(payload: bytes) -> str:
    """What an error says."""
    if payload[:1] == SYSTEM_ERROR:
        return str(msgspec.msgpack.decode(payload[1:])[1])
    start = 1 + _LENGTH
    return payload[start : start + int.from_bytes(payload[1:start], "little")].decode(errors="replace")
