"""Show what ``pytest-qvl compare`` says of the embedded model on the CPU: each fault by its checks, of none nothing.

Usage::

    python tools/compare_runs.py faults             # a healthy run against one with each fault of FAULTS
    python tools/compare_runs.py seeds --seeds 20   # a run against itself, and on another instruction set, per seed

Each writes its part of ``docs/records/compare-embedded-cpu.json`` as it goes. What is there already is not run again,
also after a check has changed: delete its entry, or the file, first.

Exit code 1: the fault's own check is not named, one that the fault matrix names is missing, or anything changed though
nothing had. More checks than the matrix names may be: the matrix asks for what is beyond a limit, a comparison for a
quarter of it, and in a run the fault stays from one test to the next.

Runs are the suite's own, with its real command line; in ``faults`` they share the healthy model and its reference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from pytest_qvl.records.compare import Comparison, compare
from pytest_qvl.records.stored import read_record

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
SETTINGS: dict[str, dict[str, str]] = {
    "again": {},
    "least instruction set": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}
OF_SEEDS = ("--qvl-samples", "2", "-k", "not checkpointing and not gradient_arithmetic and not image_isolation")


def of_faults(names: list[str]) -> bool:
    """Compare a healthy run with one for each fault; whether each names its own check and all that the matrix does."""
    matrix = json.loads(MATRIX.read_text(encoding="utf-8"))["rows"]
    _share_the_healthy_model()
    told = _load().get("faults", {})
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        healthy = None
        for name in (one for one in names if one not in told):
            healthy = healthy or _run(Path("healthy.json"), *SAMPLES)
            outcomes = matrix[name]["outcomes"]
            expected = {check for check, outcome in outcomes.items() if outcome not in ("pass", "cannot judge")}
            chosen = " or ".join(f"test_{check}" for check in sorted({*QUICK, *expected, FAULTS[name]}))
            damaged = _run(Path(f"{name}.json"), *SAMPLES, "--qvl-fault", name, "-k", chosen)
            told[name] = _judged(compare(healthy, damaged), FAULTS[name], expected)
            print(name, told[name], flush=True)
            _save("faults", told)
    exact = sum(set(one["regressions"]) == set(one["matrix"]) for one in told.values())
    first = sum(one["first"] and not one["missing"] for one in told.values())
    print(
        f"of {len(told)}: {exact} by exactly the checks of the matrix, {first} by their own check first and all others"
    )
    return all(not one["missing"] and one["check"] in one["regressions"] for one in told.values())


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


def _run(file: Path, *arguments: str) -> dict[str, Any]:
    import pytest

    status = pytest.main([*SUITE, "--no-header", "--tb=no", "--qvl-record", str(file.resolve()), *arguments])
    if status not in (0, 1):
        raise SystemExit(f"pytest {' '.join(arguments)}: exit status {status}")
    return read_record(file)


def of_seeds(seeds: range, settings: list[str]) -> bool:
    """Compare a run of each seed with one more in each setting; whether nothing changed anywhere."""
    told = _load().get("seeds", {})
    for seed in seeds:
        missing = [name for name in settings if name not in told.get(str(seed), {})]
        if not missing:
            continue
        base = _run_apart(seed, {})
        for name in missing:
            found = compare(base, _run_apart(seed, SETTINGS[name]))
            said = {"verdict": found.verdict, "differs": found.versions, "changes": [str(one) for one in found.changes]}
            told = _load().get("seeds", {})  # another process may have its own seeds
            told.setdefault(str(seed), {})[name] = said
            print(seed, name, said, flush=True)
            _save("seeds", told)
    return not any(one["changes"] for by_setting in told.values() for one in by_setting.values())


def _run_apart(seed: int, variables: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        arguments = [*SUITE, "--tb=short", "--qvl-record", str(file), "--qvl-seed", str(seed), *OF_SEEDS]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
        done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=folder, env=environment, check=False)
        if done.returncode != 0:
            raise SystemExit(f"seed {seed}: the run is not green (exit status {done.returncode})")
        return read_record(file)


def _load() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}


def _save(part: str, told: dict[str, Any]) -> None:
    RESULT.write_text(json.dumps({**_load(), part: told}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("faults", "seeds"))
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="seeds 0 to N - 1 (default: 20)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first seed (default: 0)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["again", "least instruction set"])
    given = parser.parse_args()
    seeds = range(given.first, given.seeds)
    good = of_faults(given.only) if given.part == "faults" else of_seeds(seeds, given.settings)
    sys.exit(not good)
