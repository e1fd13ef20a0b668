"""What a run is compared with: a record in a file, or the reference that this package brings for the embedded model."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from pytest_qvl.records.stored import RecordError, as_newest, read_record, targets

SHIPPED = "shipped"
# In this order a shipped record with the same version is the nearer one.
DECISIVE = ("transformers", "torch", "peft", "bitsandbytes", "accelerate")


def base_record(name: str, new: dict[str, Any]) -> dict[str, Any]:
    """The record of that name, or the shipped one whose versions are nearest to those of ``new``.

    Raises:
        RecordError: No record, or none is shipped for what ``new`` ran on.
    """
    return _nearest(new) if name == SHIPPED else read_record(Path(name))


def shipped_records() -> list[dict[str, Any]]:
    """Every reference record in the package."""
    folder = files("pytest_qvl").joinpath("records", SHIPPED)
    named = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return [as_newest(json.loads(file.read_text(encoding="utf-8")), file.name) for file in named]


def _nearest(new: dict[str, Any]) -> dict[str, Any]:
    same = [record for record in shipped_records() if set(targets(record)) & set(targets(new))]
    if not same:
        raise RecordError(
            f"no reference is shipped for {', '.join(targets(new)) or 'a run without a model'}, only for the embedded "
            "model on the CPU; compare with a record of your own"
        )
    have = new["environment"]["packages"]

    def distance(record: dict[str, Any]) -> list[bool]:
        packages = record["environment"]["packages"]
        return [_public(packages.get(name)) != _public(have.get(name)) for name in DECISIVE]

    return min(same, key=distance)


def _public(version: str | None) -> str:
    """A version without the name of its build, ``+cpu``."""
    return (version or "").partition("+")[0]
