"""``pytest-qvl forecast``: options, and what is printed. Standard library only until a forecast is made."""

from __future__ import annotations

import argparse
import gc
import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qvl.figures import require_matplotlib
from pytest_qvl.outputs import check_file
from pytest_qvl.vram.forecast.asked import ask
from pytest_qvl.vram.forecast.changes import cheapest
from pytest_qvl.vram.forecast.imports import only_what_runs
from pytest_qvl.vram.forecast.options import add_options

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qvl.vram.forecast.asked import Asked
    from pytest_qvl.vram.forecast.changes import Change
    from pytest_qvl.vram.forecast.output.answer import Answer
    from pytest_qvl.vram.forecast.request import Request
    from pytest_qvl.vram.forecast.result import Forecast, Largest
    from pytest_qvl.vram.forecast.run import Forecaster


def add_forecast(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "forecast",
        help="will it fit? device memory without a GPU and without weights",
        description="Forecast the device memory of loading, inference and one QLoRA training step.",
    )
    add_options(parser)
    parser.set_defaults(run=run_forecast)


def run_forecast(options: argparse.Namespace) -> int:
    """Make the forecast and print it; 0 if it fits or no card was named, 1 if it does not fit.

    Raises:
        ValueError: An option's value cannot be used; the message names it.
    """
    asked = ask(options)
    if options.timeline is not None:
        _check_timeline(options.timeline, asked.request)
    # About CPU kernels that no forecast uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    gc.disable()  # what is imported now stays: looking through it again and again takes a fifth of the time
    try:
        with only_what_runs() if options.own_process else nullcontext():
            import bitsandbytes  # noqa: F401
            import peft  # noqa: F401
            from transformers import AutoModelForImageTextToText  # noqa: F401
            from transformers.utils import logging as transformers_logging

            import pytest_qvl.vram.forecast.output.answer
            import pytest_qvl.vram.forecast.output.timeline
            import pytest_qvl.vram.forecast.run
    finally:
        if options.own_process:
            gc.freeze()
        gc.enable()
    transformers_logging.set_verbosity_error()
    answer = _answer(options, asked)
    if options.timeline is not None:
        pytest_qvl.vram.forecast.output.timeline.draw_timeline(answer.forecast, options.timeline)
    print(json.dumps(answer.as_json(), indent=1) if options.json else answer.as_text())
    return 0 if answer.forecast.verdict is None or answer.forecast.verdict.fits else 1


def _check_timeline(file: Path, request: Request) -> None:
    if file.suffix != ".svg":
        raise ValueError(f"--timeline writes SVG: {str(file)!r} must end in .svg")
    if not request.lora_r:
        raise ValueError("--timeline shows a training step, and --lora-r 0 has none")
    check_file("--timeline", file)
    require_matplotlib("--timeline")


def _answer(options: argparse.Namespace, asked: Asked) -> Answer:
    """Everything that the options ask for."""
    from pytest_qvl.vram.forecast.output.answer import Answer
    from pytest_qvl.vram.forecast.output.of_dataset import forecast_batches
    from pytest_qvl.vram.forecast.run import largest, make_forecaster
    from pytest_qvl.vram.forecast.validation.rules_of_thumb import side_by_side

    request, dataset = asked.request, None
    if options.dataset is not None:
        from pytest_qvl.vram.forecast.dataset import read_dataset
        from pytest_qvl.vram.forecast.source import find_source

        dataset = read_dataset(options.dataset, find_source(request.model), request.model, asked.tokens)
        request = replace(request, samples=dataset.worst(request.batch).samples)
    forecaster, request = make_forecaster(request, asked.card, asked.compute_dtype)
    forecast = forecaster.forecast(request, timeline=options.timeline is not None)
    searches = asked.card is not None and not request.samples and options.largest != "none"
    found = largest(forecaster, forecast, options.largest) if searches else None
    unsaid = forecast.linear_attention and not hasattr(options, "linear_attention")
    return Answer(
        forecast,
        (*asked.assumed, *([f"--linear-attention {request.linear_attention}"] if unsaid else [])),
        None if dataset is None else forecast_batches(dataset, forecast, forecaster),
        found,
        _changes(options, forecaster, forecast, found),
        side_by_side(forecast, forecaster.source.config) if options.compare else None,
    )


def _changes(
    options: argparse.Namespace, forecaster: Forecaster, forecast: Forecast, found: Largest | None
) -> list[Change] | None:
    """What would make a training step fit that does not; ``None`` where that is not the question."""
    if forecast.verdict is None or forecast.verdict.fits or not forecast.request.lora_r or not options.changes:
        return None
    smaller = found.forecast if found is not None and found.dimension == "image" else None
    return cheapest(forecast, forecaster.other, smaller)
