"""Messages between the ranks of a run: plain data and arrays in frames, over one connection.

A frame is its length, a JSON header and the bytes of its arrays. Nothing that is read is executed.
"""

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from threading import Lock
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

LENGTHS = struct.Struct("!QQ")  # of the header and of the arrays, in bytes
KIND = "@"  # names the type of what JSON has no form of its own for
ARRAY, TUPLE, LIST, MAPPING, BYTES = "array", "tuple", "list", "mapping", "bytes"
Types = Mapping[str, type[Any]]


class ClosedError(OSError):
    """The other side has closed the connection."""


@dataclass(eq=False)
class Link:
    """One end of a connection. Several threads may send; one receives."""

    connection: socket.socket
    types: Types = field(default_factory=dict[str, type[Any]])
    sending: Lock = field(default_factory=Lock)

    def send(self, message: Any) -> None:
        """Send plain data, arrays and the known dataclasses, nested as one likes."""
        frame = pack(message)
        with self.sending:
            self.connection.sendall(frame)

    def receive(self, limit: int | None = None) -> Any:
        """Wait for the next message. Raises ClosedError at the end of the connection.

        limit: of its bytes, where the other side may be a stranger; raises ValueError beyond.
        """
        header, arrays = LENGTHS.unpack(self.read(LENGTHS.size))
        if limit is not None and header + arrays > limit:
            raise ValueError(f"a message of {header + arrays:,} bytes, {limit:,} at most")
        return unpack(self.read(header), self.read(arrays), self.types)

    def read(self, count: int) -> bytes:
        found = bytearray(count)
        view, at = memoryview(found), 0
        while at < count:
            read = self.connection.recv_into(view[at:])
            if not read:
                raise ClosedError("the connection was closed")
            at += read
        return bytes(found)

    def close(self) -> None:
        self.connection.close()


def pack(message: Any) -> bytes:
    """Write a message as one frame."""
    arrays: list[bytes] = []
    header = json.dumps(encode(message, arrays)).encode()
    content = b"".join(arrays)
    return LENGTHS.pack(len(header), len(content)) + header + content


def unpack(header: bytes, content: bytes, types: Types) -> Any:
    return Decoder(content, types).decode(json.loads(header))


def encode(value: Any, arrays: list[bytes]) -> Any:
    """Return a value as JSON can write it; the bytes of arrays go to ``arrays``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        array = cast(NDArray[Any], value)
        arrays.append(np.ascontiguousarray(array).tobytes())
        return {KIND: ARRAY, "dtype": array.dtype.str, "shape": list(array.shape)}
    if isinstance(value, bytes):
        arrays.append(value)
        return {KIND: BYTES, "size": len(value)}
    if isinstance(value, list | tuple):
        items = cast("list[Any]", value)
        if isinstance(value, list) and all(type(one) in (int, float, str) for one in items):
            return items
        kind = LIST if isinstance(value, list) else TUPLE
        return {KIND: kind, "items": [encode(one, arrays) for one in items]}
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, Any]", value)
        return {KIND: MAPPING, "items": {k: encode(one, arrays) for k, one in pairs.items()}}
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: encode(getattr(value, f.name), arrays) for f in fields(value) if f.init}
        return {KIND: type(value).__name__, "items": own}
    raise TypeError(f"a {type(value).__name__} cannot be sent to another process")


@dataclass(eq=False)
class Decoder:
    """Reads a message back. content: the arrays' bytes, one after another in their order."""

    content: bytes
    types: Types
    at: int = 0

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return value
        if not isinstance(value, dict):
            return value
        tagged = cast("dict[str, Any]", value)
        kind = tagged[KIND]
        if kind == ARRAY:
            return self.array(np.dtype(tagged["dtype"]), tuple(tagged["shape"]))
        if kind == BYTES:
            return self.take(tagged["size"])
        items = tagged["items"]
        if kind == MAPPING:
            return {name: self.decode(one) for name, one in items.items()}
        if kind in (LIST, TUPLE):
            found = [self.decode(one) for one in items]
            return found if kind == LIST else tuple(found)
        if kind not in self.types:
            raise ValueError(f"a message names the unknown type {kind!r}")
        return self.types[kind](**{name: self.decode(one) for name, one in items.items()})

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return np.frombuffer(self.take(count), dtype).reshape(shape)

    def take(self, count: int) -> bytes:
        found = self.content[self.at : self.at + count]
        self.at += count
        return found
