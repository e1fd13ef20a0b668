"""Question 3: what becomes of every key of the adapter's file, in the installed PEFT and Transformers, or in vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.sources.base_names import other_base
from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.findings import Finding, neutral
from pytest_qvl.preflight.loading import Loaded, load
from pytest_qvl.preflight.questions.adapter_settings import settings
from pytest_qvl.preflight.questions.misfits import misfits
from pytest_qvl.preflight.questions.serving import unsloth, vllm

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject

NUMBER = 3
_red = partial(red, NUMBER)
# Which releases do not load names of before 4.52, by running them; what is installed is asked itself.
_OLD_NAMES = (
    "Transformers 4.52.4 and 4.53.3 with PEFT 0.15.2, and 5.4.0, 5.10.4, 5.15.1 and 5.23.0 with PEFT 0.18.1 or 0.21.2, "
    "load none of them, without an error (https://github.com/huggingface/transformers/pull/38627)"
)


def answer(subject: Subject) -> Iterator[Finding]:
    """Every key on its module and every module with its keys; rank, alpha, base and family."""
    subject.saved_adapter()
    yield from settings(subject)
    yield from _base(subject)
    try:
        loaded = load(subject)
    except ModelSourceError:
        raise
    except (ValueError, KeyError, TypeError):
        raise CannotJudge("PEFT puts no such adapter on the model, as question 2 says, so it loads no key") from None
    wrong = list(misfits(subject, loaded))
    yield from wrong
    if not wrong:
        yield _lands(subject, loaded)
    if subject.asked.runtime == "vllm":
        yield from vllm(subject, loaded)
    elif subject.asked.runtime == "unsloth":
        yield unsloth(subject)


def _lands(subject: Subject, loaded: Loaded) -> Finding:
    modules = {part.module for part in loaded.wanted}
    layouts = {layout for layout in loaded.layouts.values() if layout}
    return Finding(
        NUMBER,
        "keys",
        "green",
        f"all {len(loaded.keys)} keys of the file land, on {len(modules)} modules ({subject.by_group(modules)}), and "
        "none of them lacks one",
        keeps_green=pytest_line(subject),
        notes=(f"the file has names of before Transformers 4.52: {_OLD_NAMES}",) if "old" in layouts else (),
    )


def _base(subject: Subject) -> Iterator[Finding]:
    adapter, base = subject.adapter, subject.base
    assert adapter is not None
    named = str(adapter.fields.get("base_model_name_or_path") or "")
    other = other_base(adapter.fields, base.name, base.config)
    if other.certain:
        yield _red(
            subject,
            "other-base",
            other.sentence,
            cause="an adapter is a difference to the weights that it was trained on, and means nothing on others",
            fix=f"judge it on {neutral(named, 200)!r}, or give the adapter of this base",
        )
    elif other.sentence:
        yield Finding(NUMBER, "base-name", "not judged", other.sentence)
    else:
        said = f"the adapter names {named!r} as its base" if named else "the adapter names no base"
        yield Finding(NUMBER, "base-name", "green" if named else "not judged", said)
