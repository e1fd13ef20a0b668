"""From the options of ``pytest-qvl forecast`` to a request, with what had to be assumed. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.cap import compute_dtype as dtype_for
from pytest_qvl.vram.cards import card as find_card
from pytest_qvl.vram.forecast.options import OPEN, said_by, with_samples
from pytest_qvl.vram.forecast.request import DTYPE_OF, Request
from pytest_qvl.vram.forecast.trainer_settings import from_lora, from_trainer

if TYPE_CHECKING:
    import argparse

    from pytest_qvl.vram.cards import Card

_PRECISION_OF: dict[str, str] = {dtype: precision for precision, dtype in DTYPE_OF.items()}


@dataclass(frozen=True)
class Asked:
    """What is to be forecast.

    Attributes:
        request: All of it.
        card: The card to judge, if one was named.
        compute_dtype: As asked for; ``None`` for what the card decides.
        tokens: Text tokens of a sample, if they were named.
        assumed: Settings that decide memory and that nobody named, as options.
    """

    request: Request
    card: Card | None
    compute_dtype: str | None
    tokens: int | None
    assumed: tuple[str, ...]


def ask(options: argparse.Namespace) -> Asked:
    """The request that the options make, with what training arguments and a LoRA configuration say.

    Raises:
        ValueError: An option's value cannot be used; the message names it, and the files that were read.
    """
    card = None if options.card is None else find_card(options.card)
    fields: dict[str, Any] = {}
    if options.from_lora is not None:
        fields |= from_lora(options.from_lora)
    if options.from_trainer is not None:
        fields |= from_trainer(options.from_trainer)
    said = said_by(options)
    if options.dataset is not None and {"image", "images", "videos"} & said.keys():
        raise ValueError(
            "--image, --images and --video beside --dataset: its images and videos have sizes of their own"
        )
    if options.dataset is not None and said.get("packed"):
        raise ValueError("--packed beside --dataset: which of its rows are packed together is your collator's choice")
    fields |= said
    compute_dtype = options.compute_dtype or DTYPE_OF.get(fields.get("precision", "").removesuffix("-pure"))
    if fields.get("precision") == "pure":
        dtype = compute_dtype or ("bfloat16" if card is None else dtype_for(card))
        fields["precision"] = f"{_PRECISION_OF[dtype]}-pure"
    try:
        request = Request(**with_samples(fields, Request.tokens))
    except ValueError as error:
        files = [file for file in (options.from_trainer, options.from_lora) if file is not None]
        read = f" (settings were read from {' and '.join(files)}; options go first)" if files else ""
        raise ValueError(f"{error}{read}") from None
    return Asked(request, card, compute_dtype, said.get("tokens"), _assumed(request, fields, card))


def _assumed(request: Request, fields: dict[str, Any], card: Card | None) -> tuple[str, ...]:
    """Options for what decides memory and was not named; a bare model is not trained."""
    if not request.lora_r:
        return ()
    found = []
    for name in (*OPEN, "evaluation_batches") if request.keeps_logits else OPEN:
        option, value = f"--{name.replace('_', '-')}", getattr(request, name)
        if name in fields:
            continue
        if name == "precision" and value is None:
            value = _precision(request, card)
        if value is True:
            found.append(option)
        elif value is not None:
            found.append(f"{option} {value}")
    return tuple(found)


def _precision(request: Request, card: Card | None) -> str:
    """What a trainer or a loop does when nobody says."""
    if card is not None and not card.bf16:
        return "fp16"
    return "bf16-pure" if request.trainer == "loop" else "bf16"
