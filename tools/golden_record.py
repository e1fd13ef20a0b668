"""Record what the installed releases make of the golden record's inputs, or confirm the record with other releases.

Usage: ``python tools/golden_record.py [NAME]`` after an embedded model (the first one if none is named) was trained
anew or the probes changed, and then, in an environment of each other set of releases, ``python tools/golden_record.py
[NAME] --confirm``. Everything runs in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from pytest_qvl.checks.golden import golden_record
from pytest_qvl.checks.support.activations import leaves
from pytest_qvl.checks.support.golden_data import (
    GOLDEN_FILE,
    PROBES,
    RESIZED,
    Golden,
    Response,
    Stage,
    image,
    inputs_of,
    observed,
    places,
    places_kept,
    recipe_of,
)
from pytest_qvl.checks.support.rounding import last_place_noise
from pytest_qvl.checks.support.tower import DriftsSeen, row_drift
from pytest_qvl.faults.case import load
from pytest_qvl.faults.subject import Subject
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources.embedded import FIRST, embedded_model_dir, embedded_names
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.samples import make_batch

PACKAGES = ("transformers", "torch", "bitsandbytes", "pillow")
DRAWS = 8  # of last-place noise


def recorded(name: str) -> Golden:
    """The record of an embedded model, with the installed releases."""
    processor = load_processor(embedded_model_dir(name))
    models = {kind: loaded(name, quantized=kind == "nf4") for kind in ("full", "nf4")}
    recipe = recipe_of(anatomy(models["full"]))
    sizes = [*dict.fromkeys(size for probe in PROBES for size in probe.sizes(recipe)), RESIZED]
    probes, images, typed = [], [_image(processor, size) for size in sizes], False
    for probe in PROBES:
        batch = make_batch(processor, [probe.sample(recipe)])
        typed = "mm_token_type_ids" in batch
        probes.append({"input_ids": batch["input_ids"][0].tolist(), "grids": batch["image_grid_thw"].tolist()})
    found = {kind: _stages(model, probes, typed=typed) for kind, model in models.items()}
    vision = [name for name, stage in found["full"].items() if stage.kind not in ("layer", "logits")]
    stages = {"vision": {name: found["full"][name] for name in vision}}  # NF4 leaves the tower as it is
    stages |= {kind: {n: s for n, s in each.items() if n not in vision} for kind, each in found.items()}
    return Golden(versions(), [], probes, images, stages)


def loaded(name: str, *, quantized: bool) -> Any:
    """An embedded model in float32, in NF4 or not, without an adapter."""
    return load(subject=Subject.of(f"embedded:{name}", dtype="float32"), quantized=quantized, lora=None)


def versions() -> dict[str, str]:
    """The releases that count."""
    return {name: version(name) for name in PACKAGES}


def _image(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    made = processor.image_processor(images=[image(*size)], return_tensors="pt")
    values = made["pixel_values"].double()
    kept = [round(float(value), 7) for value in values.reshape(-1)[places_kept(values.numel())]]
    return {"size": list(size), "grid": made["image_grid_thw"][0].tolist(), "values": kept}


def _stages(model: Any, probes: list[dict[str, Any]], *, typed: bool) -> dict[str, Stage]:
    import torch

    parts = anatomy(model)
    inputs = [
        inputs_of(parts, probe, said["input_ids"], said["grids"], typed=typed)
        for probe, said in zip(PROBES, probes, strict=True)
    ]
    plain = [observed(parts, each) for each in inputs]
    for said, found in zip(probes, plain, strict=True):
        said["positions"] = found.positions.tolist()
    seen = {name: DriftsSeen() for name in places(parts)}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        for each, found in zip(inputs, plain, strict=True):
            with last_place_noise(leaves(parts.base)):
                noisy = observed(parts, each)
            for name, drifts in seen.items():
                drifts.take(row_drift(noisy.stages[name], found.stages[name]))
    eps = torch.finfo(torch.float32).eps
    made = {}
    for name, (kind, _) in places(parts).items():
        drift = seen[name].drift()
        response = Response(round(drift.rms / eps, 3), round(drift.row / eps, 3))
        made[name] = Stage(kind, tuple(found.stages[name] for found in plain), response)
    return made


def confirmed(golden: Golden, name: str) -> Golden:
    """The same with the installed releases among those that confirmed it, if they do."""
    processor = load_processor(embedded_model_dir(name))
    for quantized in (False, True):
        print(golden_record(loaded(name, quantized=quantized), processor).table)
    known = [golden.recorded_with, *golden.confirmed_with]
    return golden if versions() in known else replace(golden, confirmed_with=[*golden.confirmed_with, versions()])


def main() -> None:
    """Write the record of an embedded model."""
    parser = argparse.ArgumentParser(description="Write or confirm the golden record of an embedded model.")
    parser.add_argument("name", nargs="?", default=FIRST, choices=embedded_names())
    parser.add_argument("--confirm", action="store_true", help="hold the installed releases to the record there")
    asked = parser.parse_args()
    folder = embedded_model_dir(asked.name)
    if asked.confirm:
        golden = Golden.read(folder)
        if golden is None:
            sys.exit(f"{folder / GOLDEN_FILE} is missing: run this without --confirm")
        confirmed(golden, asked.name).write(folder)
    else:
        recorded(asked.name).write(folder)
    print(f"wrote {folder / GOLDEN_FILE}")


if __name__ == "__main__":
    main()
