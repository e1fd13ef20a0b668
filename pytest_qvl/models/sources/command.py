"""``pytest-qvl synthesize``: options, and what is printed. Standard library only until the weights are made."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_qvl.outputs import check_folder

DTYPES = ("bfloat16", "float16", "float32")


def add_synthesize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand ``synthesize`` with an ``argparse`` sub-parser collection."""
    parser = commands.add_parser(
        "synthesize",
        help="write a true-size checkpoint with random weights, to try what loading one costs",
        description="Write a checkpoint folder with random weights of a released architecture: weights in shards, "
        "configuration, processor and tokenizer, to be loaded like any other (--qvl-model FOLDER).",
    )
    parser.add_argument("name", metavar="NAME", help="released name, such as qwen2.5-vl-7b")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to; must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all tensors (default 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to draw them (default: cuda if there is one)")
    parser.set_defaults(run=run_synthesize)


def run_synthesize(options: argparse.Namespace) -> int:
    """Write the checkpoint folder that the command line asks for; returns the exit code 0.

    Raises:
        ValueError: Unknown name, a folder that is not empty, a disk too small, or no such device.
    """
    import functools

    check_folder("FOLDER", options.folder)
    import torch

    from pytest_qvl.models.sources.released import released_config
    from pytest_qvl.models.sources.synthetic_checkpoint import GIB, write_checkpoint
    from pytest_qvl.models.sources.synthetic_processor import write_processor

    config = released_config(options.name)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is visible")
    size = write_checkpoint(
        config,
        options.folder,
        functools.partial(write_processor, name=options.name),
        device=device,
        dtype=options.dtype,
        seed=options.seed,
        notify=print,
    )
    print(f"{options.folder}: {size / GIB:.1f} GiB of {options.dtype} weights; try --qvl-model {options.folder}")
    return 0
