"""One framework's collators, judged: runs inside that framework's environment and prints a record.

Usage: ``python -m collating.judging NAME``, as ``tools/collators.py`` calls it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from collating.frameworks import FRAMEWORKS, RELEASES, Framework
from collating.reproducers import reproducer
from collating.shim import declare_operators, stand_in

SHARED = ("torch", "transformers", "torchvision", "peft", "accelerate", "pillow")
FOLDER = re.compile(r"(?:/[\w.+-]+){2,}/?")
SAYS_LENGTH = re.compile(r"length|truncat", re.IGNORECASE)  # an error that does tells what to change
MOST = 3  # findings of one kind that a record keeps


@dataclass
class Outcome:
    """What came of one case.

    Attributes:
        findings: Of the batch, as plain data.
        error: What the collator raised.
        refusal: How the framework takes out rows that it does not take.
        unsupported: Why there is nothing to judge.
        unjudged: What the check could not judge, with its reason.
    """

    findings: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    refusal: str = ""
    unsupported: str = ""
    unjudged: dict[str, str] = field(default_factory=dict)


def main(name: str) -> int:
    """Judge one framework and print its record as JSON on the last line."""
    framework = FRAMEWORKS[name]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # frameworks print while they are imported
        shimmed = declare_operators()
        stand_in(framework.empty)
        record = _record(framework, shimmed)
    print(json.dumps(record))
    return 0


def _record(framework: Framework, shimmed: bool) -> dict[str, Any]:
    from collating.parts import write_parts

    adapter = importlib.import_module(f"collating.adapters.{framework.name}")
    cells: list[dict[str, Any]] = []
    for model_type in RELEASES:
        with tempfile.TemporaryDirectory(prefix="qvl-collators-") as folder:
            parts = write_parts(model_type, Path(folder))
            for set_up in adapter.SET_UPS:
                made = _cells(adapter, set_up, parts)
                cells += [{"family": model_type, "set_up": set_up, **cell} for cell in made]
    _reproduce(framework.name, cells)
    return {
        "framework": framework.name,
        "title": framework.title,
        "versions": _versions(framework),
        "torchvision_declared": shimmed,
        "set_ups": adapter.SET_UPS,
        "cells": cells,
    }


def _reproduce(framework: str, cells: list[dict[str, Any]]) -> None:
    """Run the lines that show each red cell, once for all families, and keep them with what they raised."""
    from collating.properties import PROPERTIES

    cases = {each.name: each.case for each in PROPERTIES}
    shown: set[tuple[str, str]] = set()
    for cell in cells:
        key = (cell["set_up"], cell["property"])
        if cell["verdict"] != "red" or key in shown:
            continue
        shown.add(key)
        lines = reproducer(framework, *key, cases[cell["property"]], cell["family"])
        cell["reproducer"], cell["raised"] = lines, _raised(lines)


def _raised(lines: str) -> str:
    """What lines raise, in one line: of a failed check the kinds of its findings."""
    from pytest_qvl.checks.batches.findings import findings_of
    from pytest_qvl.evidence import CheckFailed

    try:
        exec(compile(lines, "reproducer", "exec"), {"__name__": "reproducer"})
    except CheckFailed as failed:
        kinds = dict.fromkeys(finding.kind for finding in findings_of(failed.evidence))
        return f"CheckFailed: {', '.join(kinds)}"
    except Exception as error:  # as with the cell itself
        return _one_line(error)
    return ""


def _versions(framework: Framework) -> dict[str, str]:
    found = {}
    for package in (framework.package, *SHARED):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package).partition("+")[0]
    return found


def _cells(adapter: Any, set_up: str, parts: Any) -> list[dict[str, Any]]:
    from collating.properties import CASES, PROPERTIES

    made: dict[Any, Any] = {}  # collators: several cases ask for the same
    outcomes = {name: _outcome(adapter, set_up, parts, case, made) for name, case in CASES.items()}
    return [{"property": each.name, **_cell(each, outcomes)} for each in PROPERTIES]


def _outcome(adapter: Any, set_up: str, parts: Any, case: Any, made: dict[Any, Any]) -> Outcome:
    from collating.parts import Asked, Refused, Unsupported

    rows, asked = case.rows(parts.cell), Asked(set_up, **case.asked)
    try:
        if asked not in made:
            made[asked] = adapter.collator(asked, parts)
        batch = made[asked](rows)
    except Unsupported as reason:
        return Outcome(unsupported=str(reason))
    except Refused as refusal:
        return Outcome(refusal=str(refusal))
    except Exception as error:  # whatever a framework raises is its answer
        return Outcome(error=_one_line(error))
    samples = [row.compared() for row in rows] if len(batch["input_ids"]) == len(rows) else None
    return _judged(batch, parts, samples)


def _judged(batch: Any, parts: Any, samples: Any) -> Outcome:
    from pytest_qvl import checks
    from pytest_qvl.checks.batches.findings import findings_of, unjudged_of
    from pytest_qvl.evidence import CannotJudge, CheckFailed

    try:
        evidence = checks.batch(batch, parts.judge, parts.config, samples)
    except CheckFailed as failed:
        evidence = failed.evidence
    except CannotJudge as reason:
        return Outcome(unsupported=f"checks.batch: {reason}")
    return Outcome([asdict(finding) for finding in findings_of(evidence)], unjudged=unjudged_of(evidence))


def _cell(asked: Any, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    outcome = outcomes[asked.case]
    if outcome.unsupported:
        return {"verdict": "not judged", "why": outcome.unsupported}
    refusal = outcome.refusal or (outcome.error if asked.case == "cut" and SAYS_LENGTH.search(outcome.error) else "")
    if refusal:
        return {"verdict": "green", "why": f"refused: {refusal}"}
    if outcome.error:
        return {"verdict": "red", "why": f"the collator raises {outcome.error}", "findings": []}
    kept = _kept(asked, outcome, outcomes["plain"])
    if kept:
        return {"verdict": "red", "why": "", "findings": kept}
    for what, why in outcome.unjudged.items():
        if asked.needs and what.startswith(asked.needs):
            return {"verdict": "not judged", "why": f"checks.batch: {what}, because {why}"}
    return {"verdict": "green", "why": ""}


def _kept(asked: Any, outcome: Outcome, plain: Outcome) -> list[dict[str, Any]]:
    """The findings that break a property, a few of each kind."""
    from collating.properties import is_new

    kept: list[dict[str, Any]] = []
    for finding in outcome.findings:
        same = sum(each["kind"] == finding["kind"] for each in kept)
        if same < MOST and (asked.broken_by(finding) if asked.kinds else is_new(finding, plain.findings)):
            kept.append(finding)
    return kept


def _one_line(error: Exception) -> str:
    """Without folders of this machine."""
    text = FOLDER.sub("FOLDER", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}".rstrip(": ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
