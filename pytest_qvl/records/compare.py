"""What changed between two records: outcomes exactly, figures beyond what rounding, sampling and allocators do.

docs/ci.md says what counts as a change. A figure that is held to its limit is compared by that limit, which bounds what
rounding can do to it, so that another instruction set, card or release is no regression by itself.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from pytest_qvl.checks.visual_alignment import ADAPTER_ON, NET_LOST
from pytest_qvl.evidence import show
from pytest_qvl.promises import promise_number
from pytest_qvl.records.flips import LEVEL, flips, right_answers, sign_test
from pytest_qvl.records.stored import RecordError, subject, targets, told, verdicts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.evidence import Figure
    from pytest_qvl.records.stored import Key, Verdict

Kind = Literal["new failure", "lost", "gone", "worse", "fixed", "judged", "better", "new", "changed"]
KINDS: dict[Kind, str] = {
    "new failure": "held before, broken now",
    "lost": "gave a verdict before, an error or none now",
    "gone": "not in the new record",
    "worse": "figures beyond noise, within their limits",
    "fixed": "broken before, holds now",
    "judged": "gave no verdict before, holds now",
    "better": "figures beyond noise",
    "new": "not in the old record",
    "changed": "what was measured is another thing",
}
REGRESSIONS: tuple[Kind, ...] = ("new failure", "lost", "gone", "worse")
# Share of its limit by which a figure has to move: no rounding bound is met by two runs in a row that far apart.
SHARE = 0.25
# Of the headroom above a lower limit that is lost or won.
HEADROOM = 0.5
# Net number of probes that flip where nobody knows which: sign_test(k, 0) is 0.03 for six, 0.06 for five.
FLIPS = 6
# Counts of flips that are compared sample by sample where both records have the answers.
FLIPPED = (NET_LOST, f"{ADAPTER_ON}{NET_LOST}")
# Figures that may be anywhere within their limit by chance: a training stops at the first loss below it, and the limits
# of a derivative and of a logit computed in two ways are multiples of what rounding does to them.
CHANCE = (
    "smallest loss within",
    "derivative of the worst layer",
    "alone against batch",
    "generation with cache against plain forward",
    "generation without cache against plain forward",
)
# What caching allocators round to from one release to the next (2 MiB blocks), and the share that is beyond it.
GIB_APART, GIB_SHARE = 64 / 1024, 0.02
STOPPED = {2: "interrupted", 3: "ended by an internal error", 4: "refused for its command line"}
SELECTING = ("-k", "-m", "--lf", "--last-failed", "--deselect", "--sw", "-x", "--exitfirst", "--maxfail")
LONGEST = 40  # characters of a text that is compared; longer ones are lists of numbers


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        kind: One of :data:`KINDS`.
        target: Model, device and backend, of the new record; empty for the session's own verdicts.
        check: Name of the check; empty for a test of the user's own.
        test: The test with its parameters.
        what: The figure, or nothing where the outcome changed.
        old: How it was, in words.
        new: How it is.
    """

    kind: Kind
    target: str
    check: str
    test: str
    what: str
    old: str
    new: str

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.check, f"({self.test})", f"on {self.target}" if self.target else "")))
        said = f"{self.old} → {self.new}" if self.old and self.new else self.old or self.new
        return f"{where}: {self.what + ': ' if self.what else ''}{said}"


@dataclass(frozen=True)
class Comparison:
    """All that differs between two records.

    Attributes:
        changes: What differs, the worst first.
        versions: What else is different about the two runs: versions, cards, samples.
        compared: Number of verdicts that both have.
        left_out: Targets that only one of them has, and which.
    """

    changes: tuple[Change, ...]
    versions: tuple[str, ...]
    compared: int
    left_out: tuple[str, ...] = ()

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What got worse."""
        return tuple(change for change in self.changes if change.kind in REGRESSIONS)

    @property
    def verdict(self) -> str:
        """One line."""
        left_out = "".join(f"; not compared: {target}" for target in self.left_out)
        return (self._counted() or f"nothing changed: {self.compared} verdicts compared") + left_out

    def _counted(self) -> str:
        counts = Counter(change.kind for change in self.changes)
        plural = {"new failure": "new failures"}
        said = ((counts[kind], plural.get(kind, kind) if counts[kind] > 1 else kind) for kind in KINDS if counts[kind])
        return ", ".join(f"{count} {kind}" for count, kind in said)


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Compare two records, as :func:`pytest_qvl.records.stored.as_newest` makes them.

    Raises:
        RecordError: They cannot be compared; says why.
    """
    for name, record in (("old", old), ("new", new)):
        if (why := STOPPED.get(record["exit_status"])) is not None:
            raise RecordError(f"the {name} record is of a run that was {why}: what it lacks says nothing; run it again")
    if old["suite"] and new["suite"] and old["suite"] != new["suite"]:
        raise RecordError(
            f"the suite judges differently: version {old['suite']} in the old record, {new['suite']} in the new one; "
            "make the old record again with this release"
        )
    renamed = matching_targets(old, new)
    before = {
        (renamed[t], check, _renamed(test, t, renamed[t]), number): verdict
        for (t, check, test, number), verdict in verdicts(old).items()
        if t in renamed
    }
    after = {key: v for key, v in verdicts(new).items() if key[0] in renamed.values()}
    chosen = _selection(new)
    selected = bool(chosen) and chosen != _selection(old)  # so that what the new one lacks is no loss
    unpaired = {other for name, other in renamed.items() if _other_samples(old, new, name, other)}
    changes = [
        change
        for key in dict.fromkeys((*before, *after))
        for change in _changes(key, before.get(key), after.get(key), selected=selected)
        if change.kind != "changed" or key[0] not in unpaired
    ]
    changes += [
        Change("new failure", "", "", "outside any test", "", "", problem)
        for problem in new["problems"]
        if problem not in old["problems"]
    ]
    changes.sort(key=_order)
    both = before.keys() & after.keys()
    # A verdict on the session, which has no target, is no check of a model that both have judged.
    if not both or (len(renamed) > 1 and not any(target for target, *_ in both)):
        raise RecordError("the two records have no check in common: compare runs of the same selection of tests")
    return Comparison(
        tuple(changes), tuple(differences(old, new, renamed)), len(both), tuple(_left_out(old, new, renamed))
    )


def _order(change: Change) -> tuple[int, float]:
    """Worst first; of one kind, first the promise that others build on: where features land before what layers make."""
    return list(KINDS).index(change.kind), promise_number(change.check) or math.inf


def matching_targets(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Targets of the old record and what they are called in the new one.

    Equal names first; what is left is the same subject by another name (a folder of the next training) where device and
    backend have one of them each.

    Raises:
        RecordError: None of them match, or they are of different families.
    """
    olds, news = targets(old), targets(new)
    found = {name: name for name in olds if name in news}
    left_old, left_new = ([name for name in names if name not in found] for names in (olds, news))
    for name in left_old:
        if name.startswith("synthetic:"):  # another of them is another architecture
            continue
        others = [other for other in left_new if _where(other) == _where(name)]
        if len(others) == 1 and [_where(each) for each in left_old].count(_where(name)) == 1:
            found[name] = others[0]
    for name, other in found.items():
        families = subject(old, name).get("family"), subject(new, other).get("family")
        if all(families) and families[0] != families[1]:
            raise RecordError(f"{name} is a {families[0]} in the old record, {other} a {families[1]} in the new one")
    if not found and (olds or news):
        raise RecordError(
            f"no model in common: {', '.join(olds) or 'none'} in the old record, {', '.join(news) or 'none'} in the "
            "new one; compare runs on the same device by the same backend"
        )
    return {"": "", **found}


def _left_out(old: dict[str, Any], new: dict[str, Any], renamed: dict[str, str]) -> Iterator[str]:
    """Targets without a counterpart: a run without its GPU must not look like one on which nothing changed."""
    yield from (f"{name} (not in the new record)" for name in targets(old) if name not in renamed)
    yield from (f"{name} (not in the old record)" for name in targets(new) if name not in renamed.values())


def _where(target: str) -> str:
    """Device and backend: what stands behind the model's name."""
    return target.rpartition(" on ")[2]


def _label(target: str) -> str:
    """What the model is called in ids of tests."""
    return PurePath(target.rpartition(" on ")[0]).name


def _renamed(test: str, old: str, new: str) -> str:
    """A test by the name that it has on the target's new name."""
    return test if old == new else test.replace(f"{_label(old)}-", f"{_label(new)}-")


def _other_samples(old: dict[str, Any], new: dict[str, Any], name: str, other: str) -> bool:
    """Whether a target ran on other samples, so that other counts of them have to be met."""
    before, after = subject(old, name).get("samples"), subject(new, other).get("samples")
    return bool(before and after and before != after)


def _selection(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run's command line says of the tests to leave out: each option with the word behind it."""
    command = record["command"]
    return [
        (word, behind)
        for word, behind in zip_longest(command, command[1:], fillvalue="")
        if "::" in word or word.split("=")[0] in SELECTING or word.startswith("-k")
    ]


def _changes(key: Key, old: Verdict | None, new: Verdict | None, *, selected: bool) -> Iterator[Change]:
    target, check, test, _ = key

    def change(kind: Kind, was: str, now: str, what: str = "") -> Change:
        return Change(kind, target, check, test, what, was, now)

    if new is None:
        if old is not None and old.state in ("kept", "BROKEN") and not selected:
            yield change("gone", _said(old), "no verdict")
    elif old is None:
        yield change("new failure" if new.state in ("BROKEN", "error") else "new", "", _said(new))
    elif old.state != new.state:
        yield change(_outcome(old.state, new.state), _said(old), _said(new))
    elif new.state == "kept":
        yield from (change(kind, _value(was), _value(now), was.name) for kind, was, now in figure_changes(old, new))
        if flipped := answers_change(old, new):
            yield change(flipped[0], right_answers(old.answers), flipped[1], "answers")


def _value(figure: Figure) -> str:
    limit = f" ({figure.relation} {show(figure.limit)})" if figure.relation else ""
    return f"{show(figure.value)} {figure.unit}".rstrip() + limit


def _said(verdict: Verdict) -> str:
    return f"{verdict.state}: {verdict.says}" if verdict.says else verdict.state


def _outcome(old: str, new: str) -> Kind:
    if new == "BROKEN":
        return "new failure"
    if new == "kept":
        return "fixed" if old in ("BROKEN", "error") else "judged"
    return "lost" if old == "kept" or new == "error" else "changed"


def figure_changes(old: Verdict, new: Verdict) -> Iterator[tuple[Kind, Figure, Figure]]:
    """Figures of a verdict that moved by more than noise; one that only one of them has is left out."""
    before = dict(_numbered(old.figures))
    for name, now in _numbered(new.figures):
        was = before.get(name)
        told_apart = old.answers and new.answers and now.name in FLIPPED
        kind = None if was is None or told_apart else figure_change(was, now)
        if was is not None and kind is not None:
            yield kind, was, now


def answers_change(old: Verdict, new: Verdict) -> tuple[Kind, str] | None:
    """Whether answers flipped by more than chance (:func:`pytest_qvl.records.flips.sign_test`), and how, in words."""
    if not (old.answers and new.answers):
        return None
    lost, gained, of = flips(old.answers, new.answers)
    chance = sign_test(lost, gained)
    if chance > LEVEL:
        return None
    return "worse" if lost > gained else "better", f"{right_answers(new.answers)}; {of} (p = {chance:.2g})"


def _numbered(figures: tuple[Figure, ...]) -> Iterator[tuple[tuple[str, int], Figure]]:
    seen: Counter[str] = Counter()
    for figure in figures:
        yield (figure.name, seen[figure.name]), figure
        seen[figure.name] += 1


def figure_change(old: Figure, new: Figure) -> Kind | None:
    """How one figure changed, whose verdict is kept both times; ``None`` for not at all, or by no more than noise.

    - Words and switches, and counts that have to be met (``==``): exactly.
    - GiB: beyond 64 MiB and 2 %, what allocators round to.
    - Counts below a limit: by six, the fewest flips in one direction that a sign test tells from chance (p = 0.03).
    - Shares of a rounding bound (``largest error / limit``): never, since rounding may take all of it.
    - What :data:`CHANCE` names: never.
    - Other figures below a limit: by a quarter of it. Above one: by half of the headroom, and a twentieth of the limit.
    - One that is no finite number any more: worse.
    - One that is held to another kind of limit (``<=``, ``>=``): changed.
    - Seconds, and numbers that are only reported: never.
    """
    if old.unit == "s" or old.unit != new.unit:
        return None
    if _exact(old) or _exact(new):
        shown = max(len(str(old.value)), len(str(new.value))) <= LONGEST
        return "changed" if old.value != new.value and shown else None
    return _by_size(old, new)


def _by_size(old: Figure, new: Figure) -> Kind | None:
    was, now = float(old.value), float(new.value)
    held = bool(old.relation and new.relation)
    if not (math.isfinite(was) and math.isfinite(now)):
        return "worse" if math.isfinite(was) and (held or old.unit == "GiB") else None
    if old.unit == "GiB":
        apart = max(GIB_APART, GIB_SHARE * abs(was))
        return None if abs(now - was) <= apart else "worse" if now > was else "better"
    if not held or old.name.endswith("/ limit") or old.name.startswith(CHANCE):
        return None
    if old.relation != new.relation or not (_numeric(old.limit) and _numeric(new.limit)):
        return "changed"
    if isinstance(old.value, int) and isinstance(new.value, int):
        worse = now - was if new.relation == "<=" else was - now
        return None if abs(worse) < FLIPS else "worse" if worse > 0 else "better"
    return _by_limit(old, new)


def _exact(figure: Figure) -> bool:
    return isinstance(figure.value, str | bool) or figure.relation == "=="


def _numeric(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _by_limit(old: Figure, new: Figure) -> Kind | None:
    """Floats of which both hold; limits depend on the dtype, so that each is put in relation to its own."""
    assert isinstance(old.limit, int | float)
    assert isinstance(new.limit, int | float)
    if not (old.limit > 0 and new.limit > 0):
        return None
    was, now = float(old.value) / old.limit, float(new.value) / new.limit
    if new.relation == "<=":
        return None if abs(now - was) <= SHARE else "worse" if now > was else "better"
    lost = was - now
    small, of = abs(lost) <= 0.05, max(was, now) - 1
    return None if small or abs(lost) <= HEADROOM * of else "worse" if lost > 0 else "better"


def differences(old: dict[str, Any], new: dict[str, Any], renamed: dict[str, str]) -> Iterator[str]:
    """What else is different about the two runs, one line each."""
    yield from _differs("injected fault", *((each["fault"] or {}).get("name") for each in (old, new)))
    before, after = old["environment"], new["environment"]
    for name in dict.fromkeys((*before["packages"], *after["packages"])):
        yield from _differs(name, before["packages"].get(name), after["packages"].get(name))
    yield from _differs("Python", before["python"], after["python"])
    yield from _differs("driver", before["driver"], after["driver"])
    yield from _differs("GPUs", _gpus(before), _gpus(after))
    if old["machine"] and new["machine"]:
        yield from _differs("CPU", old["machine"]["cpu"], new["machine"]["cpu"])
    for name, other in renamed.items():
        yield from _differs("model", name, other)
        was, now = subject(old, name), subject(new, other)
        for key in was.keys() & now.keys() - {"target", "device", "backend", "model", "family"}:
            if was[key] is not None and now[key] is not None:
                yield from _differs(f"{key} of {other}", told(was[key]), told(now[key]))


def _differs(name: str, old: Any, new: Any) -> Iterator[str]:
    if old != new:
        yield f"{name} {'none' if old is None else old} → {'none' if new is None else new}"


def _gpus(environment: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(gpu["name"] for gpu in environment["gpus"])) or "none"
