"""Forecast every case of a real trainer and write the file, before anything is measured.

``python -m pytest_qvl.vram.forecast.validation.trainers.predict docs/records/forecast-trainer-predictions.json``
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytest_qvl.vram.cards import card as find_card
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.request import Request
from pytest_qvl.vram.forecast.validation.records import as_plain, peaks, read_record, versions, write_record
from pytest_qvl.vram.forecast.validation.trainers.cases import (
    CARDS,
    PREDICTED,
    cases,
    families_cases,
    kernels_cases,
    kinds_cases,
    later_cases,
    liger_cases,
    name_of,
    olora_cases,
    refused,
    settings_cases,
)
from pytest_qvl.vram.units import MiB

PACKAGES = ("pytest-qvl", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
# What a trainer's run is compared by: everything from its first step on.
STEPS = (phases.FIRST, phases.STATES, *phases.TRAINING, phases.EVALUATION)


def predict(request: Request) -> dict[str, Any]:
    """The forecast of one case and its verdict under the cap of each card; all sizes in bytes."""
    from pytest_qvl.vram.forecast.run import Forecaster, judge

    forecaster = Forecaster(request)
    trace = forecaster.trace(request, inference=False)
    trace.empty_cache_before(phases.ATTACH)  # as the measurement, whose model serves several cases
    found = forecaster.read(request, trace)
    steps = [phase for phase in found.phases if phase.name in STEPS]
    highest = max(steps, key=lambda phase: phase.peak_allocated)
    verdicts = {name: judge(trace, find_card(name), found.peak_reserved) for name in CARDS}
    entry = {
        "name": name_of(request),
        "request": asdict(request),
        "visual_tokens": found.visual_tokens,
        "sequence": found.sequence,
        "resident": found.resident,
        "allocated": highest.peak_allocated,
        "reserved": max(phase.peak_reserved for phase in steps),
        "peak_phase": highest.name,
        "phases": peaks(found.phases),
        "verdicts": {
            name: {
                "available": verdict.available,
                "fits": verdict.fits,
                "tight": verdict.tight,
                "fails_in": verdict.failure and verdict.failure.phase,
            }
            for name, verdict in verdicts.items()
        },
    }
    return as_plain(entry)


def main(arguments: list[str]) -> int:
    """Forecast the cases that are asked for, and write the file after each."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_qvl.vram.forecast.validation.trainers.predict", description=__doc__
    )
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--only", default="", metavar="REGEX", help="forecast these cases again, keep the others")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, forecast what it lacks")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    later = parser.add_mutually_exclusive_group()
    later.add_argument("--settings", action="store_const", dest="cases", const=settings_cases, default=cases)
    later.add_argument("--kinds", action="store_const", dest="cases", const=kinds_cases)
    later.add_argument("--families", action="store_const", dest="cases", const=families_cases)
    later.add_argument("--liger", action="store_const", dest="cases", const=liger_cases)
    later.add_argument("--kernels", action="store_const", dest="cases", const=kernels_cases)
    later.add_argument("--later", action="store_const", dest="cases", const=later_cases)
    later.add_argument("--olora", action="store_const", dest="cases", const=olora_cases)
    options = parser.parse_args(arguments)
    requests = {name_of(request): request for request in options.cases()}
    wanted = [request for name, request in requests.items() if re.search(options.only, name)]
    entries: dict[str, dict[str, Any]] = {}
    if (options.only or options.resume) and options.file.is_file():
        entries = {e["name"]: e for e in read_record(options.file, PREDICTED)["cases"]}
    if options.resume:
        wanted = [request for request in wanted if name_of(request) not in entries]
    failed = [f"not predicted: {why}" for why in refused()]
    with ProcessPoolExecutor(options.jobs) as pool:
        for request, entry in zip(wanted, pool.map(_try, wanted), strict=True):
            if isinstance(entry, str):
                failed.append(f"not predicted: {name_of(request)}: {entry}")
                continue
            entries[entry["name"]] = entry
            kept = [entries[name] for name in requests if name in entries]
            write_record(options.file, {"schema": PREDICTED, "versions": versions(*PACKAGES), "cases": kept})
            print(f"{len(kept)}/{len(requests)} {entry['name']}: {entry['allocated'] / MiB:,.0f} MiB", flush=True)
    print("\n".join(failed), end="\n" if failed else "")
    return int(bool(failed))


def _try(request: Request) -> dict[str, Any] | str:
    """The entry, or the sentence that its forecast ended with."""
    try:
        return predict(request)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
