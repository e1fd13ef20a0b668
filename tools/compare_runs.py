"""Show what ``pytest-qvl compare`` says of the embedded model on the CPU: each fault by its checks, of none nothing.

Usage::

    python tools/compare_runs.py faults             # a healthy run against one with each fault of FAULTS
    python tools/compare_runs.py seeds --seeds 20   # a run against itself, and on another instruction set, per seed

Each writes its part of ``docs/records/compare-embedded-cpu.json`` as it goes, and runs again what was made with other
checks or faults than today's. ``--jobs 16 --seconds 480`` runs sixteen at once and starts none that would not end
within eight minutes, going by those before it; the next call goes on from there. ``seeds`` keeps its runs in a file
beside the record, or in ``--part``, until all are there and nothing changed.

Exit code 1: the fault's own check is not named, one that the fault matrix names is missing (but see BY_ORDER), anything
changed though nothing had, a run of a seed was red, or some are still to run. More checks than the matrix names may be:
the matrix asks for what is beyond a limit, a comparison for a quarter of it, and in a run the fault stays from one test
to the next.

Runs are the suite's own, with its real command line; in ``faults`` those of one process share the healthy model and its
reference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pytest_qvl.faults.matrix.freshness import deciding_definitions, definitions_digest
from pytest_qvl.faults.matrix.journal import JsonLines, partial_file
from pytest_qvl.records.compare import Comparison, compare
from pytest_qvl.records.stored import read_record, verdicts

RECORDS = Path(__file__).resolve().parents[1] / "docs" / "records"
RESULT = RECORDS / "compare-embedded-cpu.json"
MATRIX = RECORDS / "faults-embedded-cpu.json"
# One of each kind: the check named beside it has to catch it.
FAULTS = {
    "regex-matches-half": "adapter_census",
    "skip-list-without-head": "quantization_census",
    "absmax-of-one-block-halved": "weights_as_stored",
    "adapter-without-effect": "adapter_roundtrip",
    "adapter-ignores-disabling": "adapter_neutrality",
    "one-dimensional-in-training": "mrope_positions",
    "rope-deltas-off-by-one": "decode_positions",
    "count-check-disabled": "malformed_inputs",
    "features-scaled": "feature_scatter",
    "patches-exchanged-where-slices-meet": "visual_token_order",
    "pictures-attend-both-ways": "causality",
    "equal-pictures-exchanged": "picture_pairing",
    "processor-resizes-bilinear": "image_preprocessing",
    "hidden-penalty": "greedy_is_argmax",
    "remembers-the-last-call": "generation_repeatable",
    "checkpointing-hooks-vision": "vision_not_backpropagated",
    "prompt-in-the-loss": "label_mask",
    "training-mask-dropped": "training_collation",
    "loss-summed": "loss_arithmetic",
    "one-bit-flips-in-training": "frozen_vision",
    "scored-images-leak-into-each-other": "image_isolation",
    "stale-rope-deltas": "position_state",
    "packing-ignored-by-attention": "packing_isolation",
    "head-bias-against-colours": "alignment",
}
# What these damage depends on the call before, so that which other checks meet it depends on the order of the tests; in
# the matrix that is another.
BY_ORDER = ("stale-rope-deltas", "remembers-the-last-call")
# Checks that every run with a fault has beside those that the matrix names: all that take a second or less.
QUICK = (
    *("quantization_census", "weights_as_stored", "checkpoint_complete", "adapter_census", "adapter_roundtrip"),
    *("placeholder_counts", "feature_scatter", "visual_token_order", "malformed_inputs", "causality"),
    *("mrope_positions", "decode_positions", "label_mask", "training_collation", "batch", "loss_arithmetic"),
    *("picture_pairing", "image_preprocessing", "greedy_is_argmax", "generation_repeatable", "generation_as_found"),
    *("layer_arithmetic", "golden_record", "adapter_neutrality", "vision_not_backpropagated"),
)
SUITE = ("-q", "-p", "no:cacheprovider", "--pyargs", "pytest_qvl.suite", "--qvl-device", "cpu")
SAMPLES = ("--qvl-samples", "3")  # per skill, as the faults' own setup has them
# What computes differently, and no bug: torch's and oneDNN's least instruction set, and two threads.
BASE = "base"
SETTINGS: dict[str, dict[str, str]] = {
    BASE: {},
    "again": {},
    "least instruction set": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}
RED = ("BROKEN", "error")
OF_SEEDS = ("--qvl-samples", "2", "-k", "not checkpointing and not gradient_arithmetic and not image_isolation")


def of_faults(names: list[str], jobs: int, seconds: float) -> bool:
    """Compare a healthy run with one for each fault; whether each names its own check and all that the matrix does."""
    told = {name: one for name, one in _load().get("faults", {}).items() if one["definitions"] == _definitions(name)}
    missing = [(name,) for name in names if name not in told]
    with ProcessPoolExecutor(jobs, get_context("spawn"), _share_the_healthy_model) as pool:
        for (name,), found in _in_time(pool, jobs, seconds, _of_fault, missing):
            told[name] = found
            print(name, told[name], flush=True)
            _save("faults", {name: told[name] for name in FAULTS if name in told})
    exact = sum(set(one["regressions"]) == set(one["matrix"]) for one in told.values())
    first = sum(one["first"] and not one["missing"] for one in told.values())
    print(
        f"of {len(told)}: {exact} by exactly the checks of the matrix, {first} by their own check first and all others"
    )
    named = all(named_rightly(name, one) for name, one in told.items())
    return named and all(name in told for name in names)


def named_rightly(name: str, told: dict[str, Any]) -> bool:
    """Whether the fault's own check is among what got worse, and so is every other that the fault matrix has."""
    return told["check"] in told["regressions"] and (not told["missing"] or name in BY_ORDER)


def _of_fault(name: str) -> dict[str, Any]:
    outcomes = json.loads(MATRIX.read_text(encoding="utf-8"))["rows"][name]["outcomes"]
    expected = {check for check, outcome in outcomes.items() if outcome not in ("pass", "cannot judge")}
    chosen = " or ".join(f"test_{check}" for check in sorted({*QUICK, *expected, FAULTS[name]}))
    found = compare(_healthy(), _run(*SAMPLES, "--qvl-fault", name, "-k", chosen))
    return {"definitions": _definitions(name), **_judged(found, FAULTS[name], expected)}


@cache
def _healthy() -> dict[str, Any]:
    return _run(*SAMPLES)


def _definitions(name: str) -> list[str | None]:
    """Digests of what decides how a run with the fault ends: all but single faults, and the fault's own function."""
    now = deciding_definitions()
    return [now.common, now.faults.get(name)]


def _in_time(
    pool: Executor, jobs: int, seconds: float, work: Callable[..., Any], tasks: list[tuple[Any, ...]]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Tasks with their results as they end; none is started that would end too late if it takes as long as the last."""
    begun, lasted, waiting = time.monotonic(), deque([0.0], jobs), deque(tasks)
    running: dict[Future[Any], tuple[tuple[Any, ...], float]] = {}
    while True:
        while waiting and len(running) < jobs and time.monotonic() - begun + max(lasted) <= seconds:
            task = waiting.popleft()
            running[pool.submit(work, *task)] = (task, time.monotonic())
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task, started = running.pop(future)
            lasted.append(time.monotonic() - started)
            yield task, future.result()
    if waiting:
        print(f"{len(waiting)} left for the next call: not started, they would not have ended in time", flush=True)


def _judged(found: Comparison, check: str, expected: set[str]) -> dict[str, Any]:
    regressed = list(dict.fromkeys(change.check for change in found.regressions))
    return {
        "check": check,
        "regressions": regressed,
        "matrix": sorted(expected),
        "first": regressed[:1] == [check],
        "missing": sorted(expected - set(regressed)),
        "verdict": found.verdict,
        "compared": found.compared,
        "text": [str(change) for change in found.regressions],
    }


def _share_the_healthy_model() -> None:
    """Record a reference of the same samples once, and load the healthy model of all faults once."""
    from pytest_qvl import checks, faults
    from pytest_qvl.checks.support.reference import digest

    record, known = checks.record_reference, {}

    def shared(model: Any, processor: Any, samples: Any, **options: Any) -> Any:
        key = (*map(digest, samples), *sorted(options.items()))
        if key not in known:
            known[key] = record(model, processor, samples, **options)
        return known[key]

    checks.record_reference = shared
    faults.healthy_case = cache(faults.healthy_case)


def _run(*arguments: str) -> dict[str, Any]:
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        os.chdir(folder)
        status = pytest.main([*SUITE, "--no-header", "--tb=no", "--qvl-record", str(file), *arguments])
        if status not in (0, 1):
            raise SystemExit(f"pytest {' '.join(arguments)}: exit status {status}")
        return read_record(file)


def of_seeds(seeds: range, settings: list[str], jobs: int, seconds: float, part: Path) -> bool:
    """Compare a run of each seed with one more in each setting; whether nothing changed anywhere."""
    journal = JsonLines(part, {"arguments": [*SUITE, *OF_SEEDS], "definitions": definitions_digest()})
    runs = {(one["seed"], one["setting"]): one["record"] for one in journal.kept}
    wanted = [(seed, name) for seed in seeds for name in (BASE, *settings)]
    with ThreadPoolExecutor(jobs) as pool:
        missing = [one for one in wanted if one not in runs]
        for (seed, name), record in _in_time(pool, jobs, seconds, _run_apart, missing):
            if record is not None:
                runs[seed, name] = record
                journal.write({"seed": seed, "setting": name, "record": record})
    told: dict[str, dict[str, Any]] = {}
    for seed, name in wanted:
        if name != BASE and {(seed, BASE), (seed, name)} <= runs.keys():
            told.setdefault(str(seed), {})[name] = _unchanged(runs[seed, BASE], runs[seed, name])
            print(seed, name, told[str(seed)][name], flush=True)
    if told:
        _save("seeds", {"definitions": definitions_digest(), "settings": settings, "by_seed": told})
    if not runs.keys() >= set(wanted):
        return False
    if any(one["changes"] or one["red"] for by_setting in told.values() for one in by_setting.values()):
        return False  # the part stays, for whoever looks why
    part.unlink()
    return True


def _unchanged(base: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What differs, and what is broken or failed in either run: two red ones may be equal."""
    found = compare(base, record)
    red = {key[1]: one.says for each in (base, record) for key, one in verdicts(each).items() if one.state in RED}
    return {
        "cpu": record["machine"]["cpu"],
        "features": record["machine"]["features"],
        "verdict": found.verdict,
        "differs": found.versions,
        "changes": [str(one) for one in found.changes],
        "red": red,
    }


def _run_apart(seed: int, setting: str) -> dict[str, Any] | None:
    """The record of a run in a process of its own, less pictures and times; without one ``None``, and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        arguments = [*SUITE, "--tb=short", "--qvl-record", str(file), "--qvl-seed", str(seed), *OF_SEEDS]
        variables = {"OMP_NUM_THREADS": "1", **os.environ, **SETTINGS[setting]}
        command = [sys.executable, "-m", "pytest", *arguments]
        done = subprocess.run(command, cwd=folder, env=variables, check=False, capture_output=True, text=True)
        print(f"seed {seed}, {setting}: exit status {done.returncode}", flush=True)
        if done.returncode not in (0, 1) or not file.exists():
            print(f"{done.stdout[-3000:]}{done.stderr[-3000:]}", flush=True)
            return None
        return {**read_record(file), "probes": [], "seconds_by_test": []}


def _load() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}


def _save(part: str, told: dict[str, Any]) -> None:
    RESULT.write_text(json.dumps({**_load(), part: told}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("faults", "seeds"))
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="seeds 0 to N - 1 (default: 20)")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS)[1:], default=["again", "least instruction set"])
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="start none that would end later")
    parser.add_argument("--part", type=Path, default=partial_file(RESULT), metavar="FILE", help="runs of seeds so far")
    given = parser.parse_args()
    try:
        if given.kind == "faults":
            good = of_faults(given.only, given.jobs, given.seconds)
        else:
            good = of_seeds(range(given.seeds), given.settings, given.jobs, given.seconds, given.part)
    except ValueError as error:  # a part of other checks
        parser.error(str(error))
    sys.exit(not good)
