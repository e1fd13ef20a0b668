"""One mutation, judged: caught by which check, equivalent, or missed."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.common_mode import reads_reference
from pytest_qvl.faults.mutation.probes import Healthy, Probed, probed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.mutation.drawn import Mutation

CAUGHT, RAISES, EQUIVALENT, UNRESOLVED, MISSED = "caught", "raises", "equivalent", "below resolution", "missed"
# They take up to a quarter of a second and go before the probes; those after them begin with the ones that see most.
FIRST = (
    *("checkpoint_complete", "label_mask", "placeholder_counts", "quantization_census", "adapter_census"),
    *("image_preprocessing", "picture_pairing", "training_collation", "malformed_inputs", "loss_arithmetic"),
    "weights_as_stored",
)
THEN = (
    *("layer_arithmetic", "feature_scatter", "visual_token_order", "mrope_positions", "greedy_is_argmax"),
    *("adapter_roundtrip", "vision_not_backpropagated", "causality", "image_isolation", "generation_repeatable"),
    *("generation_as_found", "adapter_neutrality", "decode_positions", "frozen_vision", "position_state"),
    *("training_step", "gradient_arithmetic"),
)
# The embedded model's alone: what only it catches, nothing catches on a user's model.
LAST = ("golden_record",)
# Seconds of CPU for one check or the probes, of which none takes three: who waits longer notices, as with an exception.
LIMIT = 10
SAID = 300


@dataclass(frozen=True)
class Judged:
    """What became of one mutation.

    Attributes:
        number: Its number.
        kind: Its kind.
        what: What is changed, in words.
        outcome: :data:`CAUGHT`; :data:`RAISES` (an exception that everybody meets); :data:`EQUIVALENT` (logits, loss,
            gradients and replies of all probes are bitwise the same); :data:`UNRESOLVED` (they differ by no more than
            rounding explains); or :data:`MISSED`.
        by: The check that catches it, the first in order.
        said: What the check or the exception says, its beginning.
        seconds: CPU time.
    """

    number: int
    kind: str
    what: str
    outcome: str
    by: str = ""
    said: str = ""
    seconds: float = 0.0


def in_order(checks: Sequence[str]) -> tuple[list[str], list[str]]:
    """The checks that go before the probes, and those after them: the ones that read a reference last.

    A user's reference is recorded with the same library, configuration and checkpoint; it sees less than the healthy
    one here, so that whatever needs none is asked before.
    """
    later = [check for check in checks if check not in FIRST]
    place = {check: number for number, check in enumerate(THEN)}
    later.sort(key=lambda check: (reads_reference(check), check in LAST, place.get(check, len(THEN))))
    return [check for check in FIRST if check in checks], later


def judge_mutation(mutation: Mutation, number: int, case: Case, healthy: Healthy, checks: Sequence[str]) -> Judged:
    """Make a mutation and ask the checks, the cheap ones first, up to the first that catches it."""
    from pytest_qvl.faults.tools import attributes_restored
    from pytest_qvl.models.state import preserved

    began = time.process_time()
    with preserved(case.model), attributes_restored(case.model), mutation.made():
        outcome, by, said = _outcome(case, healthy, checks)
    seconds = round(time.process_time() - began, 2)
    return Judged(number, mutation.kind, mutation.what, outcome, by, " ".join(said.split())[:SAID], seconds)


def _outcome(case: Case, healthy: Healthy, checks: Sequence[str]) -> tuple[str, str, str]:
    from pytest_qvl.faults.matrix.panel import attempt

    first, later = in_order(checks)
    if found := _first_caught(case, first):
        return found
    made: list[Probed] = []
    with _at_most(LIMIT):
        verdict = attempt(lambda: made.append(probed(case)), case.subject)
    if not made:
        return RAISES, "", verdict.message
    if made[0].equals(healthy.probed):
        return EQUIVALENT, "", ""
    if found := _first_caught(case, later):
        return found
    return MISSED if healthy.resolves(made[0]) else UNRESOLVED, "", ""


def _first_caught(case: Case, checks: Sequence[str]) -> tuple[str, str, str] | None:
    from pytest_qvl.faults.matrix.panel import CRASHED, judge

    for check in checks:
        with _at_most(LIMIT):
            verdict = judge(case, check)
        if verdict.noticed:
            return CAUGHT, check, verdict.message
        if verdict.outcome == CRASHED:
            return RAISES, check, verdict.message
    return None


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` after so much CPU time, and again; not on a system without such a timer."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
