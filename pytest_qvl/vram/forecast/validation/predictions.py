"""Predict first, then measure: forecasts written to a file before the run that judges them.

``python -m pytest_qvl.vram.forecast.validation.predictions docs/records/forecast-predictions.json`` writes the file;
with ``--compare`` it says where forecasts have changed since. ``tests/gpu/test_forecast_cases.py`` and
``tests/gpu/test_t4_cap.py`` build the very requests in it on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.cards import card as find_card
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.request import Request
from pytest_qvl.vram.forecast.validation.records import (
    as_plain,
    peaks,
    read_record,
    request_of,
    versions,
    write_record,
)
from pytest_qvl.vram.units import GiB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.vram.forecast.run import Forecaster

SCHEMA = "pytest-qvl/forecast-predictions/1"
PACKAGES = ("pytest-qvl", "torch", "transformers", "peft", "bitsandbytes")
MODELS = ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
# Side of a square image in pixels, by its visual tokens.
SIDES = {256: 448, 1024: 896, 4096: 1792}
TEXT_TOKENS = 68
# More would not fit the GPUs that the cases are measured on, with what else they hold.
MOST = 70 * GiB
CAP = "t4"
# What a phase of the forecast and of a measurement do not share: the first training step, of which the forecast makes
# the update only.
NOT_COMPARED = (phases.STATES,)


@dataclass(frozen=True)
class Case:
    """One configuration to predict and to measure.

    Attributes:
        request: All of it.
        card: The card to judge; ``None`` for the GPU as it is.
    """

    request: Request
    card: str | None = None

    @property
    def inference(self) -> bool:
        """Whether it generates before it trains."""
        return self.request.generate > 0

    @property
    def name(self) -> str:
        """Short and unique, for test ids and tables."""
        request = self.request
        tokens = next(tokens for tokens, side in SIDES.items() if side == request.image[0])
        words = [request.model.removeprefix("qwen2.5-vl-"), str(tokens)]
        words += [] if request.gradient_checkpointing else ["kept"]
        words += ["upcast"] if request.kbit_upcast else []
        words += ["hook"] if request.vision_hook else []
        return "-".join([*words, *([self.card] if self.card else [])])

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Case:
        """The case of one entry of the file."""
        return cls(request_of(data), data["card"])


def cases() -> list[Case]:
    """Every case: models by visual tokens by checkpointing, then a 7B training step on a capped card."""
    common = {"tokens": TEXT_TOKENS, "optimizer": "adamw_8bit", "checkpoint": "synthetic", "trainer": "loop"}
    found = [
        Case(Request(model, (side, side), gradient_checkpointing=on, generate=32, vision_hook=False, **common))  # type: ignore[arg-type]
        for model in MODELS
        for on in (True, False)
        for side in SIDES.values()
    ]
    capped = Request(
        MODELS[-1],
        compute_dtype="float16",
        capability=find_card(CAP).compute_capability,
        **common,  # type: ignore[arg-type]
    )
    found += [
        Case(replace(capped, image=(side, side), kbit_upcast=upcast, vision_hook=hook), CAP)
        for upcast in (False, True)
        for hook in (False, True)
        for side in SIDES.values()
    ]
    return found


def predict(case: Case, forecaster: Forecaster) -> dict[str, Any]:
    """The forecast of one case, all sizes in bytes."""
    found = forecaster.forecast(case.request, inference=case.inference)
    verdict = found.verdict
    return {
        "name": case.name,
        "card": case.card,
        "request": asdict(case.request),
        "visual_tokens": found.visual_tokens,
        "sequence": found.sequence,
        "resident": found.resident,
        "phases": peaks(found.phases),
        "verdict": verdict
        and {
            "available": verdict.available,
            "reserved": verdict.reserved,
            "fits": verdict.fits,
            "fails_in": verdict.failure and verdict.failure.phase,
        },
        "too_large_to_measure": case.card is None and found.peak_reserved > MOST,
    }


def predictions() -> Iterator[dict[str, Any]]:
    """The forecast of every case, in a process that has made no forecast before.

    bitsandbytes keeps its table of 8-bit values (1 KiB) from the first quantization on, so that only the first model
    of a process counts it.
    """
    from pytest_qvl.vram.forecast.run import Forecaster

    built: tuple[Any, Forecaster] | None = None
    for case in cases():
        # One model serves every image size.
        kind = (replace(case.request, image=(1, 1)), case.card)
        if built is None or built[0] != kind:
            built = kind, Forecaster(case.request, None if case.card is None else find_card(case.card))
        yield as_plain(predict(case, built[1]))


def other_versions(path: Path) -> list[str]:
    """The packages that a file was made with in another version than is installed, each as a few words.

    Without this package, and without the build of torch (``+cpu``), which decide nothing.
    """
    made_with, here = read_record(path, SCHEMA)["versions"], versions(*PACKAGES)
    pairs = [(name, *(str(v.get(name)).partition("+")[0] for v in (made_with, here))) for name in PACKAGES[1:]]
    return [f"{name} {before}, here {now}" for name, before, now in pairs if before != now]


def write_predictions(path: Path) -> None:
    """Predict every case and write the file."""
    write_record(path, {"schema": SCHEMA, "versions": versions(*PACKAGES), "cases": list(predictions())})


def differences(committed: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Where two forecasts of one case differ, a line per value; empty if they are equal to the byte."""
    before, now = dict(_values(committed)), dict(_values(found))
    return [
        f"{committed['name']}: {place}: {before.get(place, 'nothing')} committed, {now.get(place, 'nothing')} now"
        for place in dict.fromkeys((*before, *now))
        if place not in before or place not in now or before[place] != now[place]
    ]


def _values(data: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dictionaries with the way to it."""
    if not isinstance(data, dict):
        yield place, data
        return
    for name, value in data.items():
        yield from _values(value, f"{place}, {name}" if place else name)


def compare_predictions(path: Path) -> int:
    """Forecast every case of a file again and print where it differs; 1 if it does anywhere, else 0."""
    others = other_versions(path)
    if others:
        print(f"{path} was made with {'; '.join(others)}")
    committed, found = read_predictions(path), {entry["name"]: entry for entry in predictions()}
    lines = [line for entry in committed for line in differences(entry, found.pop(entry["name"], {}))]
    lines += [f"{name}: not in the file" for name in found]
    print("\n".join(lines) or f"all {len(committed)} forecasts are those of {path}, to the byte")
    return 1 if lines else 0


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The entries of the file, their requests with every field of today's.

    Raises:
        ValueError: The file is no JSON, or of another schema.
    """
    entries: list[dict[str, Any]] = read_record(path, SCHEMA)["cases"]
    return [{**entry, "request": as_plain(asdict(request_of(entry)))} for entry in entries]


def main(arguments: list[str]) -> int:
    """Write the file that is named, or compare it with today's forecasts."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_qvl.vram.forecast.validation.predictions",
        description="Forecast every case and write the file, or compare.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--compare", action="store_true", help="print where today's forecasts differ from the file's")
    options = parser.parse_args(arguments)
    if options.compare:
        return compare_predictions(options.file)
    write_predictions(options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
