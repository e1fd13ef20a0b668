"""``pytest-qvl forecast``: options, and what is printed. Standard library only until a forecast is made."""

from __future__ import annotations

import argparse
import gc
import json
import logging
from typing import TYPE_CHECKING

from pytest_qvl.figures import require_matplotlib
from pytest_qvl.outputs import check_file
from pytest_qvl.vram.forecast.asked import ask
from pytest_qvl.vram.forecast.changes import cheapest, render_changes
from pytest_qvl.vram.forecast.options import add_options

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.changes import Change
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
    request, card = asked.request, asked.card
    if options.timeline is not None and options.timeline.suffix != ".svg":
        raise ValueError(f"--timeline writes SVG: {str(options.timeline)!r} must end in .svg")
    if options.timeline is not None and not request.lora_r:
        raise ValueError("--timeline shows a training step, and --lora-r 0 has none")
    if options.timeline is not None:
        check_file("--timeline", options.timeline)
        require_matplotlib("--timeline")
    # About CPU kernels that no forecast uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    gc.disable()  # what is imported now stays: looking through it again and again takes a fifth of the time
    try:
        from transformers.utils import logging as transformers_logging

        from pytest_qvl.vram.forecast.output.as_json import as_json
        from pytest_qvl.vram.forecast.output.text import render
        from pytest_qvl.vram.forecast.output.timeline import draw_timeline
        from pytest_qvl.vram.forecast.run import largest, make_forecaster
        from pytest_qvl.vram.forecast.validation.rules_of_thumb import render_rules_of_thumb, side_by_side
    finally:
        gc.freeze()
        gc.enable()
    transformers_logging.set_verbosity_error()
    forecaster, request = make_forecaster(request, card, asked.compute_dtype)
    forecast = forecaster.forecast(request)
    searches = card is not None and not request.samples and options.largest != "none"
    found = largest(forecaster, forecast, options.largest) if searches else None
    changes = _changes(options, forecaster, forecast, found)
    rules = side_by_side(forecast, forecaster.source.config) if options.compare else []
    if options.timeline is not None:
        draw_timeline(forecast, options.timeline)
    if options.json:
        print(json.dumps(as_json(forecast, asked.assumed, found, changes, rules), indent=1))
    else:
        print(render(forecast, found, asked.assumed))
        if changes is not None:
            print("\n" + render_changes(changes))
        if rules:
            print("\n" + render_rules_of_thumb(rules, forecast))
    return 0 if forecast.verdict is None or forecast.verdict.fits else 1


def _changes(
    options: argparse.Namespace, forecaster: Forecaster, forecast: Forecast, found: Largest | None
) -> list[Change] | None:
    """What would make a training step fit that does not; ``None`` where that is not the question."""
    if forecast.verdict is None or forecast.verdict.fits or not forecast.request.lora_r or not options.changes:
        return None
    smaller = found.forecast if found is not None and found.dimension == "image" else None
    return cheapest(forecast, forecaster.other, smaller)
