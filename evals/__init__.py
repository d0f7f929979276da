"""pydantic-evals datasets and evaluators, one file per pattern."""
