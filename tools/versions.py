"""Run the shipped suite and quick tests of the plugin on the versions installed here, and write docs/versions.md.

Usage: ``tox -e py311-lowest``, which calls ``python tools/versions.py py311-lowest`` in that environment: it
refuses one that is not what its name says, and keeps docs/records/versions/py311-lowest.json. ``--page`` runs nothing
and writes the page from the records that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "records" / "versions"
PAGE = ROOT / "docs" / "versions.md"
PYTHONS = ("py311", "py312", "py313", "py314")
# Of the plugin's tests those that need no minutes: what pytest itself and its other plugins can break.
QUICK = (
    *("another_report", "compare", "github", "hook_order", "html", "image_folder", "installed", "interrupts"),
    *("known_failures", "override_values", "public_names", "record", "record_kept", "rootdir", "settings"),
    *("startup", "subjects", "targets", "threads", "vram_properties", "warning_filters"),
)
XDIST, BENCHMARK, RANDOMLY = "pytest-xdist", "pytest-benchmark", "pytest-randomly"
RERUNS, COV, VISION = "pytest-rerunfailures", "pytest-cov", "torchvision"
BESIDE = (XDIST, BENCHMARK, RANDOMLY, RERUNS, COV, VISION)
NO_LOWER_BUILD = "torch"  # pip's releases before 2.13.0 come with gigabytes of CUDA: a row of its own
TORCH = "2.13.0"


@dataclass(frozen=True)
class Row:
    """One set of versions.

    Attributes:
        what: In words.
        pins: Releases that make it what it is; of ``BESIDE``, what is not named must not be there.
        arguments: What the suite is called with beside its name.
        plugin: Whether the plugin's tests are run too. Plugins that reorder or repeat tests are kept from them: order
            and number of inner runs are what they test.
    """

    what: str
    pins: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    plugin: bool = True


def lower_bounds() -> dict[str, Version]:
    """The lower end of each range that pyproject.toml declares, by package; not of extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    return {one.name: Version(s.version) for one in needed for s in one.specifier if s.operator == ">="}


TESTED_WITH = {XDIST: "3.8.0", BENCHMARK: "5.3.1"}
LOWEST = {
    **{"pytest": "9.0.0", "packaging": "24.0", "jinja2": "3.1.6", "transformers": "4.57.6", "peft": "0.18.0"},
    **{"bitsandbytes": "0.49.0", "accelerate": "1.10.0", "pillow": "10.4.0", "nvidia-ml-py": "12.560.30"},
    **{XDIST: "3.6.1", BENCHMARK: "5.1.0"},
}
_IN_ORDER = ("--randomly-seed=1",)
_MEASURED = ("--cov", "pytest_qvl", "--cov-report=")
ROWS = {
    "lowest": Row("every range at its lower end, but torch's", LOWEST),
    "default": Row("what `constraints.txt` pins", {"transformers": "5.17.0", "peft": "0.21.2", **TESTED_WITH}),
    "newest": Row("newest Transformers", {"transformers": "5.24.0", "peft": "0.21.2", **TESTED_WITH}),
    "tf523": Row("Transformers between", {"transformers": "5.23.0", **TESTED_WITH}),
    "tf457": Row("lowest Transformers, the rest newest", {"transformers": "4.57.6", **TESTED_WITH}),
    "peft018": Row("lowest PEFT, the rest newest", {"peft": "0.18.0", **TESTED_WITH}),
    "bnb049": Row("lowest bitsandbytes, the rest newest", {"bitsandbytes": "0.49.0", **TESTED_WITH}),
    "pytest90": Row("lowest pytest, the rest newest", {"pytest": "9.0.0", **TESTED_WITH}),
    "bare": Row("no plugin beside it"),
    "xdist": Row("`-n 2`", {XDIST: "3.8.0"}, ("-n", "2"), plugin=False),
    "randomly": Row("`--randomly-seed=1`", {RANDOMLY: "5.1.0"}, _IN_ORDER, plugin=False),
    "reruns": Row("`--reruns 1`", {RERUNS: "16.7"}, ("--reruns", "1"), plugin=False),
    "cov": Row("`--cov pytest_qvl`", {COV: "7.1.0"}, _MEASURED, plugin=False),
    "plugins": Row(
        "all of these at once",
        {**TESTED_WITH, RANDOMLY: "5.1.0", RERUNS: "16.7", COV: "7.1.0"},
        ("-n", "2", *_IN_ORDER, "--reruns", "1", *_MEASURED),
        plugin=False,
    ),
    "torchvision": Row("processors' own loaders and resizing", {VISION: "0.28.0"}),
    "torch26": Row("lowest torch", {"torch": "2.6.0"}),
}
SHOWN = ("transformers", "peft", "bitsandbytes", "torch", "pytest")
# Rows for every Python; the others are for the lowest one.
OF_EVERY_PYTHON = ("default", "newest")


def environments() -> list[str]:
    """Names of all that tox has, in the order of the page."""
    first, *others = PYTHONS
    return [f"{first}-{row}" for row in ROWS] + [f"{one}-{row}" for one in others for row in OF_EVERY_PYTHON]


def installed(package: str) -> str | None:
    """The version that is here, without a build's name; ``None`` if it is not here."""
    try:
        return Version(version(package)).public
    except PackageNotFoundError:
        return None


def differences(environment: str) -> list[str]:
    """What is not as the name of the environment says."""
    python, _, name = environment.partition("-")
    here = "py{}{}".format(*sys.version_info)
    wrong = [] if python == here else [f"this is {here}"]
    pins: dict[str, str | None] = {**dict.fromkeys(BESIDE), "torch": TORCH, **ROWS[name].pins}
    for package, wanted in pins.items():
        if (found := installed(package)) != wanted:
            wrong.append(f"{package} is {found or 'missing'}, should be {wanted or 'missing'}")
    return wrong


def run(arguments: Iterable[str], folder: Path) -> dict[str, Any]:
    """Run pytest in a process of its own: how many tests came out how, and which failed."""
    with tempfile.TemporaryDirectory() as kept:
        junit = Path(kept) / "junit.xml"
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        variables = os.environ | {"COVERAGE_FILE": f"{kept}/coverage"}
        code = subprocess.run([*command, *arguments], cwd=folder, env=variables, check=False).returncode
        cases = list(ET.parse(junit).getroot().iter("testcase")) if junit.is_file() else []
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "skipped": len(skipped),
        "exit": code,
    }


def judge(environment: str, suite_only: bool) -> dict[str, Any]:
    """Run what the row says, and tell the versions; ``"cuda"`` is that of torch's build, ``None`` for the CPU's."""
    import torch

    row = ROWS[environment.partition("-")[2]]
    with tempfile.TemporaryDirectory() as empty:
        suite = ("--pyargs", "pytest_qvl.suite", "--qvl-device", "cpu", *row.arguments)
        runs = {"suite": run(suite, Path(empty))}
    if row.plugin and not suite_only:
        runs["plugin"] = run([f"tests/plugin/test_{name}.py" for name in QUICK], ROOT)
    packages = {name: found for name in (*lower_bounds(), *BESIDE) if (found := installed(name))}
    here = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return {"environment": environment, **here, "packages": packages, "runs": runs}


def records() -> list[dict[str, Any]]:
    """Those that are there, in the order of the page."""
    files = [RECORDS / f"{environment}.json" for environment in environments()]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def counts(found: dict[str, Any] | None) -> str:
    """One cell: ``"67 passed, 3 skipped"``."""
    if found is None:
        return ""
    parts = [("passed", found["passed"]), ("**failed**", len(found["failed"])), ("skipped", found["skipped"])]
    return ", ".join(f"{count} {word}" for word, count in parts if count) or f"**exit {found['exit']}**"


HEAD = """# Versions that were run

Written by `tools/versions.py` from `docs/records/versions`: the shipped suite on the embedded model, on the CPU, from
an empty folder, and {tests} files of quick tests of the plugin (an empty cell: not run). Every row is an environment of
tox (`tox -e py311-lowest`), and runs every night in CI. A test holds the lowest row to the ranges of `pyproject.toml`.
No row had a GPU; a row that names CUDA had torch's build for it. Seconds are left out: the rows ran beside other work.

| environment | what | Python | {titles} | beside it | suite | plugin tests |
| --- | --- | --- | {lines} | --- | --- | --- |
"""
LOW = """
Besides, `lowest` has {}. On GPUs, torch 2.11 was run ([records](records/README.md)).
"""
OPEN = """
## Not run for this table

{} have no record here, for want of that Python: every night they run in CI, where a red one is a bug.
"""


def line(record: dict[str, Any]) -> str:
    """One row of the table."""
    name, has = record["environment"], record["packages"]
    beside = ", ".join(f"{one.removeprefix('pytest-')} {has[one]}" for one in BESIDE if one in has)
    row = ROWS[name.partition("-")[2]]
    runs = [counts(record["runs"].get(kind)) for kind in ("suite", "plugin")]
    cuda = f" (CUDA {record['cuda']})" if record.get("cuda") else ""
    shown = [has[one] + cuda * (one == "torch") for one in SHOWN]
    cells = [f"`{name}`", row.what, record["python"], *shown, beside, *runs]
    return f"| {' | '.join(cells)} |\n"


def page(found: list[dict[str, Any]]) -> str:
    """The page that records give."""
    text = HEAD.format(tests=len(QUICK), titles=" | ".join(SHOWN), lines=" | ".join("---" for _ in SHOWN))
    text += "".join(map(line, found))
    text += LOW.format(
        ", ".join(f"{name} {LOWEST[name]}" for name in lower_bounds() if name in LOWEST and name not in SHOWN)
    )
    red = [
        f"- `{record['environment']}`, {kind}: `{test}` failed\n"
        for record in found
        for kind, outcome in record["runs"].items()
        for test in outcome["failed"]
    ]
    text += "\n" * bool(red) + "".join(red)
    missing = [f"`{one}`" for one in environments() if one not in {record["environment"] for record in found}]
    return text + (OPEN.format(", ".join(missing)) if missing else "")


def main() -> int:
    """Run the environment that was asked for, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("environment", nargs="?", choices=environments(), help="what this environment is called in tox")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page")
    parser.add_argument(
        "--suite-only", action="store_true", help="leave the plugin's tests out: their cell stays empty"
    )
    given = parser.parse_args()
    if bool(given.environment) == given.page:
        parser.error("name an environment or give --page")
    failed = False
    if given.environment:
        if wrong := differences(given.environment):
            parser.error(f"this is not {given.environment}: {'; '.join(wrong)}")
        record = judge(given.environment, given.suite_only)
        failed = any(outcome["exit"] for outcome in record["runs"].values())
        RECORDS.mkdir(exist_ok=True)
        text = json.dumps(record, indent=1) + "\n"
        (RECORDS / f"{given.environment}.json").write_text(text, encoding="utf-8")
    PAGE.write_text(page(records()), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
