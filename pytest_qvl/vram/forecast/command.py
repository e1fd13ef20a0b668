"""``pytest-qvl forecast``: options, and what is printed. Standard library only until a forecast is made."""

from __future__ import annotations

import argparse
import gc
import json
import logging

from pytest_qvl.figures import require_matplotlib
from pytest_qvl.outputs import check_file
from pytest_qvl.vram.forecast.asked import ask
from pytest_qvl.vram.forecast.options import add_options


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
    found = None if card is None or options.largest == "none" else largest(forecaster, forecast, options.largest)
    rules_of_thumb = side_by_side(forecast, forecaster.source.config) if options.compare else []
    if options.timeline is not None:
        draw_timeline(forecast, options.timeline)
    if options.json:
        data = forecast.as_dict()
        if found is not None:
            data["largest"] = {
                "dimension": found.dimension,
                "request": found.forecast and found.forecast.as_dict()["request"],
                "refused": found.refused and found.refused.as_dict()["request"],
                "bounded": found.bounded,
            }
        if rules_of_thumb:
            data["rules"] = [vars(rule) for rule in rules_of_thumb]
        print(json.dumps(data, indent=1))
    else:
        print(render(forecast, found, asked.assumed))
        if rules_of_thumb:
            print("\n" + render_rules_of_thumb(rules_of_thumb, forecast))
    return 0 if forecast.verdict is None or forecast.verdict.fits else 1
