"""Run the backtest: every pair's two releases from the package index, each in an environment of its own.

Usage: ``python -m tests.backtest [--only TEXT] [--envs DIR] [--base NAME=PYTHON]`` from the repository's root, with uv
on PATH. A base environment is made once; each environment is some releases laid over it (``uv pip install --target
--no-deps``), hard links out of uv's cache, and deleted afterwards. No GPU, no weights. The record
docs/records/backtest.json is written after each environment, the page docs/backtest.md and the table of known defects in
docs/releases.md at the end; ``--page`` writes those alone. Exit code 1 where a bad release was not flagged as it should be, or a good one was not green.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pytest_qvl.outputs import replace_file
from tests.backtest.page import page, with_defects
from tests.backtest.pairs import BASES, PAIRS, Environment, Pair
from tests.backtest.record import Record, as_it_should_be, flagged, green, key

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "records" / "backtest.json"
PAGE = ROOT / "docs" / "backtest.md"
RELEASES = ROOT / "docs" / "releases.md"
MADE_OF = "qvl-base.txt"  # the requirements that a base environment was made of


def main() -> int:
    """Run what was asked for, and write record and page."""
    parser = argparse.ArgumentParser(prog="python -m tests.backtest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="pairs whose name has this in it")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache/pytest-qvl/backtest", metavar="DIR")
    parser.add_argument("--base", action="append", default=[], metavar="NAME=PYTHON", help="use this, make none")
    parser.add_argument("--index", metavar="URL", help="searched too: https://download.pytorch.org/whl/cpu")
    parser.add_argument("--page", action="store_true", help="run nothing, write the pages from the record")
    parser.add_argument("--again", action="store_true", help="run also what the record has as it should be")
    given = parser.parse_args()
    pairs = [pair for pair in PAIRS if given.only in pair.name]
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    if not given.page:
        _run_all(pairs, given, record)
        kept = {key(pair.environment(release), pair.scenario) for pair in PAIRS for release in (pair.bad, pair.good)}
        record = {name: outcome for name, outcome in record.items() if name in kept}
        _write_record(record)
    _write(PAGE, page(record))
    _write(RELEASES, with_defects(RELEASES.read_text(encoding="utf-8")))
    return int(any(not as_it_should_be(pair, record) for pair in pairs))


def _run_all(pairs: list[Pair], given: argparse.Namespace, record: Record) -> None:
    pythons = dict(each.split("=", 1) for each in given.base)
    for environment, names in _wanted(pairs, {} if given.again else record).items():
        python = pythons.setdefault(environment.base, "") or _base(environment.base, given.envs, given.index)
        pythons[environment.base] = python
        for outcome in _outcomes(environment, names, python, given.envs):
            name = outcome.pop("scenario")
            record[key(environment, name)] = outcome
            print(f"{key(environment, name)}: {outcome['verdict']} {outcome['says'][:150]!r}", flush=True)
        _write_record(record)


def _wanted(pairs: list[Pair], record: Record) -> dict[Environment, list[str]]:
    """The scenarios of each environment that the record does not have as they should be; each environment once."""
    wanted: dict[Environment, list[str]] = {}
    for pair in pairs:
        for release, fine in ((pair.bad, flagged(pair, record)), (pair.good, green(pair, record))):
            names = wanted.setdefault(pair.environment(release), [])
            names += [pair.scenario] if not fine and pair.scenario not in names else []
    return {environment: names for environment, names in wanted.items() if names}


def _outcomes(environment: Environment, names: list[str], python: str, envs: Path) -> list[dict[str, str]]:
    """Lay the releases over the base, run the scenarios, take the releases away again."""
    over = envs / "over"
    shutil.rmtree(over, ignore_errors=True)
    install = [_uv(), "pip", "install", "-q", "--python", python, "--target", over, "--no-deps", *environment.over]
    subprocess.run([str(part) for part in install], check=True)
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(over), str(ROOT))),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [python, "-m", "tests.backtest.child", *names]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"scenario"')]
    ended = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    reached = {outcome["scenario"] for outcome in outcomes}
    outcomes += [
        {"scenario": name, "verdict": "crashed", "check": "", "says": ended[0]} for name in names if name not in reached
    ]
    shutil.rmtree(over)
    return outcomes


def _base(name: str, envs: Path, index: str | None) -> str:
    """The Python of a base environment, made where it is missing or was made of something else."""
    folder = envs / f"base-{name}"
    python, mark, requirements = folder / "bin" / "python", folder / MADE_OF, "\n".join(BASES[name])
    if not mark.is_file() or mark.read_text(encoding="utf-8") != requirements:
        subprocess.run([_uv(), "venv", "-q", "--clear", "--python", sys.executable, str(folder)], check=True)
        more = ["--extra-index-url", index, "--index-strategy", "unsafe-best-match"] if index else []
        subprocess.run([_uv(), "pip", "install", "-q", "--python", str(python), *more, *BASES[name]], check=True)
        mark.write_text(requirements, encoding="utf-8")
    return str(python)


def _uv() -> str:
    found = shutil.which("uv")
    if found is None:
        raise SystemExit("the backtest makes its environments with uv, which is not on PATH: pip install uv")
    return found


def _write_record(record: Record) -> None:
    _write(RECORD, json.dumps(dict(sorted(record.items())), indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    if reason := replace_file(path, text):
        raise SystemExit(reason)


if __name__ == "__main__":
    sys.exit(main())
