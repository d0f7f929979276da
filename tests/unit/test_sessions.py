"""Sessions: what a turn stores, what a failed one leaves, compaction, and a crash at every step."""

import asyncio
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.capabilities import ProcessHistory
from pydantic_ai.exceptions import ModelHTTPError, UserError
from pydantic_ai.messages import (
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.output import ToolOutput
from pydantic_ai.tools import DeferredToolRequests, RunContext
from restate import TerminalError

import durable
from durable import _sessions
from durable.testing import InMemoryInvocation, StillFailing, check_every_crash

State = dict[str, Any]

invocations = count(1)  # each has an id of its own


def prompts(messages: Sequence[ModelMessage]) -> list[str]:
    """What the user said, and what stands for it."""
    return [
        str(part.content)
        for message in messages
        if isinstance(message, ModelRequest)
        for part in message.parts
        if isinstance(part, UserPromptPart)
    ]


class Model(FunctionModel):
    """Answers with the number of prompts it sees, after a call of a tool if there is one."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        super().__init__(self._respond)

    def _respond(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        self.seen.append(prompts(messages))
        if self.seen[-1][-1] == "fail":
            raise ModelHTTPError(status_code=400, model_name="scripted")
        last = messages[-1].parts[-1]
        if info.function_tools and isinstance(last, UserPromptPart):
            return ModelResponse(parts=[ToolCallPart("look", {}, tool_call_id=str(len(self.seen)))])
        text = f"answer {len(self.seen[-1])}"
        if info.output_tools:
            return ModelResponse(parts=[ToolCallPart("final_result", {"text": text})])
        return ModelResponse(parts=[TextPart(text)])


def agent(
    model: FunctionModel | None = None, *capabilities: Any, **options: Any
) -> Agent[Any, Any]:
    """A durable agent."""
    return Agent(
        model or Model(),
        name="chat",
        capabilities=[durable.RestateDurability(), *capabilities],
        **options,
    )


def function(session: restate.VirtualObject, handler: str = "message") -> Callable[..., Any]:
    """A handler of a session, as tests in memory take it."""
    return session.handlers[handler].fn


def turn(session: restate.VirtualObject, prompt: Any, state: State) -> InMemoryInvocation[Any]:
    """A turn of a session in this state."""
    body = {"prompt": prompt}
    return InMemoryInvocation(function(session), body, key="k", state=state, seed=next(invocations))


async def say(session: restate.VirtualObject, *said: Any, state: State | None = None) -> State:
    """Say one thing after the other, each with a replay, and return the state after."""
    state = state or {}
    for prompt in said:
        invocation = turn(session, prompt, state)
        await invocation.run()
        await invocation.replay()
        state = invocation.state
    return state


def stored(state: State) -> dict[str, list[str]]:
    """What the user said, by the key that has it."""
    return {
        key.removeprefix("session."): prompts(ModelMessagesTypeAdapter.validate_python(value))
        for key, value in state.items()
        if key != "session"
    }


# Turns


async def test_each_turn_has_a_key_of_its_own() -> None:
    """The agent sees all turns; a turn writes its own messages, and reads the others without an entry."""
    model = Model()
    chat = durable.agent_session(agent(model))
    state = await say(chat, "one", "two")
    last = turn(chat, "three", state)
    assert await last.run() == "answer 3"
    assert model.seen == [["one"], ["one", "two"], ["one", "two", "three"]]
    assert stored(last.state) == {"turn:0": ["one"], "turn:1": ["two"], "turn:2": ["three"]}
    assert [(entry.kind, entry.name) for entry in last.stored] == [
        ("GetEagerState", "session"),
        ("Run", "session.open"),
        ("SetState", "session"),
        ("Run", "chat__model.request"),
        ("SetState", "session.turn:2"),
        ("SetState", "session"),
    ]
    messages = await InMemoryInvocation(function(chat, "history"), key="k", state=last.state).run()
    assert prompts(messages) == ["one", "two", "three"]
    assert {message.conversation_id for message in messages} == {"k"}
    status = await InMemoryInvocation(function(chat, "status"), key="k", state=last.state).run()
    assert (status.status, status.turns, status.usage.requests) == ("idle", 3, 3)
    assert status.invocation_id == last.id
    assert status.last_active > datetime.now(UTC) - timedelta(minutes=1)


async def test_a_session_that_nobody_used() -> None:
    """It is empty, not an error."""
    chat = durable.agent_session(agent())
    assert await InMemoryInvocation(function(chat, "history"), key="k").run() == []
    status = await InMemoryInvocation(function(chat, "status"), key="k").run()
    assert status == durable.SessionStatus()


async def test_a_crash_after_any_step() -> None:
    """The turn is in the history once, with the same bytes, and no completed step runs again."""
    talker = agent()

    @talker.tool_plain
    async def look() -> str:
        return "seen"

    chat = durable.agent_session(talker, expire_after=timedelta(days=1))
    state = await say(chat, "one")
    assert (
        await check_every_crash(function(chat), {"prompt": "two"}, key="k", state=state)
        == "answer 2"
    )


async def test_state_that_the_server_does_not_send_along() -> None:
    """It is read with `ctx.get`: right all the same, if not as small."""
    chat = durable.agent_session(agent())
    state = await say(chat, "one", "two")
    chat.handlers["message"].state_preload = False
    last = turn(chat, "three", state)
    assert await last.run() == "answer 3"
    await last.replay()
    assert [entry.name for entry in last.stored if entry.kind == "GetLazyState"] == [
        "session",
        "session.turn:0",
        "session.turn:1",
    ]
    await check_every_crash(function(chat), {"prompt": "three"}, key="k", state=state)


async def test_state_that_the_server_stops_to_send_along() -> None:
    """The attempt fails with what has changed, instead of with other messages or a journal that does not fit."""
    chat = durable.agent_session(agent())
    invocation = turn(chat, "two", await say(chat, "one"))
    await invocation.run_until_crash(after=1)
    chat.handlers["message"].state_preload = False
    with pytest.raises(StillFailing, match=r"`worker\.invoker\.eager-state-size-limit` lowered"):
        await invocation.run()


async def test_output_tools() -> None:
    """A turn ends with a request, which the next turn's is merged with: that is no compaction."""

    class Answer(BaseModel):
        text: str

    chat = durable.agent_session(agent(output_type=ToolOutput(Answer)))
    state = await say(chat, "one", "two", "three")
    assert stored(state) == {"turn:0": ["one"], "turn:1": ["two"], "turn:2": ["three"]}
    assert await turn(chat, "four", state).run() == {"text": "answer 4"}


async def test_content_parts() -> None:
    """An image is in the state once, in its turn's key."""
    image = {"kind": "binary", "data": "aW1hZ2U=", "media_type": "image/png"}
    chat = durable.agent_session(agent())
    state = await say(chat, ["look", image], "two")
    last = turn(chat, "three", state)
    await last.run()
    assert [key for key, value in state.items() if "aW1hZ2U=" in str(value)] == ["session.turn:0"]
    assert not any("aW1hZ2U=" in str(entry) for entry in last.stored)
    [request, *_] = await InMemoryInvocation(function(chat, "history"), key="k", state=state).run()
    assert request.parts[0].content[1].data == b"image"


async def test_the_agents_dependencies() -> None:
    """They are the same object in all turns."""
    seen: list[tuple[object, str | None]] = []
    talker = Agent(
        Model(), name="chat", deps_type=dict[str, str], capabilities=[durable.RestateDurability()]
    )

    @talker.tool
    async def look(ctx: RunContext[dict[str, str]]) -> str:
        seen.append((ctx.deps, ctx.conversation_id))
        return "seen"

    database: dict[str, str] = {}
    await say(durable.agent_session(talker, deps=database), "one", "two")
    assert seen == [(database, "k")] * 2
    assert seen[0][0] is database


# Failures


async def test_a_failed_turn_is_not_in_the_history() -> None:
    """The caller gets the error, what it used is counted, and the next turn goes on from the one before."""
    model = Model()
    chat = durable.agent_session(agent(model))
    before = await say(chat, "one")
    failed = turn(chat, "fail", before)
    with pytest.raises(TerminalError, match="answered 400") as caught:
        await failed.run()
    assert caught.value.status_code == 502
    await failed.replay()
    assert stored(failed.state) == stored(before)
    status = durable.SessionStatus.model_validate(failed.state["session"]["status"])
    assert (status.status, status.turns) == ("idle", 1)
    state = await say(chat, "two", state=failed.state)
    assert stored(state) == {"turn:0": ["one"], "turn:1": ["two"]}
    assert model.seen[-1] == ["one", "two"]


async def test_a_cancelled_turn() -> None:
    """The session is idle again, and as it was."""
    chat = durable.agent_session(agent())
    before = await say(chat, "one")

    async def never(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        invocation.cancel()
        return await asyncio.Future[ModelResponse]()

    invocation = turn(durable.agent_session(agent(FunctionModel(never))), "two", before)
    with pytest.raises(TerminalError, match="cancelled"):
        await invocation.run()
    assert stored(invocation.state) == stored(before)
    assert "running" not in str(invocation.state["session"])


async def test_what_is_retried_is_no_failed_turn() -> None:
    """A mistake in the code writes nothing, so the turn can go on when it is corrected."""
    talker, mistakes = agent(), ["one"]

    @talker.output_validator
    def check(output: str) -> str:
        if mistakes:
            raise LookupError(mistakes.pop())
        return output

    invocation = turn(durable.agent_session(talker), "one", {})
    assert await invocation.run() == "answer 1"
    assert [entry.name for entry in invocation.stored if entry.kind == "SetState"] == [
        *("session", "session.turn:0", "session")
    ]


async def test_a_turn_that_waits_for_somebody_else() -> None:
    """Its calls would be lost in the next turn: it fails, with what to do."""
    talker = agent(output_type=[str, DeferredToolRequests])

    @talker.tool_plain(requires_approval=True)
    async def look() -> str:
        return "seen"

    invocation = turn(durable.agent_session(talker), "one", {})
    with pytest.raises(
        TerminalError, match=r"wait for somebody: `look`. Give the agent `durable.App"
    ):
        await invocation.run()
    assert stored(invocation.state) == {}


async def test_a_session_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """413 with the limit; the session goes on, and compaction makes room."""
    monkeypatch.setattr(_sessions, "MAX_SESSION_SIZE", 10_000)
    chat = durable.agent_session(agent())
    before = await say(chat, "a" * 4000, "one")
    invocation = turn(chat, "a" * 4000, before)
    with pytest.raises(TerminalError, match="more than the 10000 that can be stored") as caught:
        await invocation.run()
    assert caught.value.status_code == 413
    assert stored(invocation.state) == stored(before)
    assert await turn(chat, "two", invocation.state).run() == "answer 3"
    compacting = durable.agent_session(agent(Model(), last_messages(3)))
    assert await turn(compacting, "a" * 4000, invocation.state).run() == "answer 2"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ""}, 400, "`prompt`: Value error, the prompt is empty"),
        ({"prompt": " \n"}, 400, "the prompt is empty"),
        ({"prompt": []}, 400, "the prompt is empty"),
        ({"prompt": ["", " "]}, 400, "the prompt is empty"),
        ({"prompt": None}, 400, "`prompt"),
        ({"text": "one"}, 400, "`text`: Extra inputs are not permitted"),
        (None, 400, "the request body is empty"),
        ({"prompt": "a" * 100}, 413, "The message has 113 bytes, more than the 100 that"),
    ],
)
async def test_bad_input(body: object, status: int, message: str) -> None:
    """It is refused with what is wrong, before anything is written."""
    model = Model()
    chat = durable.agent_session(agent(model), max_message_size=100)
    invocation = InMemoryInvocation(function(chat), body, key="k")
    with pytest.raises(TerminalError, match=re.escape(message)) as caught:
        await invocation.run()
    assert caught.value.status_code == status
    assert (invocation.stored, model.seen) == ([], [])


# Clearing


async def test_clear() -> None:
    """The session begins anew."""
    chat = durable.agent_session(agent())
    cleared = InMemoryInvocation(
        function(chat, "clear"), key="k", state=await say(chat, "one", "two")
    )
    await cleared.run()
    assert cleared.state == {}
    assert stored(await say(chat, "three")) == {"turn:0": ["three"]}


async def test_expiry() -> None:
    """A call to the session itself, which does nothing if the session was active meanwhile."""
    chat = durable.agent_session(agent(), expire_after=timedelta(days=1))
    first = turn(chat, "one", {})
    await first.run()
    await first.replay()
    failed = turn(chat, "fail", first.state)
    with pytest.raises(TerminalError):
        await failed.run()
    calls = [invocation.stored[-1] for invocation in (first, failed)]
    assert [(it.kind, it.name) for it in calls] == [("OneWayCall", "chat/expire")] * 2
    for call, left in zip(calls, [failed.state, {}], strict=True):
        expiry = InMemoryInvocation(
            function(chat, "expire"), call.request, key="k", state=failed.state
        )
        await expiry.run()
        assert expiry.state == left
    unused: list[State] = [{}, {"session": {}}]
    for state in unused:
        late = InMemoryInvocation(function(chat, "expire"), calls[0].request, key="k", state=state)
        await late.run()
        assert late.state == state


# Compaction


def last_messages(number: int) -> ProcessHistory[Any]:
    """Keeps the latest messages only."""

    def process(messages: list[ModelMessage]) -> list[ModelMessage]:
        return messages[-number:]

    return ProcessHistory(process)


async def test_a_window_drops_turns_and_keeps_the_keys_of_others() -> None:
    """Nothing that is kept is written again; what is dropped is cleared by the next turn."""
    chat = durable.agent_session(agent(Model(), last_messages(5)))
    state = await say(chat, "one", "two", "three")
    assert stored(state) == {"turn:0": ["one"], "turn:1": ["two"], "turn:2": ["three"]}
    fourth = turn(chat, "four", state)
    await fourth.run()
    await fourth.replay()
    changes = [(it.kind, it.name) for it in fourth.stored if "State" in it.kind]
    assert changes[2:] == [("SetState", "session.turn:3"), ("SetState", "session")]
    history = await InMemoryInvocation(function(chat, "history"), key="k", state=fourth.state).run()
    assert prompts(history) == ["two", "three", "four"]
    assert stored(await say(chat, "five", state=fourth.state)) == {
        "turn:1": ["two"],  # cleared by the next
        "turn:2": ["three"],
        "turn:3": ["four"],
        "turn:4": ["five"],
    }
    await check_every_crash(function(chat), {"prompt": "five"}, key="k", state=fourth.state)


async def test_a_window_that_cuts_a_turn_in_two() -> None:
    """What is left of it becomes the summary, until the window has passed it."""
    chat = durable.agent_session(agent(Model(), last_messages(4)))
    state = await say(chat, "one", "two", "three")
    history = await InMemoryInvocation(function(chat, "history"), key="k", state=state).run()
    assert [it.kind for it in history] == ["response", *["request", "response"] * 2]
    assert (await say(chat, "four", state=state)).keys() == {
        *("session", "session.turn:2", "session.turn:3", "session.summary:3"),
        *("session.turn:1", "session.summary:2"),  # cleared by the next
    }


async def test_a_summary_takes_the_place_of_turns() -> None:
    """It is made once, in a step; the next turn reads it instead of them."""
    summaries: list[list[str]] = []

    @durable.step
    async def summarize(messages: list[ModelMessage]) -> str:
        summaries.append(prompts(messages))
        return f"summary of {len(messages)}"

    async def process(messages: list[ModelMessage]) -> list[ModelMessage]:
        if len(messages) < 6:
            return messages
        summary = await summarize(messages[:-3])
        return [ModelRequest(parts=[UserPromptPart(summary)]), *messages[-3:]]

    model = Model()
    chat = durable.agent_session(agent(model, ProcessHistory(process)))
    state = await say(chat, "one", "two", "three", "four")
    assert summaries == [["one", "two"]]
    assert model.seen[-1] == ["summary of 4", "three", "four"]
    state = await say(chat, "five", state=state)
    assert model.seen[-1] == ["summary of 4", "three", "four", "five"]
    assert stored(state) == {
        "summary:3": ["summary of 4"],
        "turn:2": ["three"],
        "turn:3": ["four"],
        "turn:4": ["five"],
    }
    six = turn(chat, "six", state)
    await six.run()
    await six.replay()
    assert summaries == [["one", "two"], ["summary of 4", "three", "four"]]
    assert model.seen[-1] == ["summary of 4", "five", "six"]
    await check_every_crash(function(chat), {"prompt": "six"}, key="k", state=state)


async def test_nothing_is_left_but_the_summary() -> None:
    """All turns are dropped at once."""

    def process(messages: list[ModelMessage]) -> list[ModelMessage]:
        return [ModelRequest(parts=[UserPromptPart("before")]), messages[-1]]

    chat = durable.agent_session(agent(Model(), ProcessHistory(process)))
    state = await say(chat, "one", "two", "three")
    assert stored(state) == {
        "turn:1": ["two"],  # cleared by the next, as is the summary before
        "summary:1": ["before"],
        "summary:2": ["before"],
        "turn:2": ["three"],
    }


async def test_a_dynamic_system_prompt() -> None:
    """It is made anew in each turn, so the turn that has it is written again, and no other."""
    talker = agent()

    @talker.system_prompt(dynamic=True)
    def instructions() -> str:
        return "be calm"

    assert stored(await say(durable.agent_session(talker), "one", "two", "three")) == {
        "summary:2": ["one"],
        "summary:1": ["one"],  # cleared by the next
        "turn:1": ["two"],
        "turn:2": ["three"],
    }


# Handlers of one's own


async def test_several_turns_in_one_handler() -> None:
    """Each is stored once, with a crash after any step."""
    editor = restate.VirtualObject("Editor")
    model = Model()
    writer = agent(model, last_messages(4))

    @editor.handler()
    async def revise(ctx: restate.ObjectContext, wish: str) -> str:
        session = await durable.Session.open(ctx)
        for step in "abc":
            await session.run(writer, f"{wish} {step}")
        return "; ".join(prompts(session.messages))

    first = InMemoryInvocation(revise, "one", key="k", seed=1)
    assert await first.run() == "one b; one c"
    await first.replay()
    second = InMemoryInvocation(revise, "two", key="k", state=first.state, seed=2)
    assert await second.run() == "two b; two c"
    await second.replay()
    assert await check_every_crash(revise, "two", key="k", state=first.state, seed=2)
    with pytest.raises(UserError, match="it was called outside"):
        await durable.Session.open(None)  # pyright: ignore[reportArgumentType]


# How sessions are made


def test_the_schema_of_the_output() -> None:
    """Callers see the agent's output type."""

    class Answer(BaseModel):
        text: str

    for output_type, title in [(Answer, "Answer"), ([Answer, str], None)]:
        chat = durable.agent_session(agent(output_type=output_type))
        output: Any = chat.handlers["message"].handler_io.output_type
        schema = output.generate_json_schema()
        assert schema.get("title") == title
        assert ("anyOf" in schema) == (title is None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "the chat"}, "cannot be named 'the chat'"),
        ({"name": "1chat"}, "cannot be named '1chat'"),
        ({"expire_after": timedelta(0)}, "`expire_after` must be positive"),
        (
            {"expire_after": -timedelta(1), "max_message_size": 0},
            "`expire_after` must be positive.*; `max_message_size` must be positive, got 0",
        ),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    """They are refused when the session is made."""
    with pytest.raises(UserError, match=message):
        durable.agent_session(agent(), **options)


def test_an_agent_that_is_not_durable() -> None:
    """It is refused, with what to do; so is an agent without a name, which cannot be durable."""
    with pytest.raises(UserError, match=r"not durable.*`capabilities=\[durable.RestateDurability"):
        durable.agent_session(Agent(Model(), name="chat"))
    with pytest.raises(UserError, match="Give it a `name` and"):
        durable.agent_session(Agent(Model()))


def test_names() -> None:
    """The agent's, the capability's, or another."""
    assert durable.agent_session(agent()).name == "chat"
    assert durable.agent_session(agent(), name="Chat").name == "Chat"
    unnamed = Agent(Model(), capabilities=[durable.RestateDurability(name="durable-chat")])
    assert durable.agent_session(unnamed).name == "durable-chat"


def test_two_sessions_of_one_agent() -> None:
    """In one app they need two names."""
    talker = agent()
    sessions = [durable.agent_session(talker), durable.agent_session(talker)]
    with pytest.raises(UserError, match=r"named 'chat'.*agent_session\(agent, name=...\)"):
        durable.app(sessions)
    durable.app([sessions[0], durable.agent_session(talker, name="another")])
