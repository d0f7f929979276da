"""Reads the datasets, and says in which line of which file something is wrong.

`python -m evals.loading` writes the JSON schemas beside them, which editors complete and check by.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_ai.exceptions import UserError
from pydantic_evals import Dataset
from pydantic_evals.evaluators import Evaluator

from evals.evaluators import EVALUATORS
from evals.patterns import EVAL_PATTERNS, CaseMetadata

DATASETS = Path(__file__).parent / "datasets"

# A case's name becomes a part of idempotency keys and of the keys of workflows.
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_UNKNOWN = re.compile(r"^Evaluator '(\w+)'")
_NAMED = re.compile(r"case(?: name:)? '([^']*)'")


@dataclass(frozen=True, kw_only=True)
class LoadedDataset:
    """A dataset, and which version of it this is."""

    dataset: Dataset[Any, Any, Any]

    version: str
    """Digest of the file: figures of different versions cannot be compared."""


def load(name: str, *, directory: Path = DATASETS) -> LoadedDataset:
    """Load the dataset of a pattern.

    Args:
        name: The pattern.
        directory: Where its file is, `{name}.yaml`.

    Raises:
        UserError: The dataset is malformed; the message names file, line and field.
    """
    path = directory / f"{name}.yaml"
    text = _text(path)
    try:
        node = _nodes(text)
        data = yaml.safe_load(text)
    except yaml.reader.ReaderError as error:
        line = text[: cast(int, error.position)].count("\n") + 1
        raise UserError(f"{path}:{line}: this is no YAML: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: this is no YAML: {error.problem}") from error
    try:
        dataset = dataset_type(name).from_dict(data, EVALUATORS, default_name=name)
        _check(dataset)
    except ValidationError as error:
        raise UserError(
            "\n".join(
                f"{path}:{_line(node, fault['loc'])}: {_field(fault['loc'])}: {fault['msg']}"
                for fault in error.errors()
            )
        ) from error
    except (ValueError, ExceptionGroup) as error:  # what is wrong with evaluators and with names
        faults = error.exceptions if isinstance(error, ExceptionGroup) else [error]
        raise UserError(
            "\n".join(f"{path}:{_line_of_name(text, data, node, str(it))}: {it}" for it in faults)
        ) from error
    if faults := list(_twice(node)):  # of which YAML has dropped all but the last
        raise UserError("\n".join(f"{path}:{line}: {key}: twice" for line, key in faults))
    # pydantic-evals does not check what evaluators are given.
    if faults := list(_faults_of_evaluators(dataset)):
        raise UserError("\n".join(f"{path}:{_line(node, at)}: {what}" for at, what in faults))
    version = hashlib.sha256(text.encode()).hexdigest()[:12]
    return LoadedDataset(dataset=dataset, version=version)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"The dataset of {path.stem!r} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: this is no UTF-8: {error.reason}") from error


def dataset_type(name: str) -> type[Dataset[Any, Any, Any]]:
    """Return the type of a pattern's dataset."""
    pattern = EVAL_PATTERNS[name]
    generic: Any = Dataset
    metadata: Any = CaseMetadata
    return generic[
        pattern.request_type, pattern.client.response_type, metadata[pattern.reference_type]
    ]


def schema(name: str) -> str:
    """Return the JSON schema of a pattern's dataset."""
    return json.dumps(dataset_type(name).model_json_schema_with_evaluators(EVALUATORS), indent=1)


def _twice(node: Any) -> Iterator[tuple[int, str]]:
    """Yield the fields that stand in a mapping a second time, with their lines."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _twice(item)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, key.value
            seen.add(key.value)
            yield from _twice(value)


def _check(dataset: Dataset[Any, Any, Any]) -> None:
    if not dataset.cases:
        raise ValueError("cases: there are none")
    for case in dataset.cases:
        if not _NAME.fullmatch(case.name or ""):
            raise ValueError(
                f"case {case.name!r}: every case has a name of lower-case letters, digits and hyphens"
            )


def _faults_of_evaluators(dataset: Dataset[Any, Any, Any]) -> Iterator[tuple[list[str | int], str]]:
    places: list[tuple[list[str | int], list[Evaluator[Any, Any, Any]]]] = [
        (["evaluators"], dataset.evaluators),
        *((["cases", n, "evaluators"], case.evaluators) for n, case in enumerate(dataset.cases)),
    ]
    for place, evaluators in places:
        for number, evaluator in enumerate(evaluators):
            for field in fields(evaluator) if type(evaluator) in EVALUATORS else ():
                value, kind = getattr(evaluator, field.name), cast(Any, field.type)
                try:
                    TypeAdapter[Any](kind).validate_python(value, strict=True)
                except ValidationError as error:
                    name = f"{evaluator.get_serialization_name()}.{field.name}"
                    yield [*place, number], f"{name}: {error.errors()[0]['msg']}, not {value!r}"


def _field(location: Sequence[int | str]) -> str:
    return ".".join(map(str, location)) or "the file"


def _line(node: Any, location: Sequence[int | str]) -> int:
    """Return the line of a field, or of what it is missing in."""
    for part in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            fields = {key.value: (key, value) for key, value in node.value}
            if part not in fields:
                break
            key, node = fields[part]
            if location[-1] is part:
                return key.start_mark.line + 1
        else:
            break
    return node.start_mark.line + 1 if node is not None else 1


def _line_of_name(text: str, data: Any, node: Any, fault: str) -> int:
    """Return the line of what `fault` names: an evaluator, or the last case with that name."""
    if evaluator := _UNKNOWN.search(fault):
        return next(n for n, line in enumerate(text.splitlines(), 1) if evaluator[1] in line)
    name = found[1] if (found := _NAMED.search(fault)) else None
    numbers = [n for n, case in enumerate(data["cases"]) if case.get("name") == name]
    return _line(node, ["cases", numbers[-1]] if numbers else [])


def _nodes(text: str) -> Any:
    return yaml.compose(text, Loader=yaml.SafeLoader)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def main() -> None:
    """Write the JSON schemas."""
    for name in EVAL_PATTERNS:
        (DATASETS / f"{name}.schema.json").write_text(schema(name) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
