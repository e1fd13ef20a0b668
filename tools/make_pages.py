"""Write every page and figure that is made from code and records: run it after records or declarations changed.

Usage: ``python tools/make_pages.py``, with the extra ``test``. It makes docs/faults.md, docs/faults.svg and
docs/faults-by-model.md from docs/records/faults-*.json, docs/mutations.md from docs/records/mutations-*.json if one is
there, the tables of docs/checks.md (that of healthy variations from
docs/records/healthy-cpu.json, if it is there), diagram and table of docs/fixtures.md, docs/qlora-on-qwen3.5.md and
the cards' tables from docs/records/nf4-groups-*.json, and docs/forecast.svg (half a minute: a forecast of a 7B model).
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from pytest_qvl.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TABLES = ("check_tables.py", "fixture_tables.py", "nf4_page.py")


def commands() -> list[list[str]]:
    """What ``pytest-qvl`` is called with."""
    records = DOCS / "records"
    made = [
        *sorted(records.glob("faults-*.json")),
        *records.glob("healthy-cpu.json"),
        *records.glob("mutations-*.json"),
    ]
    timeline = ["--model", "qwen2.5-vl-7b", "--card", "t4", "--largest", "none", "--timeline", DOCS / "forecast.svg"]
    return [
        ["faults", "--table", *map(str, made), "--docs", str(DOCS)],
        ["forecast", *map(str, timeline)],
    ]


if __name__ == "__main__":
    for name in TABLES:
        runpy.run_path(str(Path(__file__).with_name(name)), run_name="__main__")
    sys.exit(max(main(command) for command in commands()))
