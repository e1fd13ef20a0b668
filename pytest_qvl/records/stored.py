"""Records of any version as one shape: that of the newest, with what an older one lacks left empty."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import Figure, Table, show
from pytest_qvl.records.schema import misfit, schema_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

KIND, NEWEST = "pytest-qvl/record", 2
# What records have been given since version 1, and how a record without it is read.
LATER: dict[str, Any] = {
    "suite": None,
    "configuration": [],
    "machine": None,
    "subjects": [],
    "probes": [],
    "errors": [],
    "promises": [],
    "limits": [],
    "problems": [],
    "fault": None,
    "known_failures": [],
}
Key = tuple[str, str, str, int]  # target, check, test, and how many verdicts of that name came before


class RecordError(ValueError):
    """A file that is no record, or none that can be read; the message names it and the fix."""


@dataclass(frozen=True)
class Verdict:
    """One verdict of a check, or why it gave none.

    Attributes:
        target: Model, device and backend.
        check: Name of the check function.
        test: The test with its parameters.
        state: ``kept``, ``BROKEN``, ``error`` or ``not judged``.
        says: First problem, error or reason; empty for a promise that is kept.
        figures: What was measured.
        table: Details.
        answers: What became of the answer to each sample (``right``, ``lost``, ``gained`` or ``wrong`` against the
            reference of the same run), by the sample's digest; empty where the check asked for none.
    """

    target: str
    check: str
    test: str
    state: str
    says: str
    figures: tuple[Figure, ...] = ()
    table: Table | None = None
    answers: Mapping[str, str] = field(default_factory=dict, hash=False)


def read_record(path: Path) -> dict[str, Any]:
    """A record, with every key of the newest version.

    Raises:
        RecordError: No such file, no JSON, no record, one of a later version, or one that its schema does not fit.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}: name a file that --qvl-record wrote") from None
    except (ValueError, RecursionError):
        raise RecordError(f"{path} is no JSON: name a file that --qvl-record wrote") from None
    found = as_newest(data, str(path))
    # A null that `as_newest` reads like a later key that is missing is not held to the schema.
    given = {key: value for key, value in data.items() if value is not None or LATER.get(key, value) is not None}
    if problem := misfit(given, schema_of(int(data["schema"].rpartition("/")[2]), NEWEST)):
        raise RecordError(f"{path}: {problem}: it was cut short or edited; run again")
    return found


def as_newest(data: Any, name: str) -> dict[str, Any]:
    """A record's data with every key of the newest version; what an older one lacks is empty.

    Raises:
        RecordError: No record, one of a later version, or one that is short of a key.
    """
    kind, _, version = str(data.get("schema", "")).rpartition("/") if isinstance(data, dict) else ("", "", "")
    if kind != KIND or not re.fullmatch("[1-9][0-9]{0,5}", version):
        raise RecordError(f"{name} is no record of a run: name a file that --qvl-record wrote")
    if int(version) > NEWEST:
        raise RecordError(
            f"{name} is of version {version}, and this release reads records up to {NEWEST}: upgrade pytest-qvl"
        )
    schema = schema_of(NEWEST, NEWEST)
    found = {key: data.get(key, LATER.get(key)) for key in schema["properties"]}
    missing = [key for key in schema["required"] if key not in data and key not in LATER]
    if missing:
        raise RecordError(f"{name} is a record without {missing[0]!r}: it was cut short or edited; run again")
    return found


def verdicts(record: dict[str, Any]) -> dict[Key, Verdict]:
    """Every verdict of every check, every check that gave none, and every verdict on the session."""
    found: dict[Key, Verdict] = {}
    count: Counter[tuple[str, str, str]] = Counter()
    for verdict in (*_of_checks(record), *_of_errors(record), *_of_session(record)):
        key = (verdict.target, verdict.check, verdict.test)
        found[*key, count[key]] = verdict
        count[key] += 1
    return found


def _of_checks(record: dict[str, Any]) -> Iterator[Verdict]:
    for entry in record["checks"]:
        where = (entry["target"] or "", entry["check"], entry["test"])
        if "not_judged" in entry:
            yield Verdict(*where, "not judged", entry["not_judged"])
        elif not entry["problems"]:
            yield Verdict(*where, "kept", "", *_measured(entry), entry.get("answers", {}))
        elif entry["outcome"] != "passed":  # a test of the user's own may expect it; a known failure is one
            yield Verdict(*where, "BROKEN", entry["problems"][0], *_measured(entry))


def _measured(entry: dict[str, Any]) -> tuple[tuple[Figure, ...], Table | None]:
    table = entry["table"]
    rows = None if table is None else Table(tuple(table["columns"]), tuple(map(tuple, table["rows"])))
    return tuple(_figure(figure) for figure in entry["figures"]), rows


def _figure(data: dict[str, Any]) -> Figure:
    """A figure, without keys that a later release has added to the same version."""
    return Figure(**{one.name: data[one.name] for one in fields(Figure) if one.name in data})


def _of_errors(record: dict[str, Any]) -> Iterator[Verdict]:
    for entry in record["errors"]:
        yield Verdict(entry["target"] or "", entry["check"] or "", entry["test"], "error", entry["text"])


def _of_session(record: dict[str, Any]) -> Iterator[Verdict]:
    for entry in record["session"]:
        state, says = entry["state"], entry["text"].partition("\n")[0]
        yield Verdict("", entry["name"], entry["process"] or "session", state, "" if state == "kept" else says)


def targets(record: dict[str, Any]) -> list[str]:
    """Every target of which there is a verdict of a check or an error, in order."""
    named = (entry["target"] for entry in (*record["checks"], *record["errors"]))
    return list(dict.fromkeys(name for name in named if name))


def subject(record: dict[str, Any], target: str) -> dict[str, Any]:
    """What a target's tests were run on; empty where the record does not say."""
    return next((one for one in record["subjects"] if one["target"] == target), {})


def told(fact: Any) -> str:
    """What a subject says of one thing, as text: a digest, or several settings with their names."""
    return ", ".join(f"{name} {show(one)}" for name, one in fact.items()) if isinstance(fact, dict) else str(fact)
