"""What the page of a run shows, from its record: plain typed values, so that the template only lays them out."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import show
from pytest_qvl.preflight.findings import counted
from pytest_qvl.promises import PROMISES, promise_number
from pytest_qvl.records.explain import faults_of, links
from pytest_qvl.records.remedies import REMEDIES
from pytest_qvl.records.stored import subject, targets, told, verdicts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qvl.evidence import Figure
    from pytest_qvl.records.stored import Verdict

GIB = 2**30
# Worst first: what a promise is, given the states of its checks in a record that does not say it itself.
ORDER = ("BROKEN", "error", "not judged", "partly judged", "kept", "skipped", "not run")
_SYMBOLS = {"kept": "✓", "BROKEN": "✗", "error": "✗", "partly judged": "◐"}
_TONES = {"kept": "good", "BROKEN": "bad", "error": "bad"}
THREADS_SHOWN = 3
# Options of the run, each with a value, that the command for one test does without.
LEFT_OUT = ("-k", "--qvl-record", "--qvl-html", "--qvl-compare", "--junitxml", "--junit-xml")


def symbol(state: str) -> str:
    """What stands before a state, so that no colour alone says it."""
    return _SYMBOLS.get(state, "–")


def tone(state: str) -> str:
    """Class of a state's colour."""
    return _TONES.get(state, "muted")


@dataclass(frozen=True)
class Weakest:
    """The figure nearest to its limit.

    Attributes:
        name: What was measured.
        value: As text, with its unit.
        limit: As text, with the relation; empty for none.
        share: How much of the limit is used, in percent, 100 at most; ``None`` for an exact figure.
    """

    name: str
    value: str
    limit: str
    share: int | None


@dataclass(frozen=True)
class Row:
    """One promise of one target.

    Attributes:
        number: From 1.
        title: What is promised.
        state: One of :data:`ORDER`.
        why: Reasons, where it is not kept.
        weakest: ``None`` where nothing was measured.
    """

    number: int
    title: str
    state: str
    why: tuple[str, ...]
    weakest: Weakest | None


@dataclass(frozen=True)
class Failure:
    """One broken verdict or error.

    Attributes:
        check: Name of the check; empty for a test of the user's own.
        test: The test.
        target: Model, device and backend.
        state: ``BROKEN`` or ``error``.
        says: What was found.
        cause: What usually causes it; empty for an unknown check.
        fix: What to do first.
        command: How to see it again.
        threads: Title and address of public threads.
    """

    check: str
    test: str
    target: str
    state: str
    says: str
    cause: str
    fix: str
    command: str
    threads: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Phase:
    """Memory of one phase.

    Attributes:
        name: The phase.
        numbers: Name, GiB and share of the scale in percent, for tensors, allocator and card.
        seconds: How long it took.
    """

    name: str
    numbers: tuple[tuple[str, float, float], ...]
    seconds: float


@dataclass(frozen=True)
class Target:
    """One model on one device.

    Attributes:
        name: As reports call it.
        rows: Its promises.
        facts: What it ran on: name and value.
    """

    name: str
    rows: tuple[Row, ...]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Page:
    """Everything that the page shows.

    Attributes:
        tone: Class of the verdict's colour.
        verdict: In two or three words.
        sentence: What it is made of.
        targets: With their promises.
        failures: Broken verdicts and errors.
        problems: What went wrong outside any test.
        phases: VRAM by phase.
        card: Name and GiB of the card that it is held against; ``None`` for none.
        card_share: Where the card's line is on the scale, in percent.
        checks: Every verdict with its figures.
        known: Known failures and their states.
        facts: Sections of names and values about the run.
    """

    tone: str
    verdict: str
    sentence: str
    targets: tuple[Target, ...]
    failures: tuple[Failure, ...]
    problems: tuple[str, ...]
    phases: tuple[Phase, ...]
    card: tuple[str, float] | None
    card_share: float
    checks: tuple[Verdict, ...]
    known: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def page_data(record: dict[str, Any]) -> Page:
    """What the page of a record shows, of one as :func:`pytest_qvl.records.stored.as_newest` makes it."""
    found = tuple(verdicts(record).values())
    shown = tuple(
        Target(name, tuple(_rows(record, name, found)), tuple(_subject_facts(record, name))) for name in targets(record)
    )
    failures = tuple(_failure(record, one) for one in found if one.state in ("BROKEN", "error"))
    tone, verdict = _verdict(record, shown, failures)
    phases, card, share = _memory(record)
    known = tuple((one["reason"], one["state"]) for one in record["known_failures"])
    sentence, facts = _sentence(record, shown, failures), tuple(_facts(record))
    problems = tuple(record["problems"])
    return Page(tone, verdict, sentence, shown, failures, problems, phases, card, share, found, known, facts)


def _verdict(record: dict[str, Any], shown: Sequence[Target], failures: Sequence[Failure]) -> tuple[str, str]:
    states = {row.state for target in shown for row in target.rows}
    if any(failure.state == "BROKEN" for failure in failures):
        return "bad", "Broken"
    if record["exit_status"] == 2:
        return "bad", "Stopped early"
    if failures or record["problems"] or record["exit_status"] not in (0, 5):
        return "bad", "Red" if "kept" in states else "Could not be judged"
    if "kept" in states:
        return "good", "Kept" if states == {"kept"} else "Kept, as far as judged"
    return "muted", "Not judged"


def _sentence(record: dict[str, Any], shown: Sequence[Target], failures: Sequence[Failure]) -> str:
    states = Counter(row.state for target in shown for row in target.rows)
    parts = [f"{states['kept']} of {states.total()} promises kept"] if states else []
    parts += [f"{states[state]} {state}" for state in ORDER if states[state] and state != "kept"]
    outside = sum(not failure.check for failure in failures)
    parts += [counted(outside, "other failure")] if outside else []
    tests = ", ".join(f"{count} {outcome}" for outcome, count in record["tests"].items()) or "no test ran"
    return f"{', '.join(parts) or 'no promise was looked at'}. Tests: {tests}, in {record['seconds']:.0f} s."


def _rows(record: dict[str, Any], target: str, found: Sequence[Verdict]) -> Iterator[Row]:
    stated = {one["number"]: one["state"] for one in record["promises"] if one["target"] == target}
    for promise in PROMISES:
        own = [one for one in found if one.target == target and promise_number(one.check) == promise.number]
        states = [one.state for one in own]
        state = stated.get(promise.number) or next((state for state in ORDER if state in states), "not run")
        why = dict.fromkeys(f"{one.check}: {one.says}" for one in own if one.state != "kept")
        yield Row(promise.number, promise.title, state, tuple(why), _weakest(own))


def _weakest(found: Sequence[Verdict]) -> Weakest | None:
    figures = [figure for one in found for figure in one.figures if figure.relation]
    if not figures:
        return None
    worst = max(figures, key=lambda figure: figure.utilisation)
    exact = worst.relation == "==" or isinstance(worst.value, str | bool)
    share = None if exact else min(100, round(100 * worst.utilisation)) if worst.holds else 100
    return Weakest(
        worst.name, _with_unit(worst.value, worst), f"{worst.relation} {_with_unit(worst.limit, worst)}", share
    )


def _with_unit(value: Any, figure: Figure) -> str:
    return f"{show(value)} {figure.unit}".rstrip()


def _failure(record: dict[str, Any], one: Verdict) -> Failure:
    cause, fix = REMEDIES.get(one.check, ("", ""))
    faults = [fault for fault in faults_of(one.check) if fault.source] if cause else []
    threads = dict.fromkeys((fault.summary, links(fault.source)[0]) for fault in faults)
    linked = tuple(pair for pair in threads if pair[1].startswith("https://"))[:THREADS_SHOWN]
    return Failure(one.check, one.test, one.target, one.state, one.says, cause, fix, _again(record, one), linked)


def _again(record: dict[str, Any], one: Verdict) -> str:
    """The run's own command with one test chosen, and without what it writes."""
    words = iter(record["command"])
    command = []
    for word in words:
        flag, joined, _ = word.partition("=")
        if flag in LEFT_OUT:
            if not joined:
                next(words, None)
        else:
            command.append(word)
    return shlex.join([*command, "-k", one.test.partition("[")[0]]) if one.test else shlex.join(command)


def _memory(record: dict[str, Any]) -> tuple[tuple[Phase, ...], tuple[str, float] | None, float]:
    vram = record["vram"]
    processes = vram.get("processes", [vram] if vram else [])
    usages = [(one.get("process", ""), usage) for one in processes for usage in (*one["phases"], one["session"])]
    measured = [(process, usage) for process, usage in usages if not usage["reason"]]
    if not measured:
        return (), None, 0.0
    card = _card(record)
    most = max(_bytes(usage)["card"] for _, usage in measured) / GIB
    scale = max(most, card[1] if card else 0.0) or 1.0
    phases = []
    for process, usage in measured:
        numbers = tuple((name, n / GIB, round(100 * n / GIB / scale, 2)) for name, n in _bytes(usage).items())
        phases.append(Phase(f"{usage['name']} {process}".rstrip(), numbers, usage["seconds"]))
    return tuple(phases), card, round(100 * card[1] / scale, 2) if card else 0.0


def _bytes(usage: dict[str, Any]) -> dict[str, int]:
    reserved = usage["reserved"]
    return {"tensors": usage["allocated"], "allocator": reserved, "card": reserved + (usage["context"] or 0)}


def _card(record: dict[str, Any]) -> tuple[str, float] | None:
    """The card that --qvl-card named, or the GPU."""
    from pytest_qvl.vram.cards import card

    named = next((one["value"] for one in record["configuration"] if one["name"] == "qvl_card"), None)
    if named:
        try:
            found = card(named)
        except ValueError:  # of a later release
            return None
        return found.title, found.usable_bytes / GIB
    gpus = record["environment"]["gpus"]
    return (gpus[0]["name"], gpus[0]["total"] / GIB) if gpus else None


def _subject_facts(record: dict[str, Any], target: str) -> Iterator[tuple[str, str]]:
    for name, value in subject(record, target).items():
        if name != "target" and value is not None:
            yield name, told(value)


def _facts(record: dict[str, Any]) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    environment, machine = record["environment"], record["machine"] or {}
    yield "Versions", (("Python", environment["python"]), *environment["packages"].items())
    hardware = [("system", environment["system"])]
    hardware += [(name, str(machine[name])) for name in ("os", "cpu", "cores") if machine.get(name)]
    hardware += [("features", ", ".join(machine["features"]))] if machine.get("features") else []
    for gpu in environment["gpus"]:
        capability = ".".join(map(str, gpu["compute_capability"]))
        hardware.append(("GPU", f"{gpu['name']}, {gpu['total'] / GIB:.1f} GiB, compute capability {capability}"))
    hardware += [("driver", environment["driver"])] if environment["driver"] else []
    yield "Machine", tuple(hardware)
    settings = [(one["name"], f"{_listed(one['value'])} ({one['source']})") for one in record["configuration"]]
    yield "Settings", tuple(settings) or tuple(("", line) for line in record["settings"])
    if environment.get("variables"):
        yield "Environment variables", tuple(environment["variables"].items())
    run = [("command", shlex.join(record["command"])), ("started", record["started"])]
    run += [("exit status", str(record["exit_status"])), ("commit", environment["commit"] or "none")]
    run += [("suite", str(record["suite"]))] if record["suite"] else []
    run += [
        (f"session: {one['name']}", f"{one['state']}: {one['text'].partition(chr(10))[0]}") for one in record["session"]
    ]
    yield "Run", tuple(run)


def _listed(value: Any) -> str:
    return "not set" if value is None else ", ".join(value) if isinstance(value, list) else str(value)
