"""The patterns as PydanticAI agents with typed outputs. No Restate calls here."""
