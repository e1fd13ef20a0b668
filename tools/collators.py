"""Judge the real collators of public frameworks, and write docs/collators.md from what came of it.

Usage: ``python tools/collators.py [--framework NAME ...] [--envs DIR]``, or with ``--page`` alone to write the page
from the records that are there. Each framework gets an environment of its own (with uv where there is one, else venv
and pip), and a record docs/records/collators-NAME.json. No GPU and no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from collating.environments import default_folder, environment, judge
from collating.frameworks import FRAMEWORKS
from collating.page import page

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "records"
PAGE = ROOT / "docs" / "collators.md"


def records() -> list[dict[str, object]]:
    """The records that are there, in the order of the frameworks."""
    paths = [RECORDS / f"collators-{name}.json" for name in FRAMEWORKS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def main() -> int:
    """Make what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--framework", action="append", choices=list(FRAMEWORKS), help="only this one; repeatable")
    parser.add_argument(
        "--envs", type=Path, default=default_folder(), metavar="DIR", help="where environments are kept"
    )
    parser.add_argument(
        "--index", metavar="URL", help="searched too: https://download.pytorch.org/whl/cpu has CPU builds"
    )
    parser.add_argument("--page", action="store_true", help="judge nothing, write the page from the records")
    given = parser.parse_args()
    failed = False
    for name in [] if given.page else given.framework or FRAMEWORKS:
        try:
            record = judge(FRAMEWORKS[name], environment(FRAMEWORKS[name], given.envs.expanduser(), given.index))
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        record["made"] = datetime.now(UTC).date().isoformat()
        _write(RECORDS / f"collators-{name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    _write(PAGE, page(records()))
    return int(failed)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)  # noqa: PTH105
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
