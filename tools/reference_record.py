"""Make the reference record that ``--qvl-compare shipped`` compares with, for the versions that are installed.

Usage: ``python tools/reference_record.py`` runs the suite on the embedded model on the CPU, a few minutes, and writes
``pytest_qvl/records/shipped/embedded-cpu-….json``; run it in an environment of each set of versions that counts, after
the suite's checks changed. ``--record FILE`` takes a record of such a run instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.version import Version

from pytest_qvl.records.base import DECISIVE
from pytest_qvl.records.stored import read_record
from pytest_qvl.releases import THIS

FOLDER = Path(__file__).resolve().parents[1] / "pytest_qvl" / "records" / "shipped"
REPORTS = ("qvl_record", "qvl_html", "qvl_compare")
SUITE = ("-q", "-p", "no:cacheprovider", "--pyargs", "pytest_qvl.suite", "--qvl-device", "cpu")


def run_suite() -> dict[str, Any]:
    """The record of a run of the suite, in a folder without a configuration of pytest.

    Raises:
        subprocess.CalledProcessError: The run is not green.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        subprocess.run([sys.executable, "-m", "pytest", *SUITE, "--qvl-record", str(file)], cwd=folder, check=True)
        return read_record(file)


def reference(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record is compared, and nothing of where it was made.

    Raises:
        SystemExit: The run was not green, so that it is no reference.
    """
    if record["exit_status"] != 0:
        raise SystemExit(f"the run ended with exit status {record['exit_status']}: a reference is of a green run")
    packages = record["environment"]["packages"]
    release = Version(packages[THIS]).base_version  # not the commit that a development version names
    checks = [{**one, "notes": [], "table": None} if "notes" in one else one for one in record["checks"]]
    configuration = [one for one in record["configuration"] if one["name"] not in REPORTS]
    return {
        **record,
        "command": ["pytest", *SUITE],
        "settings": [line for line in record["settings"] if not line.startswith(("record ", "html ", "compare "))],
        "configuration": configuration,
        "environment": {
            **record["environment"],
            "packages": {**packages, THIS: release},
            "commit": None,
            "variables": {},
        },
        "checks": checks,
        "probes": [],
        "seconds_by_test": [],
    }


def write(record: dict[str, Any]) -> Path:
    """Write it under a name that says the versions; one line for each check, so that differences can be read."""
    packages = record["environment"]["packages"]
    versions = "-".join(f"{name}{packages[name].partition('+')[0]}" for name in DECISIVE[:4])
    file = FOLDER / f"embedded-cpu-{versions}.json"
    FOLDER.mkdir(exist_ok=True)
    body = ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in record.items())
    file.write_text(f"{{\n{body}\n}}\n", encoding="utf-8")
    return file


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    return json.dumps(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FILE", help="a record of a run that is there already")
    given = parser.parse_args().record
    print(write(reference(run_suite() if given is None else read_record(given))))
