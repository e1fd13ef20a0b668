"""Question 8: whether loading, inference and a training step fit the card, by the forecast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight.commands import pytest_line
from pytest_qvl.preflight.findings import Finding
from pytest_qvl.vram.units import GiB

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject

NUMBER = 8


def answer(subject: Subject) -> Iterator[Finding]:
    """One line: does a training step of one 1024 x 1024 image fit, or where does it run out of memory?"""
    if subject.asked.card is None:
        raise CannotJudge("no --card was given")
    if subject.asked.adapter is not None and subject.adapter is None:
        raise CannotJudge(subject.no_adapter)
    from pytest_qvl.vram.forecast import forecast

    base = subject.base
    if not base.released and base.folder is None:
        raise CannotJudge(f"{base.label} has no configuration at hand that a forecast could be made of")
    try:
        found = forecast(
            base.released or str(base.folder),
            lora_r=_rank(subject),
            checkpoint="16bit" if base.quantization is None else "nf4",
            card=subject.asked.card,
        )
    except ModelSourceError:
        raise
    except ValueError as error:
        raise CannotJudge(f"there is no forecast: {error}") from None
    assert found.verdict is not None
    card = found.verdict.card
    figures = f"{found.verdict.reserved / GiB:.2f} GiB of {found.verdict.available / GiB:.2f} GiB on {card.title}"
    what = f"one sample with a 1024x1024 image ({found.sequence:,} tokens), rank {_rank(subject)}, by the defaults"
    notes = ("it fits only because the allocator gives cached memory back in time",) if found.verdict.tight else ()
    if found.verdict.failure is None:
        yield Finding(
            NUMBER, "fits", "green", f"a training step takes {figures}: {what} of pytest-qvl forecast",
            keeps_green=pytest_line(subject, "forecast_fits_card", "--qvl-card", card.name), notes=notes,
        )  # fmt: skip
        return
    yield Finding(
        NUMBER,
        "does-not-fit",
        "red",
        f"it needs {figures}: {what} of pytest-qvl forecast",
        cause=f"out of memory in {found.verdict.failure.phase}",
        fix=f"pytest-qvl forecast --model {base.released or base.folder} --card {card.name} says what fits",
        keeps_green=pytest_line(subject, "forecast_fits_card", "--qvl-card", card.name),
    )


def _rank(subject: Subject) -> int:
    config: Any = subject.lora if subject.adapter is not None else None
    return 16 if config is None else int(config.r)
