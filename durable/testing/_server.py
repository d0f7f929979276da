"""The server's side of one invocation, in memory: its journal and what completes its entries.

It takes the messages of the worker, stores them, and answers as restate-server does. Time is virtual:
when the worker waits for nothing but timers, the clock jumps to the next one.
"""

import asyncio
import inspect
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from heapq import heappop, heappush
from typing import Any

from pydantic_ai.exceptions import UserError
from pydantic_core import from_json, to_json
from restate import TerminalError

from durable._sdk import Handler
from durable._wire import (
    COMMAND,
    NOTIFICATION,
    FieldValue,
    Kind,
    Message,
    encode,
)

Result = dict[int, FieldValue]
"""The fields of a notification that hold a result: 4 is nothing, 5 a value, 6 a failure."""

VOID: Result = {4: b""}

_CANCEL = 1
_AWAKEABLE_PREFIX = "sign_1"


@dataclass(frozen=True)
class Stub:
    """What stands in for another handler."""

    name: str
    answer: object
    handler: Handler[Any, Any] | None

    async def call(self, key: str, parameter: bytes) -> bytes:
        """Return the answer to a request, both as they would be on the wire."""
        answer = self.answer
        if callable(answer):
            answer = answer(*([key] if key else []), self._request(parameter))
            if inspect.isawaitable(answer):
                answer = await answer
        if self.handler is None or isinstance(answer, bytes):
            return to_body(answer)
        return self.handler.handler_io.output_serde.serialize(answer)

    def _request(self, parameter: bytes) -> Any:
        if self.handler is not None:
            return self.handler.handler_io.input_serde.deserialize(parameter)
        return from_json(parameter) if parameter else None


def _to_nobody(message: Message) -> None:
    """Keep it for the next attempt: none is running."""


def _nothing(*_: object) -> None:
    """Do nothing beyond storing the command."""


class InMemoryServer:
    """Stores the journal of one invocation over all its attempts, and completes its entries."""

    def __init__(
        self,
        *,
        target: str,
        key: str,
        body: bytes,
        headers: Mapping[str, str],
        state: Mapping[str, bytes],
        eager_state: Callable[[str], bool],
        stubs: Mapping[str, Stub],
        seed: int,
    ) -> None:
        """Store the request.

        Args:
            target: `{service}/{handler}`.
            key: Of the virtual object or workflow, else empty.
            body: The body of the request.
            headers: The headers of the request.
            state: Of the virtual object or workflow.
            eager_state: Says which state the worker gets when an attempt starts.
            stubs: What answers calls, by `{service}/{handler}`.
            seed: Tells invocations apart whose ids and random numbers shall differ.
        """
        digest = sha256(f"{target}/{key}/{seed}".encode()).digest()
        self.id = digest[:24]
        self.debug_id = f"inv_1{digest[:16].hex()}"
        self.key = key
        self.state = dict(state)
        self.entries = [
            Message.build(
                Kind.INPUT,
                {
                    1: [encode({1: name, 2: value}) for name, value in headers.items()],
                    14: encode({1: body}),
                },
            )
        ]
        self.output: Message | None = None
        self.problem: Exception | None = None
        self.completed_steps = 0
        self.attach()
        self._random_seed = int.from_bytes(digest[24:])
        self._eager_state = eager_state
        self._stubs = stubs
        self._context = copy_context()
        self._calls: dict[str, asyncio.Task[bytes]] = {}
        self._timers: list[tuple[int, int, Kind]] = []
        self._promises: dict[str, Result] = {}
        self._own_signals: list[tuple[int | str, Result]] = []
        self._skipped = 0
        self._retries = 0
        self._last_stored = self._now()
        self._effects: dict[Kind, Callable[[Message], None]] = {
            Kind.OUTPUT: self._finish,
            Kind.GET_LAZY_STATE: self._get_state,
            Kind.SET_STATE: self._set_state,
            Kind.CLEAR_STATE: self._clear_state,
            Kind.CLEAR_ALL_STATE: lambda _: self.state.clear(),
            Kind.GET_LAZY_STATE_KEYS: self._get_state_keys,
            Kind.GET_EAGER_STATE: _nothing,
            Kind.GET_EAGER_STATE_KEYS: _nothing,
            Kind.GET_PROMISE: self._get_promise,
            Kind.PEEK_PROMISE: self._peek_promise,
            Kind.COMPLETE_PROMISE: self._complete_promise,
            Kind.SLEEP: self._sleep,
            Kind.CALL: self._call,
            Kind.ONE_WAY_CALL: self._send,
            Kind.SEND_SIGNAL: self._send_signal,
            Kind.RUN: _nothing,
            Kind.COMPLETE_AWAKEABLE: self._complete_awakeable,
        }

    # What an attempt needs

    def beginning(self) -> bytes:
        """Return what the worker gets at the start of an attempt: the request and the journal."""
        eager = {name: value for name, value in self.state.items() if self._eager_state(name)}
        start = Message.build(
            Kind.START,
            {
                1: self.id,
                2: self.debug_id,
                3: len(self.entries),
                4: [encode({1: name, 2: value}) for name, value in eager.items()],
                5: not all(map(self._eager_state, ["", *self.state])),
                6: self.key,
                7: self._retries,
                8: self._now() - self._last_stored,
                9: self._random_seed,
            },
        )
        return b"".join(message.to_bytes() for message in [start, *self.entries])

    def attach(
        self,
        *,
        deliver: Callable[[Message], None] = _to_nobody,
        interrupt: Callable[[], None] = _nothing,
    ) -> None:
        """Tell an attempt from now on about notifications and problems, without arguments nobody."""
        self._deliver = deliver
        self._interrupt = interrupt

    def accept(self, message: Message) -> None:
        """Store a command or a step's result, and do what it asks for."""
        if message.type == Kind.PROPOSE_RUN_COMPLETION:
            value, failure = message.data(14), message.data(15)
            result = success(value or b"") if failure is None else Result({6: failure})
            self.completed_steps += 1
            self._complete(Kind.RUN, message.number(1), result)
            return
        effect = self._effects.get(message.kind)
        if effect is None:
            raise NotImplementedError(f"`{message.kind.label}` is not supported in memory.")
        self._store(message)
        effect(message)

    def deliver_own_signals(self) -> None:
        """Store the signals that the invocation sent itself: they arrive after what it sent with them."""
        signals, self._own_signals = self._own_signals, []
        for which, result in signals:
            self.signal(which, result)

    def retry(self, delay: float | None) -> None:
        """Begin another attempt after `delay` seconds of virtual time, or after a growing pause."""
        if delay is None:
            delay = min(0.05 * 2.0**self._retries, 10.0)
        self._retries += 1
        until = self._now() + int(delay * 1000)
        while self._timers and self._timers[0][0] <= until:
            self.fire_next_timer()
        self._skipped += max(until - self._now(), 0)

    @property
    def retries(self) -> int:
        """How many attempts failed since an entry was stored."""
        return self._retries

    @property
    def is_calling(self) -> bool:
        """Whether a stub has yet to answer."""
        return bool(self._calls)

    def seconds_to_next_timer(self) -> float | None:
        """Return how long the next timer takes if time passes as it does outside."""
        return max(self._timers[0][0] - self._now(), 0) / 1000 if self._timers else None

    def fire_next_timer(self) -> bool:
        """Let the clock jump to the next timer and complete it; say whether there was one."""
        if not self._timers:
            return False
        due, completion, kind = heappop(self._timers)
        self._skipped += max(due - self._now(), 0)
        self._complete(kind, completion, VOID)
        return True

    # What comes from outside

    def signal(self, which: int | str, result: Result) -> None:
        """Store a signal: an awakeable's or a built-in one by number, others by name."""
        self._store(
            Message.build(Kind.SIGNAL, {2 if isinstance(which, int) else 3: which} | result)
        )

    def cancel(self) -> None:
        """Store the signal that cancels the invocation."""
        self.signal(_CANCEL, VOID)

    def awakeable_id(self, number: int) -> str:
        """Return the id that the handler sees of the awakeable behind a signal."""
        encoded = urlsafe_b64encode(self.id + number.to_bytes(4)).decode().rstrip("=")
        return f"{_AWAKEABLE_PREFIX}{encoded}"

    def awakeable_signal(self, awakeable_id: str) -> int | None:
        """Return the number of the signal behind an awakeable, `None` if it is not this invocation's."""
        encoded = awakeable_id.removeprefix(_AWAKEABLE_PREFIX)
        decoded = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        return int.from_bytes(decoded[-4:]) if decoded[:-4] == self.id else None

    def settle_promise(self, name: str, result: Result) -> bool:
        """Settle a promise of the workflow; say whether it was open."""
        if name in self._promises:
            return False
        self._promises[name] = result
        done = self.results()
        for entry in list(self.entries):
            if entry.type == Kind.GET_PROMISE and entry.text(1) == name:
                if entry.number(11) not in done:
                    self._complete(Kind.GET_PROMISE, entry.number(11), result)
        return True

    def results(self) -> dict[int, Message]:
        """Return the notifications that complete commands, by the commands' completion ids."""
        return {
            entry.number(1): entry
            for entry in self.entries
            if entry.is_notification and entry.type != Kind.SIGNAL
        }

    # Effects of commands

    def _store(self, message: Message) -> None:
        self.entries.append(message)
        self._retries = 0
        self._last_stored = self._now()
        if message.is_notification:
            self._deliver(message)

    def _complete(self, kind: Kind, completion: int, result: Result) -> None:
        type_ = kind if kind >= NOTIFICATION else kind - COMMAND + NOTIFICATION
        self._store(Message.build(type_, {1: completion, **result}))

    def _finish(self, message: Message) -> None:
        self.output = message
        for task in self._calls.values():
            task.cancel()

    def _get_state(self, message: Message) -> None:
        value = self.state.get(message.text(1))
        self._complete(message.kind, message.number(11), VOID if value is None else success(value))

    def _get_state_keys(self, message: Message) -> None:
        keys = encode({1: [name.encode() for name in sorted(self.state)]})
        self._complete(message.kind, message.number(11), {17: keys})

    def _set_state(self, message: Message) -> None:
        (value,) = message.nested(3)
        self.state[message.text(1)] = value.data(1) or b""

    def _clear_state(self, message: Message) -> None:
        self.state.pop(message.text(1), None)

    def _get_promise(self, message: Message) -> None:
        if (result := self._promises.get(message.text(1))) is not None:
            self._complete(message.kind, message.number(11), result)

    def _peek_promise(self, message: Message) -> None:
        result = self._promises.get(message.text(1), VOID)
        self._complete(message.kind, message.number(11), result)

    def _complete_promise(self, message: Message) -> None:
        was_open = self.settle_promise(message.text(1), _result(message, value=2, error=3))
        answer = VOID if was_open else failure("The promise was already completed", 409)
        self._complete(message.kind, message.number(11), answer)

    def _sleep(self, message: Message) -> None:
        heappush(
            self._timers, (message.number(1) + self._skipped, message.number(11), message.kind)
        )

    def _send(self, message: Message) -> None:
        self._complete(Kind.CALL_INVOCATION_ID, message.number(10), self._callee())

    def _call(self, message: Message) -> None:
        callee = self._callee()
        self._complete(Kind.CALL_INVOCATION_ID, message.number(10), callee)
        name = f"{message.text(1)}/{message.text(2)}"
        stub = self._stubs.get(name)
        if stub is None:
            raise UserError(
                f"The handler calls `{name}`, and nothing answers in memory. Give the invocation a stub: "
                f'`calls={{"{name}": answer}}`, with the answer or a function of the request; the handler '
                "itself may be the key."
            )
        callee_id = str(callee[16])
        call = asyncio.get_running_loop().create_task(
            stub.call(message.text(5), message.data(3) or b""), context=self._context.copy()
        )
        self._calls[callee_id] = call
        call.add_done_callback(lambda done: self._answer(message, callee_id, done))

    def _callee(self) -> Result:
        digest = sha256(self.id + len(self.entries).to_bytes(4)).hexdigest()
        return {16: f"inv_1{digest[:32]}"}

    def _answer(self, message: Message, callee_id: str, call: asyncio.Task[bytes]) -> None:
        del self._calls[callee_id]
        error = TerminalError("cancelled", 409) if call.cancelled() else call.exception()
        if isinstance(error, TerminalError):
            result = failure(error.message, error.status_code, error.metadata)
        elif isinstance(error, Exception):
            self.problem = error  # the test's: raised there
            self._interrupt()
            return
        else:
            result = success(call.result())
        if self.output is None:
            self._complete(Kind.CALL, message.number(11), result)

    def _send_signal(self, message: Message) -> None:
        target, number, name = message.text(1), message.number(2), message.text(3)
        if target == self.debug_id:
            self._own_signals.append((number or name, _result(message, value=5, error=6)))
        elif number == _CANCEL and (call := self._calls.get(target)) is not None:
            call.cancel()

    def _complete_awakeable(self, message: Message) -> None:
        number = self.awakeable_signal(message.text(1))
        if number is not None:
            self._own_signals.append((number, _result(message, value=2, error=3)))

    def _now(self) -> int:
        return int(datetime.now(UTC).timestamp() * 1000) + self._skipped


def to_body(value: object) -> bytes:
    """Encode what a test passes: bytes are taken as they are, `None` is empty, the rest is JSON."""
    if value is None:
        return b""
    return value if isinstance(value, bytes) else to_json(value)


def success(value: bytes) -> Result:
    """Return the fields of a value."""
    return {5: encode({1: value})}


def failure(message: str, status: int, metadata: Mapping[str, str] | None = None) -> Result:
    """Return the fields of a failure."""
    pairs = [encode({1: key, 2: value}) for key, value in (metadata or {}).items()]
    return {6: encode({1: status, 2: message, 3: pairs})}


def terminal_error(read: Message) -> TerminalError:
    """Read a nested `Failure`."""
    metadata = {pair.text(1): pair.text(2) for pair in read.nested(3)}
    return TerminalError(read.text(2), read.number(1), metadata or None)


def _result(message: Message, *, value: int, error: int) -> Result:
    """Take over the result that a command carries, from the fields where it has them."""
    for field, number in ((value, 5), (error, 6)):
        if (found := message.data(field)) is not None:
            return {number: found}
    return VOID
