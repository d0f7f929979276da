"""Restate services, one per pattern. The list below is the architecture.

`services:app` is plain ASGI: `hypercorn services:app` serves it, as does `python -m services`.
"""

import durable
from agents.models import DEFAULT_MODEL
from services.chaining import call_chaining
from services.evaluator_optimizer import evaluator_optimizer
from services.human_in_the_loop import human_in_the_loop
from services.orchestrator_workers import orchestrator_workers
from services.parallelization import parallelization
from services.routing import hosted_specialists, routing

# A wrong configuration ends the server at its start instead of each request at its first step.
DEFAULT_MODEL.check()

app = durable.app(
    [
        call_chaining,
        routing,
        *hosted_specialists.values(),
        parallelization,
        orchestrator_workers,
        evaluator_optimizer,
        human_in_the_loop,
        durable.agent_run,
    ]
)
