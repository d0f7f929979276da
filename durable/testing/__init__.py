"""Fast tests of durable handlers: without a server, in virtual time, with a crash at every step.

Example:
    ```python
    from durable.testing import InMemoryInvocation, check_every_crash


    async def test_booking() -> None:
        invocation = InMemoryInvocation(book, {"city": "Rome"}, calls={charge: "receipt-1"})
        assert await invocation.run() == "booked: receipt-1"
        assert [entry.name for entry in invocation.stored] == ["reserve", "Payments/charge"]
        await invocation.replay()


    async def test_booking_survives_crashes() -> None:
        invocation = InMemoryInvocation(book, {"city": "Rome"}, calls={charge: "receipt-1"})
        await invocation.run_until_crash(after=1)
        assert await invocation.run() == "booked: receipt-1"
        assert invocation.invoked == []  # `reserve` is in the journal

        await check_every_crash(book, {"city": "Rome"}, calls={charge: "receipt-1"})
    ```

What runs is the real thing: the SDK's state machine and context, and what `durable.app` puts around a
handler. Only restate-server is replaced, by a journal in memory that speaks its protocol, and values
go through their serdes, so types get lost exactly where they would be. The same scenarios run on both
in `tests/live/test_testing_fidelity.py`.

Where it cannot be the same:

- Time is virtual: when the worker waits for nothing but timers, the clock jumps to the next one, and
  delays before retries do not pass. While a step's body or a stub runs, time passes as it does
  outside. The clocks of the process do not jump: `datetime.now()` in a step, and with it `ctx.time()`
  and the deadline of `agent.run(timeout=...)`, does not show a sleep of a day.
- A crash cannot stop a thread or code that catches `CancelledError`: a step that it cuts off is
  cancelled, and `finally` blocks run.
- Other handlers are stubs. What is sent to them (`ctx.service_send`) is recorded and not executed, and
  a cancelled invocation does not cancel them. `ctx.attach_invocation` raises `NotImplementedError`.
- Handlers that share the state or the promises of a key do not run beside each other.
- The ingress is left out: its own errors, such as that of a wrong content type, are not made.

`Collector` takes the spans of real workers, for tests of what they do.
"""

from durable._collector import Collector, Span
from durable.testing._attempt import JournalMismatch
from durable.testing._crashes import check_every_crash
from durable.testing._entries import Entry
from durable.testing._invocation import InMemoryInvocation, StillFailing, Suspended

__all__ = [
    "Collector",
    "Entry",
    "InMemoryInvocation",
    "JournalMismatch",
    "Span",
    "StillFailing",
    "Suspended",
    "check_every_crash",
]
