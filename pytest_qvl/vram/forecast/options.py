"""The options of ``pytest-qvl forecast``, and what was said by them. Standard library only."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from pytest_qvl.vram.cards import card_names
from pytest_qvl.vram.forecast.request import (
    BASE_BITS,
    CHECKPOINTS,
    DTYPES,
    LINEAR_ATTENTIONS,
    LORA_TARGETS,
    OPTIMIZERS,
    PRECISIONS,
    PREPROCESS_LOGITS,
    TRAINERS,
    Request,
    Sample,
    is_pattern,
)

# Fields of a request that decide memory and that people may not know they left open, in the order they are shown.
OPEN = ("trainer", "precision", "accumulation", "gradient_checkpointing", "lora_r", "optimizer")
_FIELDS = (
    *("model", "images", "batch", "tokens", "generate", "lora_r", "optimizer", "gradient_checkpointing"),
    *("reentrant", "kbit_upcast", "vision_hook", "checkpoint", "trainer", "precision", "accumulation", "evaluation"),
    *("evaluation_batches", "compute_metrics", "preprocess_logits", "eval_accumulation_steps", "batch_eval_metrics"),
    *("max_length", "pad_to_multiple_of", "compiled", "ddp", "ddp_bucket_cap_mb", "linear_attention"),
    *("packed", "resume", "load_best"),
    *("lora_targets", "lora_dropout", "use_dora", "modules_to_save", "trainable_tokens", "base_bits", "liger"),
)
_Group = argparse._ArgumentGroup


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option; those of a request have no default, so that what was said can be told from what was not."""
    _add_what(parser.add_argument_group("what"))
    _add_how(parser.add_argument_group("how"))
    _add_output(parser.add_argument_group("output"))


def _add_what(group: _Group) -> None:
    unsaid: Any = argparse.SUPPRESS
    group.add_argument(
        "--model", default=unsaid, help="released name or folder with a config.json (default: qwen2.5-vl-7b)"
    )
    group.add_argument("--card", help=f"card to judge: {', '.join(card_names())}")
    group.add_argument(
        "--image",
        type=_image,
        nargs="+",
        default=unsaid,
        metavar="HxW",
        help="image size in pixels (default: 1024x1024); several for a sample with one image of each size",
    )
    group.add_argument(
        "--video",
        type=_video,
        nargs="+",
        default=unsaid,
        metavar="FxHxW",
        help="sampled frames of a video and their size, in place of --image unless that is given too; several for a "
        "sample with each",
    )
    group.add_argument("--images", type=int, default=unsaid, metavar="N", help="images per sample (default: 1)")
    group.add_argument("--batch", type=int, default=unsaid, metavar="N", help="samples per step (default: 1)")
    group.add_argument(
        "--tokens",
        type=int,
        default=unsaid,
        metavar="N",
        help="text tokens per sample, images not counted (default: 256)",
    )
    group.add_argument(
        "--dataset",
        type=Path,
        metavar="FOLDER|FILE.jsonl",
        help="forecast the worst batch of a folder of images or of rows with images and text, beside the usual ones",
    )
    group.add_argument(
        "--max-length",
        type=int,
        default=unsaid,
        metavar="N",
        help="tokens that the trainer cuts samples to (default: all)",
    )
    group.add_argument(
        "--pad-to-multiple-of", type=int, default=unsaid, metavar="N", help="of a batch's length (default: 1)"
    )
    group.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        default=unsaid,
        help="whether a collator of yours puts the samples of a batch into one row (default: no)",
    )
    group.add_argument("--generate", type=int, default=unsaid, metavar="N", help="new tokens to decode (default: 0)")


def _add_how(group: _Group) -> None:
    unsaid: Any = argparse.SUPPRESS
    switch = argparse.BooleanOptionalAction
    group.add_argument(
        "--from-trainer",
        metavar="FILE.json|MODULE:NAME",
        help="read the settings of a TrainingArguments or SFTConfig: saved as JSON, or a name in a module of yours, "
        "which is imported; options go first",
    )
    group.add_argument(
        "--from-lora",
        metavar="FILE.json|MODULE:NAME",
        help="read the settings of a LoraConfig: an adapter_config.json, or a name in a module of yours",
    )
    group.add_argument(
        "--trainer",
        choices=TRAINERS,
        default=unsaid,
        help="who runs the steps: transformers.Trainer (default), TRL's SFTTrainer, Unsloth's or a plain loop",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=unsaid,
        help="autocast (bf16, fp16) or none (-pure); default: autocast to the compute dtype by a trainer",
    )
    group.add_argument("--accumulation", type=int, default=unsaid, metavar="N", help="batches per update (default: 1)")
    group.add_argument(
        "--evaluation", type=int, default=unsaid, metavar="N", help="samples per batch of an evaluation (default: none)"
    )
    group.add_argument(
        "--evaluation-batches", type=int, default=unsaid, metavar="N", help="batches of that evaluation (default: 1)"
    )
    group.add_argument(
        "--compute-metrics",
        action=switch,
        default=unsaid,
        help="whether the trainer has compute_metrics, so that an evaluation keeps its logits (default: no)",
    )
    group.add_argument(
        "--preprocess-logits",
        choices=[name for name in PREPROCESS_LOGITS if name],
        default=unsaid,
        help="what preprocess_logits_for_metrics leaves of logits (default: all of them)",
    )
    group.add_argument(
        "--eval-accumulation-steps",
        type=int,
        default=unsaid,
        metavar="N",
        help="batches after which what an evaluation keeps goes to the host (default: after all)",
    )
    group.add_argument(
        "--batch-eval-metrics", action=switch, default=unsaid, help="metrics batch by batch (default: no)"
    )
    group.add_argument(
        "--lora-r", type=int, default=unsaid, metavar="R", help="LoRA rank (default: 16); 0: inference only"
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        default=unsaid,
        metavar="NAME",
        help=f"{' or '.join(LORA_TARGETS)}, names of modules, or one regular expression (default: language)",
    )
    group.add_argument("--lora-dropout", type=float, default=unsaid, metavar="P", help="default: 0")
    group.add_argument("--use-dora", action=switch, default=unsaid, help="DoRA instead of LoRA")
    group.add_argument("--modules-to-save", nargs="+", default=unsaid, metavar="NAME", help="modules trained whole")
    group.add_argument("--trainable-tokens", type=int, default=unsaid, metavar="N", help="trained rows of embeddings")
    group.add_argument(
        "--compiled",
        action=switch,
        default=unsaid,
        help="whether Unsloth compiles (default: yes; no: UNSLOTH_COMPILE_DISABLE=1)",
    )
    group.add_argument(
        "--ddp", action=switch, default=unsaid, help="on each of several cards, under DistributedDataParallel"
    )
    group.add_argument(
        "--ddp-bucket-cap-mb", type=int, default=unsaid, metavar="N", help="MiB of a bucket of gradients (default: 25)"
    )
    group.add_argument(
        "--resume", action=switch, default=unsaid, help="whether the training goes on from a checkpoint (default: no)"
    )
    group.add_argument(
        "--load-best", action=switch, default=unsaid, help="whether it loads the best adapter at its end (default: no)"
    )
    group.add_argument("--base-bits", type=int, choices=BASE_BITS, default=unsaid, help="of the base (default: 4)")
    group.add_argument(
        "--liger", action=switch, default=unsaid, help="with use_liger_kernel, by the trainers hf and trl (default: no)"
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, default=unsaid, help="default: paged_adamw_8bit")
    group.add_argument(
        "--gradient-checkpointing", action=switch, default=unsaid, help="recompute layers in backward (default: yes)"
    )
    group.add_argument(
        "--reentrant",
        action=switch,
        default=unsaid,
        help="whether checkpointing is reentrant, as use_reentrant says (default: as the trainer has it)",
    )
    group.add_argument(
        "--linear-attention",
        choices=LINEAR_ATTENTIONS,
        default=unsaid,
        help="what computes it in Qwen3.5: Transformers' PyTorch code (default), or the kernels that are installed",
    )
    group.add_argument("--compute-dtype", choices=DTYPES, help="default: bfloat16 where the card has it, else float16")
    group.add_argument("--kbit-upcast", action=switch, default=unsaid, help="after prepare_model_for_kbit_training")
    group.add_argument(
        "--vision-hook",
        action=switch,
        default=unsaid,
        help="whether Transformers' gradient hook stays on the vision tower (default: as the trainer leaves it)",
    )
    group.add_argument("--checkpoint", choices=CHECKPOINTS, default=unsaid, help="what is loaded (default: 16bit)")


def _add_output(group: _Group) -> None:
    group.add_argument(
        "--largest", choices=("image", "batch", "none"), default="image", help="what to search for on the card"
    )
    group.add_argument(
        "--changes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where it does not fit, forecast the three cheapest changes that make it fit",
    )
    group.add_argument("--compare", action="store_true", help="also ask accelerate and the usual rules of thumb")
    group.add_argument(
        "--timeline", type=Path, metavar="FILE.svg", help="draw the memory of one training step (needs the extra plots)"
    )
    group.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def said_by(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of a request that the options name, and no others.

    Raises:
        ValueError: ``--image`` with several sizes beside ``--images``.
    """
    said = {name: getattr(options, name) for name in _FIELDS if hasattr(options, name)}
    if "lora_targets" in said:
        names = said["lora_targets"]
        whole = len(names) == 1 and (names[0] in LORA_TARGETS or is_pattern(names[0]))
        said["lora_targets"] = names[0] if whole else tuple(names)
    if "modules_to_save" in said:
        said["modules_to_save"] = tuple(said["modules_to_save"])
    sizes = getattr(options, "image", None)
    if sizes and len(sizes) > 1 and "images" in said:
        raise ValueError(f"--images {said['images']} beside {len(sizes)} sizes of --image: each size is one image")
    if sizes:
        said["image"] = sizes[0] if len(sizes) == 1 else tuple(sizes)
    if hasattr(options, "video"):
        said["videos"] = tuple(options.video)
    return said


def with_samples(fields: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Fields of a request, of which ``image`` may be several sizes, and ``videos`` is none: they become samples.

    Args:
        fields: As :func:`said_by` gives them.
        tokens: Text tokens of a sample, if the fields do not say.
    """
    sizes, videos = fields.get("image"), fields.get("videos", ())
    if (sizes is None or isinstance(sizes[0], int)) and not videos:
        return fields
    if sizes is None or isinstance(sizes[0], int):
        sizes = (sizes or Request.image,) * fields.get("images", 0 if sizes is None else 1)
    alike = Sample(sizes, fields.get("tokens", tokens), videos)
    gone = {"image", "images", "videos", "batch", "tokens"}
    others = {name: value for name, value in fields.items() if name not in gone}
    return {**others, "samples": (alike,) * fields.get("batch", 1)}


def _video(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})x([0-9]{1,6})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no video like 16x364x644 (frames x height x width)")
    return int(match[1]), int(match[2]), int(match[3])


def _image(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 1024x768 (height x width)")
    return int(match[1]), int(match[2])
