"""``pytest-qvl preflight``: options, and what is printed. Standard library only until the files are read."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

from pytest_qvl.preflight.output import FORMATS
from pytest_qvl.preflight.subject import RUNTIMES
from pytest_qvl.vram.cards import card_names

# Packages that Transformers imports wherever they are installed, for what no preflight asks of it: matching boxes and
# assisted generation; httpx its own command line. Without them all of them work.
_UNUSED = ("scipy", "sklearn", "rich")


def add_preflight(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "preflight",
        help="judge a base model and an adapter from their files: no GPU, no weights in memory",
        description="Judge a base model and an adapter from their files, in seconds. Exit code 0: nothing is red; 1: "
        "something is, such as a file that is broken or missing there; 2: it cannot be judged, because what "
        "was given is not there or is something else (no such folder, another family, another method than LoRA).",
    )
    parser.add_argument(
        "base",
        metavar="BASE",
        help="released name (qwen2.5-vl-7b), folder, or hub id; or an adapter's folder alone, which names its base",
    )
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?", type=Path, help="folder of a saved adapter")
    parser.add_argument("--merged", type=Path, metavar="FOLDER", help="a checkpoint that is said to hold the adapter")
    parser.add_argument("--for", dest="runtime", choices=RUNTIMES, default="transformers", help="what will load it")
    parser.add_argument("--skip", action="append", metavar="NAME", help="entry of llm_int8_skip_modules (repeatable)")
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="FILE.json",
        help="fields of peft.LoraConfig: a plan, or what was asked for",
    )
    parser.add_argument("--processor", type=Path, metavar="FOLDER", help="processor, if not beside the adapter")
    parser.add_argument(
        "--adapter-policy", metavar="PARTS", help="parts that are adapted on purpose: language,lm_head,vision"
    )
    parser.add_argument(
        "--quantized-layers",
        metavar="LAYERS",
        help="parts and layers that are in 4 bits on purpose: language,in_proj_a:16bit",
    )
    parser.add_argument("--card", help=f"judge the memory for a card: {', '.join(card_names())}")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", dest="format", action="store_const", const="json", help="print JSON")
    shape.add_argument("--format", dest="format", choices=tuple(FORMATS), help="text (default), json or md")
    parser.set_defaults(run=run_preflight_command, format="text")


def run_preflight_command(options: argparse.Namespace) -> int:
    """Judge and print; returns 1 if anything is red, 2 if what was given is of a kind that is not tested, else 0.

    Raises:
        ValueError: Invalid input; the message names it.
    """
    gc.disable()  # what is imported now stays: looking through it again and again takes a fifth of the time
    own_process = "torch" not in sys.modules
    if own_process:
        # bitsandbytes asks torch.compile for functions that nothing here calls, which imports all of Inductor.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        for name in _UNUSED:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # as if it were not installed
    try:
        from pytest_qvl.models.policy import AdapterPolicy
        from pytest_qvl.models.quantized_layers import QuantizedLayers
        from pytest_qvl.preflight import preflight

        report = preflight(
            options.base,
            options.adapter,
            merged=options.merged,
            runtime=options.runtime,
            skip=options.skip,
            lora=options.lora,
            processor=options.processor,
            card=options.card,
            policy=None if options.adapter_policy is None else AdapterPolicy.parse(options.adapter_policy),
            layers=None if options.quantized_layers is None else QuantizedLayers.parse(options.quantized_layers),
        )
    finally:
        if own_process:
            gc.freeze()  # nor when the process ends, which takes as long
        gc.enable()
    print(FORMATS[options.format](report))
    return {"green": 0, "red": 1, "not judged": 2}[report.state]
