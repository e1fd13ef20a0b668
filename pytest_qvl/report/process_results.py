"""What one process that ran tests says of its session: verdicts, limits, the GPU that it leased, its VRAM."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pytest_qvl.report.report_data import LimitOutcome
from pytest_qvl.vram.usage import Usage


@dataclass(frozen=True)
class SeenProbe:
    """What the model saw and said to one question.

    Attributes:
        target: As findings name it.
        skill: What it takes to answer.
        question: About the images.
        answer: The right one.
        images: As data URIs, with a line between visual tokens.
        replies: By precision.
        failed: Why there is no reply, by precision, or no drawn image (``images``); the exception in one line.
    """

    target: str
    skill: str
    question: str
    answer: str
    images: tuple[str, ...]
    replies: dict[str, str]
    failed: dict[str, str] = field(default_factory=dict)


KnownFailureState = Literal["as expected", "stale", "not run", "does not apply", "unmatched", "expired"]


@dataclass(frozen=True)
class Verdict:
    """One process's verdict on its session.

    Attributes:
        name: What is judged, ``leak``.
        state: As in the summary of the suite.
        text: What was found; the first line says it all.
        process: The backend's process or the xdist worker; empty where there is only one process.
    """

    name: str
    state: Literal["kept", "BROKEN", "not judged"]
    text: str
    process: str = ""

    def __str__(self) -> str:
        return f"{self.process}: {self.text}" if self.process else self.text


@dataclass(frozen=True)
class LeasedGpu:
    """The GPU that a process had to itself.

    Attributes:
        gpu: Name and UUID.
        name: Of the model of card.
        index: As the driver counts.
        waited: Seconds until the lease was had.
        busy: Who held memory of it when it was leased; empty where nobody did.
    """

    gpu: str
    name: str
    index: int
    waited: float
    busy: str


@dataclass(frozen=True)
class Subject:
    """What the tests of one target were run on; ``None`` where no test asked for it, or nothing is known.

    Attributes:
        target: As findings name it.
        device: ``cpu`` or ``cuda``.
        backend: How the model was loaded.
        model: ``embedded``, the folder's name, a hub id's last part or a released configuration.
        digest: Of the files of an embedded model or of a folder.
        revision: Commit of a hub id.
        family: Of the loaded model.
        adapter: Digest of the saved adapter's files; ``None`` for a fresh one.
        quantization: ``type``, ``double`` and ``compute_dtype``.
        lora: The fields of ``peft.LoraConfig`` that change results.
        processor: Digest of the image processor's settings, the chat template and what the tokenizer makes of a text.
        samples: ``count`` and ``digest``, of questions, answers and pixels.
        torch: ``cpu_capability`` (the instruction set that torch chose), ``threads``, and the version of ``cuda``.
    """

    target: str
    device: str
    backend: str
    model: str | None = None
    digest: str | None = None
    revision: str | None = None
    family: str | None = None
    adapter: str | None = None
    quantization: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    processor: str | None = None
    samples: dict[str, Any] | None = None
    torch: dict[str, Any] | None = None

    def with_facts(self, facts: dict[str, Any]) -> Subject:
        """The same with more known; what is ``None`` is not."""
        return replace(self, **{name: value for name, value in facts.items() if value is not None})


@dataclass(frozen=True)
class ProcessResults:
    """What one process found out about its session, beyond its tests.

    Attributes:
        session: Peak VRAM of the whole session.
        phases: Peak VRAM of each phase that was measured inside it, in order.
        lease: Its GPU; ``None`` for a process that leased none.
        verdicts: On its session.
        limits: What became of limits on the session's VRAM.
        process: The backend's process or the xdist worker; empty for the one that was started.
        subjects: What the tests of each target were run on; none where no record is written.
        known: Known failures by the reason that is expected, and what collection made of each.
        probes: What the model saw and said; none where no report is asked for.
    """

    session: Usage
    phases: tuple[Usage, ...] = ()
    lease: LeasedGpu | None = None
    verdicts: tuple[Verdict, ...] = ()
    limits: tuple[LimitOutcome, ...] = ()
    process: str = ""
    subjects: tuple[Subject, ...] = ()
    known: tuple[tuple[str, KnownFailureState], ...] = ()
    probes: tuple[SeenProbe, ...] = ()

    def started_by(self, process: str) -> ProcessResults:
        """The same, as seen by the one that started ``process``, in which or below which it was found."""
        name = " ".join(filter(None, (process, self.process)))
        return replace(self, process=name, verdicts=tuple(replace(v, process=name) for v in self.verdicts))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as JSON and execnet take it."""
        names = ("phases", "verdicts", "limits", "subjects", "probes")
        parts = {name: [asdict(one) for one in getattr(self, name)] for name in names}
        lease = None if self.lease is None else asdict(self.lease)
        known = [list(pair) for pair in self.known]
        return {"session": asdict(self.session), **parts, "lease": lease, "process": self.process, "known": known}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ProcessResults:
        """Inverse of :meth:`as_dict`."""
        return cls(
            Usage(**data["session"]),
            tuple(Usage(**one) for one in data["phases"]),
            None if data["lease"] is None else LeasedGpu(**data["lease"]),
            tuple(Verdict(**one) for one in data["verdicts"]),
            tuple(LimitOutcome(**one) for one in data["limits"]),
            data["process"],
            tuple(Subject(**one) for one in data["subjects"]),
            tuple((expected, state) for expected, state in data["known"]),
            tuple(SeenProbe(**{**one, "images": tuple(one["images"])}) for one in data["probes"]),
        )
