"""Partial results of the matrix, line by line as they come: a run that is cut off goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.work import Done, Plan, Task

if TYPE_CHECKING:
    from pathlib import Path


class Journal:
    """A file of JSON lines: what run it belongs to, then a line per piece that is done.

    Args:
        path: The file; ``None`` for none.
        plan: What is run.
        definitions: Digest of what decides the results.

    Attributes:
        done: What earlier runs of the same plan have done.

    Raises:
        ValueError: The file holds the results of another plan or of other definitions.
    """

    def __init__(self, path: Path | None, plan: Plan, definitions: str) -> None:
        self._path = path
        self.done: list[Done] = []
        head = {"subject": str(plan.subject), "named_only": plan.named_only, "definitions": definitions}
        if path is None:
            return
        if path.exists():
            self._read(path, head)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(head)

    def add(self, done: Done) -> None:
        """Keep what was done."""
        self.done.append(done)
        self._write({**asdict(done.task), "found": done.found, "seconds": round(done.seconds, 3)})

    def _read(self, path: Path, head: dict[str, Any]) -> None:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != head:
            raise ValueError(f"{path} holds the results of another run ({first}): remove it, or give another --out")
        for number, line in enumerate(lines, start=2):
            try:
                kept = json.loads(line)
            except json.JSONDecodeError:
                if number <= len(lines):
                    raise ValueError(f"{path}, line {number} is no JSON: remove the file") from None
                break  # cut off while it was written
            self.done.append(Done(Task(kept["part"], kept["key"]), kept["found"], kept["seconds"]))

    def _write(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
