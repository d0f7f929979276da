"""An application whose runs wait for people, and leave a trace on disk; tests kill its workers."""

import os
from datetime import timedelta

import restate
from pydantic_ai import Agent

import durable
from tests.live.scripted import call, script


def trace(event: str) -> None:
    """Append a line that survives a kill."""
    file = os.open(os.environ["WAITING_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{event}\n".encode())
    os.close(file)


async def notify(pending: durable.PendingCall) -> None:
    """Leave a trace of the question."""
    trace(f"ask {pending.tool_call_id}")


seconds = os.environ.get("WAITING_TIMEOUT")
timeout = timedelta(seconds=float(seconds)) if seconds else None

agent = Agent(
    script([call("refund", order, order=order) for order in "AB"]),
    name="refunds",
    capabilities=[durable.RestateDurability(), durable.Approvals(notify=notify, timeout=timeout)],
)


@agent.tool_plain(requires_approval=True)
async def refund(order: str) -> str:
    """Refund an order."""
    trace(f"refund {order}")
    return order


service = restate.Service("Waiting")


@service.handler()
async def run(ctx: restate.Context) -> str:
    """Run the agent once."""
    return (await agent.run("go")).output


app = durable.app([service, durable.agent_run])
