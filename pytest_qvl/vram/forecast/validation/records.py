"""Records of forecasts and of measurements, read and written alike by both validations. Standard library only."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pytest_qvl.outputs import replace_file
from pytest_qvl.releases import installed
from pytest_qvl.vram.forecast.request import Request, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pytest_qvl.vram.forecast.engine.trace import PhaseBytes

# Fields of a request that JSON gives back as lists.
_TUPLES = {"image", "capability", "lora_targets", "modules_to_save", "lora_options"}


def read_record(path: Path, schema: str) -> dict[str, Any]:
    """A file of that schema.

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
    """Write a file at once: whoever reads it meets the old one or the new one, never half of one.

    Raises:
        OSError: It cannot be written.
    """
    if problem := replace_file(path, json.dumps(data, indent=1) + "\n"):
        raise OSError(problem)


def digest(path: Path) -> str:
    """What says that a measurement belongs to these predictions: the SHA-256 of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions(*names: str) -> dict[str, str]:
    """Of installed packages; those that are missing are left out."""
    return {name: found for name in names if (found := installed(name)) is not None}


def peaks(phases: Iterable[PhaseBytes]) -> dict[str, dict[str, int]]:
    """Allocated and reserved bytes of each phase at its peak."""
    return {phase.name: {"allocated": phase.peak_allocated, "reserved": phase.peak_reserved} for phase in phases}


def as_plain(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as a file gives it back: lists in place of tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(entry))
    return plain


def request_of(entry: dict[str, Any]) -> Request:
    """The request of one entry of predictions; what entries of earlier releases do not name was a loop."""
    fields = {"trainer": "loop", **entry["request"]}
    fields.pop("fused_loss", None)  # of entries before Liger was followed: it was never asked for
    for name in _TUPLES & fields.keys():
        fields[name] = _as_tuples(fields[name])
    fields["samples"] = tuple(_sample(s) for s in fields.get("samples", ()))
    return Request(**fields)


def _sample(entry: dict[str, Any]) -> Sample:
    """One sample; what entries of earlier releases do not name had no videos."""
    return Sample(_as_tuples(entry["images"]), entry["tokens"], _as_tuples(entry.get("videos", [])))


def _as_tuples(value: Any) -> Any:
    """``value`` with every list in it as a tuple."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
