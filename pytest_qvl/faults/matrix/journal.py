"""Records on disk, and partial results as they come, line by line: a run that is cut off goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.matrix.work import Done, Plan, Task

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qvl.faults.matrix.freshness import Definitions

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def versions() -> dict[str, str]:
    """The installed releases that a record is about."""
    return {name: version(name) for name in PACKAGES}


def partial_file(out: Path | None) -> Path | None:
    """Where partial results of a record are kept; ``None`` where none is written."""
    return None if out is None else out.with_name(out.name + ".part")


def write_record(out: Path, data: dict[str, Any]) -> None:
    """Write a record as JSON."""
    out.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class JsonLines:
    """A file of JSON lines: the first says which run it belongs to, every other is a result.

    Args:
        path: The file; ``None`` for none.
        head: What run the results belong to.

    Attributes:
        kept: What earlier calls of the same run have written.

    Raises:
        ValueError: The file holds the results of another run, or is damaged.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path = path
        self.kept: list[dict[str, Any]] = []
        if path is None:
            return
        if path.exists():
            self._read(path, head)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write(head)

    def write(self, line: dict[str, Any]) -> None:
        """Append one result as a line; does nothing without a file."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _read(self, path: Path, head: dict[str, Any]) -> None:
        text = path.read_text(encoding="utf-8")
        first, *lines = text.splitlines() or [""]
        if _parsed(first) != head:
            raise ValueError(f"{path} holds the results of another run ({first}): remove it, or name another file")
        for number, line in enumerate(lines, start=2):
            kept = _parsed(line)
            if kept is not None:
                self.kept.append(kept)
            elif number <= len(lines):
                raise ValueError(f"{path}, line {number} is no JSON: remove the file")
            else:  # cut off while it was written: what comes next must not continue that line
                path.write_text(text.removesuffix("\n").removesuffix(line), encoding="utf-8")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


class Journal:
    """The pieces of a matrix that are done, in memory and in a file from which a later run goes on.

    A fault that was changed in the meantime is done again; anything else that changed asks for another file.

    Args:
        path: The file; ``None`` for none.
        plan: What is run.
        definitions: Digests of what decides the results.

    Attributes:
        done: What this and earlier calls of the same plan have done.

    Raises:
        ValueError: The file holds the results of another plan or of other definitions.
    """

    def __init__(self, path: Path | None, plan: Plan, definitions: Definitions) -> None:
        head = {"subject": str(plan.subject), "named_only": plan.named_only, "definitions": definitions.common}
        self._lines = JsonLines(path, head)
        self._faults = definitions.faults
        self.done: list[Done] = [
            Done(Task(kept["part"], kept["key"]), kept["found"], kept["seconds"])
            for kept in self._lines.kept
            if kept["fault"] == self._fault(Task(kept["part"], kept["key"]))
        ]

    def add(self, done: Done) -> None:
        """Note a piece that is done, also in the file if there is one."""
        self.done.append(done)
        line = {**asdict(done.task), "found": done.found, "seconds": round(done.seconds, 3)}
        self._lines.write({**line, "fault": self._fault(done.task)})

    def _fault(self, task: Task) -> str | None:
        """Digest of the fault that a piece is about; ``None`` where all definitions decide it."""
        return self._faults.get(task.key) if task.part in ("fault", "after") else None
