"""``pytest-qvl forecast``: options, and what is printed. Standard library only until a forecast is made."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
from pathlib import Path

from pytest_qvl.figures import require_matplotlib
from pytest_qvl.outputs import check_file
from pytest_qvl.vram.cards import card as find_card
from pytest_qvl.vram.cards import card_names
from pytest_qvl.vram.forecast.request import CHECKPOINTS, DTYPES, OPTIMIZERS, Request


def add_forecast(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "forecast",
        help="will it fit? device memory without a GPU and without weights",
        description="Forecast the device memory of loading, inference and one QLoRA training step.",
    )
    what = parser.add_argument_group("what")
    what.add_argument("--model", default="qwen2.5-vl-7b", help="released name or folder with a config.json")
    what.add_argument("--card", help=f"card to judge: {', '.join(card_names())}")
    what.add_argument("--image", type=_image, default=(1024, 1024), metavar="HxW", help="image size in pixels")
    what.add_argument("--images", type=int, default=1, metavar="N", help="images per sample")
    what.add_argument("--batch", type=int, default=1, metavar="N", help="samples per step")
    what.add_argument("--tokens", type=int, default=256, metavar="N", help="text tokens per sample, images not counted")
    what.add_argument("--generate", type=int, default=0, metavar="N", help="new tokens to decode")
    how = parser.add_argument_group("how")
    how.add_argument("--lora-r", type=int, default=16, metavar="R", help="LoRA rank; 0: inference only")
    how.add_argument("--optimizer", choices=OPTIMIZERS, default="paged_adamw_8bit")
    how.add_argument("--no-gradient-checkpointing", action="store_true", help="keep all activations")
    how.add_argument("--compute-dtype", choices=DTYPES, help="default: bfloat16 where the card has it, else float16")
    how.add_argument("--kbit-upcast", action="store_true", help="after prepare_model_for_kbit_training")
    how.add_argument("--vision-hook", action="store_true", help="leave Transformers' gradient hook on the vision tower")
    how.add_argument("--checkpoint", choices=CHECKPOINTS, default="16bit", help="what is loaded")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--largest",
        choices=("image", "batch", "none"),
        default="image",
        help="what to search for on the card",
    )
    out.add_argument("--compare", action="store_true", help="also ask accelerate and the usual rules of thumb")
    out.add_argument(
        "--timeline", type=Path, metavar="FILE.svg", help="draw the memory of one training step (needs the extra plots)"
    )
    out.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.set_defaults(run=run_forecast)


def _image(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 1024x768 (height x width)")
    return int(match[1]), int(match[2])


def run_forecast(options: argparse.Namespace) -> int:
    """Make the forecast and print it; 0 if it fits or no card was named, 1 if it does not fit.

    Raises:
        ValueError: An option's value cannot be used; the message names it.
    """
    request = Request(
        model=options.model,
        image=options.image,
        images=options.images,
        batch=options.batch,
        tokens=options.tokens,
        lora_r=options.lora_r,
        gradient_checkpointing=not options.no_gradient_checkpointing,
        optimizer=options.optimizer,
        vision_hook=options.vision_hook or None,
        kbit_upcast=options.kbit_upcast,
        generate=options.generate,
        checkpoint=options.checkpoint,
    )
    card = None if options.card is None else find_card(options.card)
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
    forecaster, request = make_forecaster(request, card, options.compute_dtype)
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
        print(render(forecast, found))
        if rules_of_thumb:
            print("\n" + render_rules_of_thumb(rules_of_thumb, forecast))
    return 0 if forecast.verdict is None or forecast.verdict.fits else 1
