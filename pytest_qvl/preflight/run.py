"""Ask every question and collect the answers."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight.adapter import Adapter, find_adapter, planned_adapter
from pytest_qvl.preflight.base import Base, find_base, quiet
from pytest_qvl.preflight.files.folder import UnsafeFileError
from pytest_qvl.preflight.findings import Finding, Report, neutral
from pytest_qvl.preflight.questions import QUESTIONS, Question
from pytest_qvl.preflight.subject import RUNTIMES, Asked, Subject
from pytest_qvl.releases import STACK, installed

_FILES = 0
_HARM = "what it holds could do harm to whoever loads it"
_BROKEN = "a file is missing, broken or of another kind"
_FIX_UNSAFE = (
    "ask whoever made it for a plain one (safetensors, saved by save_pretrained), and load nothing of it until then"
)
_FIX_BROKEN = "download or save it again"


def run_preflight(asked: Asked) -> Report:
    """See :func:`pytest_qvl.preflight.preflight`."""
    begun = time.perf_counter()
    _check(asked)
    findings, subject = _read(asked)
    if subject is not None:
        with quiet():
            findings += [
                finding for question in QUESTIONS if question.module for finding in _answers(question, subject)
            ]
    return Report(
        asked.base if subject is None else subject.base.label,
        _name_of_adapter(asked),
        tuple(findings),
        {name: version for name in STACK[:4] if (version := installed(name))},
        time.perf_counter() - begun,
    )


def _check(asked: Asked) -> None:
    """Refuse what cannot be meant, before anything is read.

    Raises:
        ValueError: Says what, and what may be given.
    """
    if asked.runtime not in RUNTIMES:
        raise ValueError(f"runtime {asked.runtime!r} is unknown; known: {', '.join(RUNTIMES)}")
    if asked.merged is not None and asked.adapter is None:
        raise ValueError("--merged is compared with an adapter: give its folder too")
    if asked.card is not None:
        from pytest_qvl.vram.cards import card

        card(asked.card)


def _name_of_adapter(asked: Asked) -> str:
    if asked.adapter is not None:
        return str(asked.adapter)
    return "a LoRA configuration" if asked.lora is not None else ""


def _read(asked: Asked) -> tuple[list[Finding], Subject | None]:
    """Read the files; the subject is ``None`` where the base cannot be judged at all.

    Raises:
        ModelSourceError: The base is none that can be judged.
    """
    try:
        base = find_base(asked.base)
    except UnsafeFileError as error:
        return [_refused(_FILES, error, "base")], None
    findings = [_readable_base(base)]
    adapter: Adapter | None = None
    try:
        if asked.adapter is not None:
            adapter = find_adapter(asked.adapter)
            findings.append(_readable_adapter(adapter))
    except ModelSourceError as error:
        if asked.adapter is None or not asked.adapter.expanduser().is_dir():
            raise
        findings.append(_refused(_FILES, error, "adapter"))
    plan = None if asked.lora is None else planned_adapter(asked.lora)
    return findings, Subject(asked, base, plan if asked.adapter is None else adapter, plan)


def _readable_base(base: Base) -> Finding:
    files = {tensor.file for tensor in base.tensors.values()}
    line = f"{base.label}: {len(base.tensors)} tensors by the headers of {len(files)} files"
    if not base.tensors:
        line = f"{base.label}: {base.note or 'configuration only, no weight files'}"
    return Finding(_FILES, "base-files", "green", line)


def _readable_adapter(adapter: Adapter) -> Finding:
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    line = f"{adapter.label}: {len(adapter.tensors)} tensors, {size:,} bytes, by its header"
    return Finding(_FILES, "adapter-files", "green", line)


def _refused(question: int, error: ModelSourceError, what: str = "") -> Finding:
    """A file that was not read; `what` names the artefact where it is not judged at all."""
    unsafe = isinstance(error, UnsafeFileError)
    kind = "unsafe" if unsafe else "unreadable"
    return Finding(
        question,
        f"{what}-{kind}" if what else kind,
        "red",
        f"the {what} is not read: {error}" if what else str(error),
        cause=_HARM if unsafe else _BROKEN,
        fix=_FIX_UNSAFE if unsafe else _FIX_BROKEN,
    )


def _answers(question: Question, subject: Subject) -> Iterator[Finding]:
    """What one question says; whatever it cannot do becomes a finding too."""
    try:
        yield from question.answer(subject)
    except CannotJudge as reason:
        yield Finding(question.number, "not-judged", "not judged", str(reason))
    except ModelSourceError as error:
        yield _refused(question.number, error)
    except Exception as error:  # a defect of this package, or of a library that a broken file has led astray
        yield Finding(
            question.number,
            "not-judged",
            "not judged",
            f"this question met an error of its own: {type(error).__name__}: {neutral(error, 300)}",
        )
