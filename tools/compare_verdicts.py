"""Compare the verdicts of the committed records with those of an earlier revision, as Markdown.

    python tools/compare_verdicts.py b2c1954 > docs/records/rehousing.md

Read are ``docs/records/faults-*.json`` (every fault's outcome under every check) and the records of the suite
(every promise's state, every check's outcome). What both have is compared; what only one has is named.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = Path("docs/records")

Verdicts = dict[str, str]


def fault_verdicts(record: dict[str, Any]) -> Verdicts:
    """``fault: check`` and its outcome."""
    rows = record["rows"].items()
    return {f"{fault}: {check}": outcome for fault, row in rows for check, outcome in row["outcomes"].items()}


def suite_verdicts(record: dict[str, Any]) -> Verdicts:
    """``promise N`` and its state, ``test`` and its outcome."""
    promises = {f"promise {one['number']} ({one['target']})": one["state"] for one in record["promises"]}
    return promises | {one["test"]: one["outcome"] for one in record["checks"]}


def verdicts(text: str) -> Verdicts:
    """What a record holds, by what was judged; nothing of records of another schema."""
    record = json.loads(text)
    schema = record.get("schema", "") if isinstance(record, dict) else ""
    if schema.startswith("pytest-qvl/faults/"):
        return fault_verdicts(record)
    return suite_verdicts(record) if schema.startswith("pytest-qvl/record/") and "promises" in record else {}


def before(revision: str, path: Path) -> Verdicts:
    """What the record at ``path`` held at ``revision``; nothing if it was not there."""
    shown = subprocess.run(["git", "show", f"{revision}:{path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    return verdicts(shown.stdout) if shown.returncode == 0 else {}


def section(path: Path, old: Verdicts, new: Verdicts) -> list[str]:
    """The lines about one record."""
    both = old.keys() & new.keys()
    changed = sorted(name for name in both if old[name] != new[name])
    lines = [f"## `{path.name}`", "", f"{len(both) - len(changed)} of {len(both)} verdicts are the same."]
    for title, names in (("Only before", old.keys() - new.keys()), ("Only now", new.keys() - old.keys())):
        subjects = sorted({name.split(":")[0] for name in names})
        lines += ["", f"{title}: {len(names)}, of {', '.join(subjects)}."] if names else []
    if changed:
        lines += ["", "| what | before | now |", "| --- | --- | --- |"]
        lines += [f"| {name} | {old[name]} | {new[name]} |" for name in changed]
    return [*lines, ""]


def main(revision: str) -> None:
    """Print the comparison of every record that both revisions hold."""
    print(f"# Verdicts compared with {revision}\n\nMade by `python tools/compare_verdicts.py {revision}`.\n")
    for path in sorted((ROOT / RECORDS).glob("*.json")):
        relative = RECORDS / path.name
        old, new = before(revision, relative), verdicts(path.read_text(encoding="utf-8"))
        if old and new:
            print("\n".join(section(relative, old, new)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} REVISION")
    main(sys.argv[1])
