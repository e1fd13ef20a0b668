"""Ask every question and collect the answers."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.sources.model_source import ADAPTER_CONFIG, ModelSourceError
from pytest_qvl.preflight.adapter import Adapter, find_adapter, planned_adapter
from pytest_qvl.preflight.base import Base, find_base, quiet
from pytest_qvl.preflight.files.folder import Folder, MiB
from pytest_qvl.preflight.findings import NOT_TESTED, OWN_ERROR, Finding, Report, neutral
from pytest_qvl.preflight.questions import QUESTIONS, Question
from pytest_qvl.preflight.refusals import RefusedError, refused
from pytest_qvl.preflight.subject import RUNTIMES, Asked, Subject
from pytest_qvl.releases import STACK, installed

_FILES = 0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def run_preflight(asked: Asked) -> Report:
    """See :func:`pytest_qvl.preflight.preflight`."""
    begun = time.perf_counter()
    asked = _with_named_base(asked)
    _check(asked)
    findings, subject = _read(asked)
    if subject is not None:
        with quiet():
            for question in QUESTIONS:
                findings += _once(_answers(question, subject), findings) if question.module else ()
    return Report(
        asked.base if subject is None else subject.base.label,
        _name_of_adapter(asked),
        tuple(findings),
        {name: version for name in STACK[:4] if (version := installed(name))},
        time.perf_counter() - begun,
    )


def _once(found: Iterable[Finding], said: Sequence[Finding]) -> list[Finding]:
    """What a question found, where a red finding that an earlier one has made in the same words is only pointed to."""
    before = {finding.line: finding.question for finding in said if finding.state == "red"}
    return [
        Finding(each.question, "not-judged", "not judged", f"not before the red finding of question {number} is fixed")
        if (number := before.get(each.line, each.question)) != each.question
        else each
        for each in found
    ]


def _with_named_base(asked: Asked) -> Asked:
    """Where the only thing given is an adapter: on the base that it names on the hub.

    Raises:
        ModelSourceError: It names none, or a folder; what a stranger's file names on this machine is not opened.
    """
    path = Path(asked.base).expanduser()
    if asked.adapter is not None or not (path / ADAPTER_CONFIG).is_file() or (path / "config.json").exists():
        return asked
    named = Folder(path).json(ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not _HUB_ID.fullmatch(named):
        raise ModelSourceError(
            f"the adapter {neutral(repr(asked.base))} names the base {neutral(repr(named), 200)}, which is no hub id: "
            f"give the base first, `pytest-qvl preflight BASE {neutral(shlex.quote(asked.base))}`"
        )
    return replace(asked, base=f"hub:{named}", adapter=path)


def _check(asked: Asked) -> None:
    """Refuse what cannot be meant, before anything is read.

    Raises:
        ValueError: Says what, and what may be given.
    """
    if asked.runtime not in RUNTIMES:
        raise ValueError(f"runtime {asked.runtime!r} is unknown; known: {', '.join(RUNTIMES)}")
    if asked.merged is not None and asked.adapter is None:
        raise ValueError("--merged is compared with an adapter: give its folder too")
    for option, folder in (("--merged", asked.merged), ("--processor", asked.processor)):
        if folder is not None and not folder.expanduser().is_dir():
            raise ValueError(f"{option}: the folder {neutral(repr(str(folder)))} does not exist")
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
        ModelSourceError: The call is wrong (:mod:`pytest_qvl.preflight.refusals`): something that was named is not
            there, or is something else.
    """
    try:
        base = find_base(asked.base)
    except RefusedError as error:
        return [refused(_FILES, error, "base")], None
    findings = [_readable_base(base)]
    adapter: Adapter | None = None
    if asked.adapter is not None:
        try:
            adapter = find_adapter(asked.adapter)
            findings.append(_readable_adapter(adapter))
        except RefusedError as error:
            findings.append(refused(_FILES, error, "adapter"))
        except CannotJudge as reason:
            findings.append(Finding(_FILES, NOT_TESTED, "not judged", str(reason)))
    merged: Base | None = None
    if asked.merged is not None:
        try:
            merged = find_base(f"local:{asked.merged}")
            if merged.unread is not None:
                raise merged.unread
        except RefusedError as error:
            merged = None
            findings.append(refused(_FILES, error, "merged checkpoint"))
    plan: Adapter | None = None
    if asked.lora is not None:
        try:
            plan = planned_adapter(asked.lora)
        except CannotJudge as reason:
            findings.append(Finding(_FILES, NOT_TESTED, "not judged", str(reason)))
    return findings, Subject(asked, base, plan if asked.adapter is None else adapter, plan, merged)


def _readable_base(base: Base) -> Finding:
    if base.unread is not None:
        return refused(_FILES, base.unread, "base")
    files = {tensor.file for tensor in base.described.values()}
    line = f"{base.label}: {len(base.described)} tensors in {len(files)} file{'s' if len(files) > 1 else ''}"
    if base.headers:
        line += " by their headers; the weights stay on the hub"
    if not base.described:
        line = f"{base.label}: {base.note or 'configuration only, no weight files'}"
    return Finding(_FILES, "base-files", "green", line)


def _readable_adapter(adapter: Adapter) -> Finding:
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    line = f"{adapter.label}: {len(adapter.tensors)} tensors, {size / MiB:,.1f} MiB"
    return Finding(_FILES, "adapter-files", "green", line)


def _answers(question: Question, subject: Subject) -> Iterator[Finding]:
    """What one question says; whatever it cannot do becomes a finding too."""
    try:
        yield from question.answer(subject)
    except CannotJudge as reason:
        yield Finding(question.number, "not-judged", "not judged", str(reason))
    except ModelSourceError as error:
        yield refused(question.number, error)
    except Exception as error:  # a defect of this package, or of a library that a broken file has led astray
        yield Finding(
            question.number,
            OWN_ERROR,
            "not judged",
            f"this question met an error of its own: {type(error).__name__}: {neutral(error, 300)}",
        )
