"""The two files: what was predicted, and what was measured. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

PREDICTED = "pytest-qvl/forecast-trainer-predictions/1"
MEASURED = "pytest-qvl/forecast-trainer-measured/1"


def read_record(path: Path, schema: str) -> dict[str, Any]:
    """A file of one of the two schemas.

    Raises:
        ValueError: It is no JSON, or of another schema.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if data.get("schema") != schema:
        raise ValueError(f"{path} has schema {data.get('schema')!r}; this reads {schema}")
    return data


def write_record(path: Path, data: dict[str, Any]) -> None:
    """Write a file at once: whoever reads it meets the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def digest(path: Path) -> str:
    """What says that a measurement belongs to these predictions: the SHA-256 of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions(*names: str) -> dict[str, str]:
    """Of installed packages; those that are missing are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
