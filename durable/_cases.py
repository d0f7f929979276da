"""`durable export-case`: makes a case of a pydantic-evals dataset out of a run that has ended well."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from durable._sdk_evals import yaml
from durable.client import Handle, RejectedInput, SyncClient

_Case = dict[str, Any]


def export_case(
    client: SyncClient, handle: Handle[object], *, name: str | None, file: Path | None
) -> str:
    """Return the case of a run, as YAML, and append it to a dataset where one is given.

    Args:
        client: Knows the admin API.
        handle: The run.
        name: The case's name, by default made of the invocation's id.
        file: The dataset, which is made if it is not there.

    Raises:
        RejectedInput: When the run does not hold JSON, or the file is no dataset that takes the case.
        ClientError: When there is no such run, or it has not ended well.
    """
    payloads, invocation = client.payloads(handle), client.status(handle)
    case = {
        "name": name or f"run-{handle.invocation_id[-12:].lower()}",
        "inputs": _value(handle, "input", payloads.input),
        "expected_output": _value(handle, "output", payloads.output),
    }
    # a key is a part of the target, and may hold line breaks
    about = f"# {json.dumps(invocation.target)[1:-1]}, {handle}, {invocation.created_at:%Y-%m-%d}"
    if file is not None:
        _append(file, case, about)
    return _yaml(case, about)


def _value(handle: Handle[object], what: str, payload: bytes) -> Any:
    if not payload:
        return None
    try:
        return from_json(payload)
    except ValueError:
        raise RejectedInput(
            f"{handle} makes no case: its {what} is no JSON ({len(payload):,} bytes), and a case holds values."
        ) from None


class _Dumper(yaml.SafeDumper):
    """Escapes the line breaks that only Unicode knows, which YAML takes for others."""


def _string(dumper: yaml.SafeDumper, text: str) -> Any:
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)  # pyright: ignore[reportUnknownMemberType]


_Dumper.add_representer(str, _string)


def _yaml(case: _Case, about: str, indent: str = "") -> str:
    text = yaml.dump([case], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return "".join(f"{indent}{line}\n" for line in [about, *text.splitlines()])


def _append(file: Path, case: _Case, about: str) -> None:
    """Append the case, and leave what is there as it is, comments too."""
    try:
        before = (
            file.read_text(encoding="utf-8") if file.exists() else f"name: {file.stem}\ncases:\n"
        )
        after = before if before.endswith("\n") else f"{before}\n"
        after += _yaml(case, about, _indent(before))
        old = _cases(file, before)
        if case["name"] in [it["name"] for it in old if "name" in it]:
            raise RejectedInput(
                f"{file} has a case {case['name']!r} already: give another `--name`."
            )
        try:
            fits = _cases(file, after) == [*old, case]
        except RejectedInput:
            fits = False
        if not fits:
            raise RejectedInput(f"{file} cannot take the case: {_SHAPE}")
        file.write_text(after, encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise RejectedInput(f"{file} cannot be used: {error}") from error


class _Dataset(BaseModel):
    cases: list[_Case] | None


_SHAPE = "a case is appended to the list `cases`, which has to be the last of the file, with one `- name: …` each."


def _cases(file: Path, text: str) -> list[_Case]:
    try:
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RejectedInput(f"{file} is no YAML: {error}") from error
    try:
        return _Dataset.model_validate(data).cases or []
    except ValidationError as error:
        raise RejectedInput(f"{file} is no dataset of pydantic-evals: {_SHAPE}") from error


def _indent(text: str) -> str:
    """Return what stands before each case."""
    first = re.search(r"^cases:[^\n]*\n(?:[ \t]*(?:#[^\n]*)?\n)*( *)- ", text, re.MULTILINE)
    return first[1] if first else ""
