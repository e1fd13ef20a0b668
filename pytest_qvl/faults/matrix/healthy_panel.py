"""Healthy variations under every instruction set that the CPU offers: whatever is no fault is called one nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Lock, Timer
from typing import IO, TYPE_CHECKING, Any

from pytest_qvl.evidence import printable
from pytest_qvl.faults.matrix.freshness import definitions_digest
from pytest_qvl.faults.matrix.healthy import DEFAULT
from pytest_qvl.faults.matrix.healthy_child import SEPARATOR, Judged
from pytest_qvl.faults.matrix.healthy_plan import Schedule, offered_only, spread
from pytest_qvl.faults.matrix.healthy_record import Outcome
from pytest_qvl.faults.matrix.isa_used import Used
from pytest_qvl.faults.matrix.journal import JsonLines, versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pytest_qvl.faults.matrix.isa import Cpu, Setting

PROGRESS = 20
GRACE = 30.0  # seconds after the deadline until processes are ended that still judge a variation


class ChildEnded(RuntimeError):
    """A process ended without an answer; the message says how."""


def run(
    count: int,
    settings: Sequence[Setting],
    cpu: Cpu,
    jobs: int,
    *,
    partial: Path | None = None,
    minutes: float | None = None,
    model: str = DEFAULT,
) -> list[Outcome]:
    """Spread `count` healthy variations over the settings that the CPU offers, each in processes of its own.

    What a setting gets does not depend on the CPU, so that a run may go on with another one; variations left of
    settings that this one does not offer are shared out among those it does.

    Args:
        count: How many variations in all.
        settings: Where to run them.
        cpu: What this CPU offers.
        jobs: Threads of all processes together.
        partial: Where results are kept as they come; what is there already is not done again.
        minutes: Begin no variation after so many; what is not judged half a minute later is left for the next call.
        model: The trained model that they are of, as for ``--qvl-model``.

    Raises:
        ValueError: `partial` holds the results of another run.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    outcomes = {str(setting): Outcome(setting, setting.lacks(cpu)) for setting in settings}
    journal = JsonLines(
        partial,
        {"healthy": count, "model": model, "settings": list(outcomes), "definitions": definitions_digest(model)},
    )
    for kept in journal.kept:
        outcomes[kept["setting"]].missing = ()  # the CPU that judged it offers the setting
        _add(outcomes[kept["setting"]], kept)
    done = {kept["number"] for kept in journal.kept}
    left = {s: [n for n in numbers if n not in done] for s, numbers in spread(count, settings, model).items()}
    schedule = Schedule(offered_only(left, cpu), jobs, deadline, model)
    panel = _Panel(outcomes, list(settings), journal, cpu, count=count, model=model)
    with panel.ended_after(deadline), ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(panel.work, schedule) for _ in range(jobs)]:
            future.result()
    return list(outcomes.values())


class _Panel:
    """Runs variations from several threads, each with a child process at a time; holds what the threads share."""

    def __init__(
        self,
        outcomes: dict[str, Outcome],
        settings: list[Setting],
        journal: JsonLines,
        cpu: Cpu,
        *,
        count: int,
        model: str,
    ) -> None:
        self._outcomes, self._settings, self._journal = outcomes, settings, journal
        self._cpu, self._count, self._model, self._lock = cpu.model, count, model, Lock()
        self._children: set[Child] = set()
        self._time_is_up = False

    @contextmanager
    def ended_after(self, deadline: float | None) -> Iterator[None]:
        """End processes that are still at work some time after the deadline."""
        if deadline is None:
            yield
            return
        timer = Timer(deadline + GRACE - time.monotonic(), self._end_all)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_all(self) -> None:
        with self._lock:
            self._time_is_up = True
            for child in self._children:
                child.kill()

    def work(self, schedule: Schedule) -> None:
        while (setting := schedule.begin()) is not None:
            outcome, broken = self._outcomes[str(setting)], True
            try:
                self._ask(outcome, schedule)
                broken = False
            except ChildEnded as reason:
                if not self._time_is_up:
                    outcome.broken.append(str(reason))
                    _say(f"BROKEN {reason}")
            finally:
                schedule.end(setting, broken=broken)

    def _ask(self, outcome: Outcome, schedule: Schedule) -> None:
        setting = outcome.setting
        # The probes' seed: one for all variations of a setting, whose references one process then shares.
        with Child(setting, seed=self._settings.index(setting), model=self._model) as child, self._noted(child):
            child.greet()
            if reason := child.used.contradicts(setting):
                raise ChildEnded(f"{setting}: {reason}")
            while (number := schedule.number(setting)) is not None:
                self._keep(outcome, child.judge(number), child.used)

    @contextmanager
    def _noted(self, child: Child) -> Iterator[None]:
        with self._lock:
            self._children.add(child)
            if self._time_is_up:
                child.kill()
        try:
            yield
        finally:
            with self._lock:
                self._children.discard(child)

    def _keep(self, outcome: Outcome, judged: Judged, used: Used) -> None:
        ran = {"cpu": self._cpu, "versions": versions(), "used": vars(used)}
        line = {"setting": str(outcome.setting), **ran, **vars(judged)}
        with self._lock:
            self._journal.write(line)
            _add(outcome, line)
            for alarm in judged.alarms:
                _say(f"FALSE ALARM under {outcome.setting}: {alarm}")
            done = sum(len(one.numbers) for one in self._outcomes.values())
            if done % PROGRESS == 0:
                _say(f"{done} of {self._count} healthy variations")


def _add(outcome: Outcome, line: dict[str, Any]) -> None:
    names = Judged.__dataclass_fields__
    outcome.add(Judged(**{name: line[name] for name in names}), Used(**line["used"]), line["cpu"], line.get("versions"))


class Child:
    """One process that judges variations under a setting.

    Args:
        setting: Its instruction set and threads.
        seed: Of the probes.
        model: That the variations are of.

    Attributes:
        used: What it computes with, once it was greeted.
    """

    used: Used

    def __init__(self, setting: Setting, *, seed: int, model: str = DEFAULT) -> None:
        self._setting = setting
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest_qvl.faults.matrix.healthy_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | setting.environment,
            text=True,
        )
        self._send(json.dumps({"threads": setting.threads, "seed": seed, "model": model}))

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def greet(self) -> None:
        """Wait until the process has started and has said which instruction set it computes with.

        Raises:
            ChildEnded: It could not start.
        """
        self.used = Used(**self._answer())

    def kill(self) -> None:
        """End the process at once, without waiting for its answer."""
        self._process.kill()

    def judge(self, number: int) -> Judged:
        """Run the checks of one variation in the process.

        Raises:
            ChildEnded: It died over it.
        """
        self._send(str(number))
        try:
            return Judged(**self._answer())
        except ChildEnded as reason:
            raise ChildEnded(f"{reason} (variation #{number})") from None

    def _send(self, line: str) -> None:
        with suppress(BrokenPipeError):  # one that has ended: the answer that does not come says so
            self._stdin.write(line + "\n")
            self._stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(SEPARATOR):
                found: dict[str, Any] = json.loads(line.removeprefix(SEPARATOR))
                return found
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
        raise ChildEnded(f"{self._setting}: the process ended with {code}: {printable(last[0])}")

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _stop(self) -> None:
        self.kill()  # it would end with its stdin, but not if it hangs
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


def _say(line: str) -> None:
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()
