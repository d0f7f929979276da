"""Messages of Restate's service protocol as bytes: frames of a type, a length and protobuf fields.

Only what the side of the server reads and writes is here, for version 6 of the protocol: `durable.testing`
speaks it in the place of restate-server, and `durable._preloaded` reads the message that starts an attempt.
The worker's side is the SDK's own. Numbers of messages and fields are the protocol's
(https://github.com/restatedev/service-protocol).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct

CONTENT_TYPE = "application/vnd.restate.invocation.v6"

_HEADER = Struct(">HHI")  # type, flags, length
_VARINT, _BYTES = 0, 2  # the two wire types that the protocol uses

FieldValue = int | bytes | str | list[bytes]


class Kind(IntEnum):
    """Types of messages. Commands and notifications are journaled, the others are not."""

    START = 0x0000
    SUSPENSION = 0x0001
    ERROR = 0x0002
    END = 0x0003
    PROPOSE_RUN_COMPLETION = 0x0005

    INPUT = 0x0400
    OUTPUT = 0x0401
    GET_LAZY_STATE = 0x0402
    SET_STATE = 0x0403
    CLEAR_STATE = 0x0404
    CLEAR_ALL_STATE = 0x0405
    GET_LAZY_STATE_KEYS = 0x0406
    GET_EAGER_STATE = 0x0407
    GET_EAGER_STATE_KEYS = 0x0408
    GET_PROMISE = 0x0409
    PEEK_PROMISE = 0x040A
    COMPLETE_PROMISE = 0x040B
    SLEEP = 0x040C
    CALL = 0x040D
    ONE_WAY_CALL = 0x040E
    SEND_SIGNAL = 0x0410
    RUN = 0x0411
    ATTACH_INVOCATION = 0x0412
    GET_INVOCATION_OUTPUT = 0x0413
    COMPLETE_AWAKEABLE = 0x0414

    CALL_INVOCATION_ID = 0x800E  # the only notification that is not named after its command
    SIGNAL = 0xFBFF

    @property
    def label(self) -> str:
        """The name in the SQL table `sys_journal`: `GetEagerState`."""
        return "".join(word.capitalize() for word in self.name.split("_"))


COMMAND = 0x0400
NOTIFICATION = 0x8000


@dataclass(frozen=True)
class Message:
    """One message, with its fields by number."""

    type: int
    body: bytes
    fields: Mapping[int, list[int | bytes]] = field(compare=False)

    @classmethod
    def build(cls, type_: int, fields: Mapping[int, FieldValue]) -> "Message":
        """Build a message from its fields."""
        body = encode(fields)
        return cls(type_, body, decode(body))

    @property
    def is_command(self) -> bool:
        """Whether handler code made this entry."""
        return COMMAND <= self.type < NOTIFICATION

    @property
    def is_notification(self) -> bool:
        """Whether this entry completes another one, or is a signal."""
        return self.type >= NOTIFICATION

    @property
    def kind(self) -> Kind:
        """What kind of message it is; that of the command for what completes a command."""
        plain = self.type in {Kind.CALL_INVOCATION_ID, Kind.SIGNAL} or not self.is_notification
        return Kind(self.type if plain else self.type - NOTIFICATION + COMMAND)

    def number(self, field_number: int) -> int:
        """Return a field of a number, 0 if it is not set."""
        value = self.fields.get(field_number, [0])[-1]
        assert isinstance(value, int)
        return value

    def data(self, field_number: int) -> bytes | None:
        """Return a field of bytes, `None` if it is not set."""
        value = self.fields.get(field_number, [None])[-1]
        assert not isinstance(value, int)
        return value

    def text(self, field_number: int) -> str:
        """Return a field of text, empty if it is not set."""
        return (self.data(field_number) or b"").decode()

    def nested(self, field_number: int) -> "list[Message]":
        """Return the messages in a field."""
        values = self.fields.get(field_number, [])
        return [Message(0, value, decode(value)) for value in values if isinstance(value, bytes)]

    def to_bytes(self) -> bytes:
        """Return the frame."""
        return _HEADER.pack(self.type, 0, len(self.body)) + self.body


def begins_whole(received: bytes | bytearray) -> bool:
    """Return whether the first frame of what was received is complete."""
    if len(received) < _HEADER.size:
        return False
    _type, _flags, length = _HEADER.unpack_from(received)
    return len(received) >= _HEADER.size + length


def messages(chunk: bytes) -> Iterator[Message]:
    """Read the frames of a chunk: the SDK sends whole ones."""
    while chunk:
        type_, _flags, length = _HEADER.unpack_from(chunk)
        body, chunk = chunk[_HEADER.size : _HEADER.size + length], chunk[_HEADER.size + length :]
        yield Message(type_, body, decode(body))


def encode(fields: Mapping[int, FieldValue]) -> bytes:
    """Encode protobuf fields: numbers, texts, bytes, and lists of nested messages."""
    encoded = bytearray()
    for number, value in fields.items():
        if isinstance(value, int):
            encoded += _varint(number << 3 | _VARINT) + _varint(value)
            continue
        for item in value if isinstance(value, list) else [value]:
            data = item.encode() if isinstance(item, str) else item
            encoded += _varint(number << 3 | _BYTES) + _varint(len(data)) + data
    return bytes(encoded)


def decode(data: bytes) -> dict[int, list[int | bytes]]:
    """Decode protobuf fields; a field may occur more than once."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        value, at = _read_varint(data, at)
        if tag & 7 == _BYTES:
            fields.setdefault(tag >> 3, []).append(data[at : at + value])
            at += value
        elif tag & 7 == _VARINT:
            fields.setdefault(tag >> 3, []).append(value)
        else:
            raise NotImplementedError(f"Wire type {tag & 7} of protobuf")
    return fields


def packed(values: list[int | bytes]) -> list[int]:
    """Read a repeated number, which may be packed."""
    numbers: list[int] = []
    for value in values:
        if isinstance(value, int):
            numbers.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _read_varint(value, at)
            numbers.append(number)
    return numbers


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
