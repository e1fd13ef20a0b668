"""What in a record is not as its schema has it: the part of JSON Schema that readers of a record rely on.

The whole of it needs a package that only tests have. Left out is what no reader relies on (patterns, least values), and
unknown keys, which a later release may have added to the same version.
"""

from __future__ import annotations

import json
import sys
from functools import cache, reduce
from importlib.resources import files
from operator import getitem
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
LONGEST = 60  # characters of a value that a message shows


@cache
def schema_of(version: int, newest: int) -> dict[str, Any]:
    """The schema of a version of the record; the newest one's file has no number; not to be changed."""
    name = "record.schema.json" if version == newest else f"record-{version}.schema.json"
    found: dict[str, Any] = json.loads(files("pytest_qvl").joinpath("report", name).read_text(encoding="utf-8"))
    return found


def misfit(data: Any, schema: dict[str, Any]) -> str:
    """The first value that is not as the schema has it, with its place and what belongs there; empty for none."""
    return next(_misfits(data, schema, schema, "the record"), "")


def _misfits(value: Any, schema: dict[str, Any], root: dict[str, Any], place: str) -> Iterator[str]:
    if "$ref" in schema:
        schema = reduce(getitem, schema["$ref"].removeprefix("#/").split("/"), root)
    if "anyOf" in schema:
        found = [next(_misfits(value, one, root, place), "") for one in schema["anyOf"]]
        if all(found):
            yield max(reversed(found), key=lambda said: len(said.partition(" ")[0]))  # of the kind that came furthest
        return
    allowed = schema.get("type", [])
    allowed = [allowed] if isinstance(allowed, str) else allowed
    if allowed and not any(_is(value, name) for name in allowed):
        yield f"{place} is {_shown(value)}, not {' or '.join(NAMES[name] for name in allowed)}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{place} is {_shown(value)}, none of {', '.join(map(_shown, schema['enum']))}"
    elif isinstance(value, dict):
        yield from _of_object(value, schema, root, place)
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{place} has {len(value)} entries, not {schema.get('minItems', schema.get('maxItems'))}"
        for number, one in enumerate(value):
            yield from _misfits(one, schema.get("items", {}), root, f"{place}[{number}]")


def _of_object(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], place: str) -> Iterator[str]:
    if len(value) > schema.get("maxProperties", len(value)):
        yield f"{place} has {len(value)} keys, not {schema['maxProperties']}"
    yield from (f"{place} has no {name!r}" for name in schema.get("required", ()) if name not in value)
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name, one in value.items():
        if (rule := known.get(name, others)) and isinstance(rule, dict):
            yield from _misfits(one, rule, root, name if place == "the record" else f"{place}.{name}")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool) or value is None:
        return name == ("null" if value is None else "boolean")
    if isinstance(value, int):
        return name in ("integer", "number") and abs(value) <= sys.float_info.max
    kinds = {"string": str, "number": float, "array": list, "object": dict}
    return isinstance(value, kinds.get(name, ()))


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
