"""Human in the loop: an agent writes drafts, a person says what is wrong with them, until one passes.

Outside a Restate handler it is an ordinary PydanticAI agent.

Task → writer → draft → person → PASS
         ↑                 ↓
         └─ NEEDS_IMPROVEMENT, with a comment
"""

from pydantic import BaseModel, Field
from pydantic_ai import Agent

from agents.models import DEFAULT_MODEL
from durable import RestateDurability


class Draft(BaseModel):
    """A text for a person to judge."""

    # First: a model that has written down what it is about to do does it.
    plan: str = Field(
        min_length=1,
        max_length=300,
        description="What the text does, or what changes in it and why.",
    )
    text: str = Field(
        min_length=1, max_length=1500, description="The whole text, nothing around it."
    )


writer = Agent(
    DEFAULT_MODEL,
    name="human-in-the-loop-writer",  # stored in journals: see the step-name table
    output_type=Draft,
    instructions=(
        "You write short texts that a person reviews. Say in one or two sentences what you are going to "
        "do, then give the whole text. When the person comments on your last draft, change what "
        "the comment asks for and keep the rest; never argue, and never leave the text out."
    ),
    capabilities=[RestateDurability()],
)


def revision_prompt(comment: str) -> str:
    """Ask for the next draft; the last one is in the writer's memory."""
    return f"The reviewer wants your last draft improved:\n{comment}"
