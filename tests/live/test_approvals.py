"""Runs wait for people, durably: `Approvals`, and PydanticAI's own external events."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx2
import pytest
import restate
from pydantic_ai import Agent
from pydantic_ai.capabilities import RequestInput
from pydantic_ai.exceptions import CallDeferred
from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults, RunContext

import durable
from durable import _agent_run
from durable.server import RestateServer
from tests.live.hosting import Ingress, agent_service, hosted
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live

Told = asyncio.Queue[durable.PendingCall]


def notifier() -> tuple[Told, Callable[[durable.PendingCall], Awaitable[None]]]:
    """A reviewer's inbox, and the notifier that fills it."""
    told = Told()

    async def tell(pending: durable.PendingCall) -> None:
        await told.put(pending)

    return told, tell


def refunds(*capabilities: Any, orders: str = "A") -> Agent[None, Any]:
    """An agent that refunds orders at once, if somebody approves."""
    agent = Agent(
        script([call("refund", order, order=order, amount=10) for order in orders]),
        name="refunds",
        output_type=[str, DeferredToolRequests],
        capabilities=[durable.RestateDurability(), *capabilities],
    )

    @agent.tool_plain(requires_approval=True)
    async def refund(order: str, amount: int) -> str:
        done[order] += 1
        return f"{order} {amount}"

    return agent


async def start(ingress: Ingress, path: str = "Refunds/run", *body: Any) -> str:
    """Start a run in the background and return the invocation's id."""
    sent = await ingress.post(f"{path}/send", *body, headers={"idempotency-key": uuid4().hex})
    return sent.json()["invocationId"]


async def end(ingress: Ingress, invocation: str) -> Any:
    """Wait for the end of a run and return its answer."""
    url = f"{ingress.server.ingress_url}/restate/invocation/{invocation}/attach"
    response = await ingress.http.get(url)
    assert response.status_code == 200, response.text
    return response.json()


async def answer(ingress: Ingress, invocation: str, **answer: Any) -> httpx2.Response:
    """Answer a pending call."""
    return await ingress.post(f"AgentRun/{invocation}/answer", answer)


async def pending(ingress: Ingress, invocation: str) -> list[durable.PendingCall]:
    """Return the calls that wait."""
    listed = await ingress.call(f"AgentRun/{invocation}/pending")
    return [durable.PendingCall.model_validate(one) for one in listed]


async def test_each_call_is_answered_in_its_own_way(server: RestateServer) -> None:
    """Four calls wait at once and are answered in another order than they were asked."""
    told, tell = notifier()
    service = agent_service("Refunds", refunds(durable.Approvals(notify=tell), orders="ABCD"))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        asked = {(one := await told.get()).tool_call_id: one for _ in range(4)}
        assert [one.tool_call_id for one in await pending(ingress, invocation)] == list("ABCD")
        assert asked["B"].args == {"order": "B", "amount": 10}
        assert done == {"model": 1}
        answers: dict[str, dict[str, Any]] = {
            "D": {"decision": "result", "result": "done by hand"},
            "C": {"decision": "approve", "args": {"order": "C", "amount": 5}},
            "B": {"decision": "deny", "reason": "Too late."},
            "A": {"decision": "approve", "answered_by": "ada"},
        }
        for id, decision in answers.items():
            response = await answer(ingress, invocation, call=asked[id].id, **decision)
            assert response.status_code == 200, response.text
        assert await end(ingress, invocation) == (
            "refund=A 10; refund=Too late.; refund=C 5; refund=done by hand"
        )
        assert await pending(ingress, invocation) == []
    assert done == {"model": 2, "A": 1, "C": 1}
    assert told.empty()


async def test_answers_that_fit_no_call(server: RestateServer) -> None:
    """They are refused with what is wrong, and the run waits on."""
    told, tell = notifier()
    service = agent_service("Refunds", refunds(durable.Approvals(notify=tell), orders="AB"))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        first, second = await told.get(), await told.get()
        for wrong, status, message in [
            (
                {"call": "sign_1unknown", "decision": "approve"},
                404,
                "No call 'sign_1unknown' waits",
            ),
            ({"call": first.id, "decision": "maybe"}, 400, "does not fit `Answer`"),
            ({"decision": "approve"}, 400, "`approve.call`: Field required"),
        ]:
            response = await answer(ingress, invocation, **wrong)
            assert (response.status_code, message in response.text) == (status, True), response.text
        assert (await answer(ingress, invocation, call=first.id, decision="approve")).is_success
        again = await answer(ingress, invocation, call=first.id, decision="deny")
        assert again.status_code == 409
        assert "waits for no answer any more: it was answered" in again.json()["message"]
        assert [one.id for one in await pending(ingress, invocation)] == [second.id]
        assert (await answer(ingress, invocation, call=second.id, decision="approve")).is_success
        assert await end(ingress, invocation) == "refund=A 10; refund=B 10"
    assert done == {"model": 2, "A": 1, "B": 1}


async def test_edited_arguments_have_to_fit(server: RestateServer) -> None:
    """They are held to the tool's schema, which the reviewer gets, and the run waits on."""
    told, tell = notifier()
    service = agent_service("Refunds", refunds(durable.Approvals(notify=tell)))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        asked = await told.get()
        assert asked.parameters["properties"].keys() == {"order", "amount"}
        cases: list[tuple[dict[str, Any], str]] = [
            ({"order": "A", "amount": "lots"}, "`amount`: 'lots' is not of type 'integer'"),
            ({"order": "A"}, "'amount' is a required property"),
        ]
        for args, message in cases:
            wrong = await answer(ingress, invocation, call=asked.id, decision="approve", args=args)
            assert wrong.status_code == 400
            assert message in wrong.json()["message"]
        assert await pending(ingress, invocation) == [asked]
        edited = {"order": "A", "amount": 3}
        right = await answer(ingress, invocation, call=asked.id, decision="approve", args=edited)
        assert right.status_code == 200
        assert await end(ingress, invocation) == "refund=A 3"
    assert done == {"model": 2, "A": 1}


async def test_of_several_answers_at_once_the_run_gets_one(server: RestateServer) -> None:
    """The others are told so."""
    told, tell = notifier()
    service = agent_service("Refunds", refunds(durable.Approvals(notify=tell)))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        id = (await told.get()).id
        given: list[dict[str, Any]] = [
            {"decision": "deny", "reason": f"reason {number}"} for number in range(5)
        ]
        responses = await asyncio.gather(
            *(answer(ingress, invocation, call=id, **it) for it in given)
        )
        assert sorted(it.status_code for it in responses) == [200, 409, 409, 409, 409]
        taken = next(n for n, it in enumerate(responses) if it.status_code == 200)
        assert await end(ingress, invocation) == f"refund=reason {taken}"
    assert done == {"model": 2}


async def test_an_answer_to_a_run_that_was_killed(server: RestateServer) -> None:
    """The run could not tell that it waits no more; the one who answers is told all the same."""
    told, tell = notifier()
    service = agent_service("Refunds", refunds(durable.Approvals(notify=tell)))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        asked = await told.get()
        await ingress.http.patch(f"{server.admin_url}/invocations/{invocation}/kill")
        for says in ("its run has ended", "ended with its run"):
            lost = await answer(ingress, invocation, call=asked.id, decision="approve")
            assert lost.status_code == 409
            assert says in lost.json()["message"]
        assert await pending(ingress, invocation) == []
    assert done == {"model": 1}


@pytest.mark.parametrize(
    ("way", "body", "output", "closed"),
    [
        ("resolve", {"decision": "approve"}, "could not be read: give it", "could not be read"),
        ("reject", "The office is closed.", '"The office is closed."', "was rejected"),
    ],
)
async def test_answers_past_agent_run(
    server: RestateServer, way: str, body: Any, output: str, closed: str
) -> None:
    """A call's id is that of an awakeable: who completes it directly denies the call."""
    told, tell = notifier()
    service = agent_service("Refunds", refunds(durable.Approvals(notify=tell)))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        asked = await told.get()
        await ingress.post(f"restate/awakeables/{asked.id}/{way}", body)
        assert output in await end(ingress, invocation)
        late = await answer(ingress, invocation, call=asked.id, decision="approve")
        assert late.status_code == 409
        assert closed in late.json()["message"]
    assert done == {"model": 2}


async def test_a_reviewer_who_cannot_be_told(server: RestateServer) -> None:
    """The run ends with the notifier's error, and no other call goes on waiting."""

    async def tell(pending: durable.PendingCall) -> None:
        if pending.tool_call_id == "B":
            raise restate.TerminalError("No such channel.", status_code=404)

    service = agent_service("Refunds", refunds(durable.Approvals(notify=tell), orders="AB"))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        url = f"{server.ingress_url}/restate/invocation/{invocation}/attach"
        ended = await ingress.http.get(url)
        assert (ended.status_code, ended.json()["message"]) == (404, "No such channel.")
        closed = (
            "SELECT id FROM sys_invocation WHERE target_handler_name = 'close' AND "
            f"target_service_key = '{invocation}' AND status = 'completed'"
        )
        await ingress.until(closed, lambda rows: len(rows) == 2)
        assert await pending(ingress, invocation) == []
    assert done == {"model": 1}


async def test_results_from_outside(server: RestateServer) -> None:
    """A call that only another system can do gets its result, or fails; it cannot be approved."""
    told, tell = notifier()
    agent = Agent(
        script([call("ship", "1", order=1), call("ship", "2", order=2)]),
        name="shipping",
        capabilities=[durable.RestateDurability(), durable.Approvals(notify=tell)],
    )

    @agent.tool_plain
    async def ship(order: int) -> str:
        done["ship"] += 1
        raise CallDeferred(metadata={"truck": order})

    async with hosted(server, agent_service("Shipping", agent), durable.agent_run) as ingress:
        invocation = await start(ingress, "Shipping/run")
        first, second = await told.get(), await told.get()
        assert (first.kind, first.metadata) == ("external", {"truck": 1})
        wrong = await answer(ingress, invocation, call=first.id, decision="approve")
        assert wrong.status_code == 400
        assert "cannot be approved" in wrong.json()["message"]
        await answer(ingress, invocation, call=first.id, decision="result", result={"on": "board"})
        await answer(ingress, invocation, call=second.id, decision="deny", reason="No truck.")
        assert await end(ingress, invocation) == 'ship={"on":"board"}; ship={"error":"No truck."}'
    assert done == {"model": 2, "ship": 2}


@pytest.mark.parametrize(
    ("on_timeout", "output"),
    [
        ("deny", "refund=Nobody answered within 0:00:00.200000."),
        ("approve", "refund=A 10"),
    ],
)
async def test_time_limits(server: RestateServer, on_timeout: Any, output: str) -> None:
    """When the time is up the run goes on, and a late answer is told so."""
    told, tell = notifier()
    approvals = durable.Approvals(
        notify=tell, timeout=timedelta(seconds=0.2), on_timeout=on_timeout
    )
    service = agent_service("Refunds", refunds(approvals))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        assert await end(ingress, invocation) == output
        asked = await told.get()
        assert asked.expires_at == asked.asked_at + timedelta(seconds=0.2)
        late = await answer(ingress, invocation, call=asked.id, decision="approve")
        assert late.status_code == 409
        assert "was not answered in time" in late.json()["message"]


async def test_escalation(server: RestateServer) -> None:
    """A second reviewer is told when the first let the time pass; the same call is answered."""
    told, tell = notifier()
    escalated, escalate = notifier()
    approvals = durable.Approvals(notify=tell, timeout=timedelta(seconds=2), escalate_to=escalate)
    service = agent_service("Refunds", refunds(approvals))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        first, asked = await told.get(), await escalated.get()
        assert first.expires_at is not None
        later = {"expires_at": first.expires_at + timedelta(seconds=2)}
        assert asked == first.model_copy(update=later)
        assert await pending(ingress, invocation) == [asked]
        await answer(ingress, invocation, call=asked.id, decision="approve")
        assert await end(ingress, invocation) == "refund=A 10"
    assert done == {"model": 2, "A": 1}


async def test_stopping_a_run_that_waits(server: RestateServer) -> None:
    """Nothing waits any more, and an answer is told so."""
    told, tell = notifier()
    service = agent_service("Refunds", refunds(durable.Approvals(notify=tell)))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        asked = await told.get()
        await ingress.post(f"AgentRun/{invocation}/stop")
        await ingress.until(
            f"SELECT status FROM sys_invocation WHERE id = '{invocation}'",
            lambda rows: rows[0]["status"] == "completed",
        )
        await ingress.until(
            "SELECT id FROM sys_invocation WHERE target_service_name = 'AgentRun' "
            "AND status NOT IN ('completed', 'scheduled')",
            lambda rows: not rows,
        )
        assert await pending(ingress, invocation) == []
        late = await answer(ingress, invocation, call=asked.id, decision="approve")
        assert late.status_code == 409
        assert "ended with its run" in late.json()["message"]
    assert done == {"model": 1}


async def test_what_is_over_is_forgotten(
    server: RestateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some time after the first question, but not while one still waits."""
    monkeypatch.setattr(_agent_run, "RETENTION", timedelta(seconds=0.5))
    told, tell = notifier()
    service = agent_service("Refunds", refunds(durable.Approvals(notify=tell)))
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        asked = await told.get()
        state = f"SELECT key FROM state WHERE service_key = '{invocation}'"
        forgetting = (
            "SELECT id FROM sys_invocation WHERE target_handler_name = 'forget' AND "
            f"target_service_key = '{invocation}'"
        )
        await ingress.until(forgetting, lambda rows: len(rows) > 1)
        assert await ingress.server.query(state)
        await answer(ingress, invocation, call=asked.id, decision="approve")
        await ingress.until(state, lambda rows: not rows)
        assert await end(ingress, invocation) == "refund=A 10"


async def test_an_app_that_cannot_take_answers(server: RestateServer) -> None:
    """The run ends before anything is paid for."""
    service = agent_service("Refunds", refunds(durable.Approvals()))
    async with hosted(server, service) as ingress:
        response = await ingress.post("Refunds/run")
        assert response.status_code == 500
        assert "durable.app([..., durable.agent_run])" in response.json()["message"]
    assert done == {}


async def test_outside_a_handler() -> None:
    """The run ends with the calls, as PydanticAI's runs do."""
    result = await refunds(durable.Approvals()).run("go")
    assert isinstance(result.output, DeferredToolRequests)
    assert [one.tool_call_id for one in result.output.approvals] == ["A"]


# PydanticAI's own way


@pytest.mark.parametrize("way", ["resolve", "reject", "timeout", "at once"])
async def test_request_input(server: RestateServer, way: str) -> None:
    """`RequestInput` waits on an awakeable, whose id is the token."""
    tokens: asyncio.Queue[str] = asyncio.Queue()

    async def ask(
        ctx: RunContext[None], requests: DeferredToolRequests, token: str
    ) -> DeferredToolResults | None:
        done["ask"] += 1
        await tokens.put(token)
        return requests.build_results(approve_all=True) if way == "at once" else None

    limit = timedelta(seconds=0.2) if way == "timeout" else None
    agent = refunds(RequestInput(ask, timeout=limit))
    async with hosted(server, agent_service("Refunds", agent)) as ingress:
        invocation = await start(ingress)
        token = await tokens.get()
        if way == "resolve":
            await ingress.post(f"restate/awakeables/{token}/resolve", {"approvals": {"A": True}})
        elif way == "reject":
            await ingress.post(f"restate/awakeables/{token}/reject", "the office is closed")
        output = await end(ingress, invocation)
        assert "refunds__external_event.deferred_tool_calls" in await ingress.steps("Refunds")
    denied = "refund=No decision on this tool call arrived: "
    assert (
        output
        == {
            "resolve": "refund=A 10",
            "at once": "refund=A 10",
            "reject": f'{denied}"the office is closed"',
            "timeout": f"{denied}No resolution arrived within 0:00:00.200000.",
        }[way]
    )
    assert done["ask"] == 1
