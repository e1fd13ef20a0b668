"""What is broken before anything is recorded: the library, the processor, the published checkpoint.

The reference is recorded with the same defect, so that no comparison with it can tell; only what a verified
installation made of the same inputs can.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from pytest_qvl.faults.catalogue import fault, find
from pytest_qvl.faults.common_mode import in_full_precision, reference_under
from pytest_qvl.faults.definitions.configuration import sections_changed
from pytest_qvl.faults.definitions.disk import loaded_from_changed, rolled_head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pytest_qvl.checks import Reference
    from pytest_qvl.faults.case import Case

    Damage = Callable[[Case], AbstractContextManager[None]]

_FIRST = "is the first that differs"


class _RecordedLater:
    """A reference that is recorded when a check first reads it: recording takes seconds, and few checks do."""

    def __init__(self, record: Callable[[], Reference]) -> None:
        self._record = record

    @cached_property
    def _recorded(self) -> Reference:
        return self._record()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorded, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance() asks
        return type(self._recorded)


@contextmanager
def _everywhere(case: Case, damage: Damage) -> Iterator[None]:
    """Damage the case, and record its reference from a full-precision model with the same damage."""
    full = in_full_precision(case)
    processor = vars(case.processor.image_processor).copy()

    def record() -> Reference:
        shared = vars(case.processor.image_processor) != processor
        # One processor serves both, and is damaged already.
        return reference_under(nullcontext() if shared else damage(full), full)

    case.reference = cast("Reference", _RecordedLater(record))
    with damage(case):
        yield


def _known(case: Case, name: str) -> Iterator[None]:
    """A fault of the catalogue, in the reference as well."""
    with _everywhere(case, find(name).damage):
        yield


@fault(
    "library-without-windows",
    "The library never applies attention windows in the tower, and the reference was recorded so.",
    target="model",
    check="golden_record",
    expected_words=("the output of model.visual is not", f"model.visual.blocks.0 {_FIRST}"),
    requires=("golden record", "window attention"),
)
def _windows(case: Case) -> Iterator[None]:
    yield from _known(case, "windows-never-applied")


@fault(
    "library-without-vision-rotary",
    "The library does not rotate the tower's queries and keys, and the reference was recorded so.",
    target="model",
    check="golden_record",
    expected_words=("the output of model.visual is not", f"model.visual.blocks.0 {_FIRST}"),
    source="huggingface/transformers#35749",
    requires=("golden record",),
)
def _vision_rotary(case: Case) -> Iterator[None]:
    yield from _known(case, "vision-positions-lost")


@fault(
    "library-reverses-mrope-sections",
    "The library reads M-RoPE's sections in the reverse order, and the reference was recorded so.",
    target="model",
    check="golden_record",
    expected_words=(f"model.language_model.layers.0 {_FIRST}",),
    requires=("golden record", "axes in runs"),
)
def _sections(case: Case) -> Iterator[None]:
    with _everywhere(case, lambda each: sections_changed(each, lambda section: list(section)[::-1])):
        yield


@fault(
    "library-with-another-rotary-base",
    "The library's rotary base is 1,000 times too large, and the reference was recorded so.",
    target="model",
    check="golden_record",
    expected_words=(f"model.language_model.layers.{{attending}} {_FIRST}",),
    requires=("golden record",),
)
def _base(case: Case) -> Iterator[None]:
    yield from _known(case, "rotary-base-wrong")


@fault(
    "library-normalises-with-half",
    "The library's processor takes mean and deviation 0.5, and the reference was recorded so.",
    target="processor",
    check="golden_record",
    expected_words=("makes other pixel_values than verified releases", "values kept of "),
    requires=("golden record", "CLIP's normalisation"),
)
def _half(case: Case) -> Iterator[None]:
    yield from _known(case, "processor-mean-half")


@fault(
    "library-reads-bgr",
    "The library's processor exchanges red and blue, and the reference was recorded so.",
    target="processor",
    check="golden_record",
    expected_words=("makes other pixel_values than verified releases", "values kept of "),
    requires=("golden record",),
)
def _bgr(case: Case) -> Iterator[None]:
    yield from _known(case, "processor-reads-bgr")


@fault(
    "library-empties-the-second-frame",
    "The library's processor does not repeat a still image, and the reference was recorded so.",
    target="processor",
    check="golden_record",
    expected_words=("makes other pixel_values than verified releases", "values kept of "),
    requires=("golden record",),
)
def _frame(case: Case) -> Iterator[None]:
    yield from _known(case, "second-frame-zero")


@fault(
    "published-with-a-random-vision-block",
    "The checkpoint that everything is loaded from has one vision block as it was initialised.",
    target="load",
    check="golden_record",
    expected_words=("the output of model.visual is not", f"model.visual.blocks.2 {_FIRST}"),
    requires=("golden record", "checkpoint file"),
)
def _random_block(case: Case) -> Iterator[None]:
    yield from _known(case, "checkpoint-with-a-random-vision-block")


@fault(
    "published-with-rolled-head-rows",
    "The checkpoint that everything is loaded from has the rows of its head moved by one.",
    target="load",
    check="golden_record",
    expected_words=("the output of lm_head is not", f"lm_head {_FIRST}"),
    requires=("golden record", "checkpoint file", "untied head"),
)
def _rolled(case: Case) -> Iterator[None]:
    with _everywhere(case, lambda each: loaded_from_changed(each, rolled_head)):
        yield
