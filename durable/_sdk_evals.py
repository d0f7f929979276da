"""The door to pydantic-evals, which need not be installed: whoever needs it imports it from here.

Its private names are imported here only, as those of other packages are in `durable/_sdk.py`. Verified with
pydantic-evals 2.62.0.
"""

try:
    import yaml
    from pydantic_evals._otel_emit import build_parent_context, emit_otel_events
    from pydantic_evals.evaluators import (
        EvaluationResult,
        Evaluator,
        EvaluatorContext,
        EvaluatorFailure,
    )
    from pydantic_evals.online import (
        CallbackSink,
        EvaluationSink,
        OnlineEvalConfig,
        OnlineEvaluator,
        SamplingContext,
        SinkPayload,
        SpanReference,
        run_evaluators,
    )
    from pydantic_evals.online_capability import OnlineEvaluation
    from pydantic_evals.otel import SpanNode, SpanTree
except ImportError as error:
    raise ImportError(
        "Evaluations need pydantic-evals, which is not installed or does not fit: "
        f"pip install 'pydantic-ai-restate[evals]' ({error})"
    ) from error

__all__ = [
    "CallbackSink",
    "EvaluationResult",
    "EvaluationSink",
    "Evaluator",
    "EvaluatorContext",
    "EvaluatorFailure",
    "OnlineEvalConfig",
    "OnlineEvaluation",
    "OnlineEvaluator",
    "SamplingContext",
    "SinkPayload",
    "SpanNode",
    "SpanReference",
    "SpanTree",
    "build_parent_context",
    "emit_otel_events",
    "run_evaluators",
    "yaml",
]
