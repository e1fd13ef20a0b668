"""Verdicts of one run: collect them, stop or warn, in all processes at once, and write the record."""

from __future__ import annotations

import math
import random
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge, CheckFailed, InputError, printable
from pytest_qvl.training.findings import Finding, GuardError, GuardWarning
from pytest_qvl.training.ranks import many_processes, of_all_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.training.findings import Weight
    from pytest_qvl.training.record import Record
    from pytest_qvl.training.settings import OnFinding


class Verdicts:
    """Runs judgements, and says what came of them.

    Args:
        record: Takes everything.
        on_finding: ``"stop"`` or ``"warn"``.
        args: ``transformers.TrainingArguments``: this process's number, and the device of its collectives.
    """

    def __init__(self, record: Record, on_finding: OnFinding, args: Any) -> None:
        self.record, self._on_finding = record, on_finding
        self._device, self.rank = args.device, int(args.process_index)
        self._pending: list[Finding] = []
        self._written = -math.inf
        self._told: set[tuple[str, str]] = set()

    def judge(
        self, judgement: Callable[[], Evidence], *, check: str, step: int, moment: str, weight: Weight = "stop"
    ) -> bool:
        """Make one judgement; what it finds waits for :meth:`settle`.

        The generators of random numbers are put back as they were. An exception that is no verdict is the guard's own
        and does not end a training: it is warned of, and counts as not judged.

        Args:
            judgement: Returns evidence, or raises a verdict.
            check: Its name where it cannot give one itself.
            step: Optimizer steps that are complete.
            moment: Where in the run this is, in words.
            weight: Whether a finding may stop.

        Returns:
            Whether the check held, or could not be judged.
        """
        try:
            with generators_restored():
                self.record.keep(judgement(), step)
        except CheckFailed as error:
            self._pending.append(Finding(_as_of_a_guard(error.evidence), step, moment, self.rank, weight))
            if many_processes():
                self._say(self._pending[-1])  # the forward may end this process before the others are told
            return False
        except (CannotJudge, InputError) as error:
            self.record.skip(check, printable(str(error)).partition("\n")[0])
        except Exception as error:
            self._own(check, error)
        return True

    def attempt(self, work: Callable[[], None], *, check: str) -> None:
        """Do what a judgement needs; an exception is the guard's own and does not end a training."""
        try:
            work()
        except Exception as error:
            self._own(check, error)

    def _own(self, check: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {printable(str(error)).partition(chr(10))[0]}"
        if self.record.skip(check, reason):
            warnings.warn(f"the guard could not judge {check}: {reason}", GuardWarning, stacklevel=2)

    @property
    def found(self) -> bool:
        """Whether findings of this process wait."""
        return bool(self._pending)

    def settle(self, step: int, *, together: bool = True) -> None:
        """Stop or warn for what was found, and write the record if anything was.

        Args:
            step: Optimizer steps that are complete.
            together: Whether every process is here at the same moment; otherwise, with several processes, what was
                found waits until they are.

        Raises:
            GuardError: Something that stops, in any process.
        """
        if many_processes() and not together:
            return
        findings = of_all_processes(self._pending, self._device)
        self._pending = []
        if not findings:
            return
        self.record.add(findings)
        grave = [finding for finding in findings if finding.weight == "stop" and self._on_finding == "stop"]
        if grave:
            self.record.state = "stopped"
        self.write(step)
        if grave:
            raise GuardError(grave, "" if self.record.path is None else str(self.record.path))
        for finding in findings:
            self._say(finding)

    def write(self, step: int, *, at_most_every: float = 0.0) -> None:
        """Write the record, from one process, if it has been at least so many seconds since the last time."""
        now = time.monotonic()
        if self.rank or now - self._written < at_most_every:
            return
        self._written = now
        reason = self.record.write(step)
        if reason and self.record.skip("record", reason):
            warnings.warn(f"the guard's record: {reason}", GuardWarning, stacklevel=2)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the time of a block as the guard's own."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.record.seconds += time.perf_counter() - started

    def _say(self, finding: Finding) -> None:
        if finding.kind not in self._told:
            self._told.add(finding.kind)
            warnings.warn(str(finding), GuardWarning, stacklevel=2)


def _as_of_a_guard(evidence: Evidence) -> Evidence:
    """Evidence that says how a guard is told what tests are told by a fixture."""
    said = {
        "qvl_adapter_policy": "that adapts or trains other parts on purpose, declare it as "
        'Guard(policy="language, vision") or Guard(policy="language, merger:full")',
        "qvl_quantized_layers": "with other layers in 4 bits on purpose, declare them as "
        'Guard(quantized_layers="language, in_proj_a:16bit")',
    }
    notes = [
        f"{name} is of tests; of a training {how}"
        for name, how in said.items()
        if any(name in problem for problem in evidence.problems)
    ]
    return replace(evidence, notes=(*evidence.notes, *notes))


@contextmanager
def generators_restored() -> Iterator[None]:
    """Put the generators of random numbers back after a block: Python's, NumPy's and torch's, on its device too."""
    import torch

    numpy: Any = sys.modules.get("numpy")
    ours = random.getstate(), None if numpy is None else numpy.random.get_state()
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = (torch.cuda.current_device(),) if initialized else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(ours[0])
            if numpy is not None:
                numpy.random.set_state(ours[1])
