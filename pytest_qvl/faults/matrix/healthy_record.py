"""What healthy variations showed under each setting, as data, as text and as Markdown for the documentation."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import Table, printable
from pytest_qvl.faults.matrix.healthy import DEFAULT
from pytest_qvl.faults.matrix.isa import Setting
from pytest_qvl.faults.matrix.isa_used import Used

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_qvl.faults.matrix.healthy_child import Judged
    from pytest_qvl.faults.matrix.isa import Cpu

SCHEMA = "pytest-qvl/healthy/1"
COLUMNS = ("setting", "variations", "checks judged", "false alarms", "not judged")
BEGIN, END = "<!-- healthy variations: {} -->", "<!-- end of healthy variations -->"
COMMAND = "pytest-qvl faults --table docs/records/healthy-cpu.json --docs docs"
PAGE = "checks.md"


@dataclass
class Outcome:
    """What the variations under one setting showed.

    Attributes:
        setting: The setting.
        missing: CPU flags that it needs and this CPU lacks: then nothing ran.
        numbers: Of the variations that were judged.
        used: What torch and oneDNN say they compute with, process by process, without repetition.
        cpus: Names of the CPUs that it ran on.
        versions: The releases on each of them, with the name as ``"cpu"``, without repetition.
        judged: Checks that gave a verdict.
        undecided: Check to how often it could not judge.
        why: Check to a reason why.
        alarms: False alarms, in words.
        broken: Why processes of it gave no result.
        seconds: CPU time.
    """

    setting: Setting
    missing: tuple[str, ...] = ()
    numbers: list[int] = field(default_factory=list)
    used: list[Used] = field(default_factory=list)
    cpus: list[str] = field(default_factory=list)
    versions: list[dict[str, str]] = field(default_factory=list)
    judged: int = 0
    undecided: dict[str, int] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def green(self) -> bool:
        """Whether it ran through without a false alarm, or could not run here."""
        return not self.alarms and not self.broken

    def add(self, judged: Judged, used: Used, cpu: str, versions: dict[str, str] | None = None) -> None:
        """Count what a process, computing with `used` on `cpu` with these releases, found in a variation; each once."""
        if judged.number in self.numbers:
            return
        self.numbers.append(judged.number)
        self.used += [] if used in self.used else [used]
        self.cpus += [] if cpu in self.cpus else [cpu]
        ran_with = {"cpu": cpu, **(versions or {})}
        self.versions += [] if versions is None or ran_with in self.versions else [ran_with]
        self.judged += judged.judged
        self.undecided = dict(Counter(self.undecided) + Counter(judged.undecided))
        self.why |= judged.why
        self.alarms += judged.alarms
        self.seconds += judged.seconds

    def row(self) -> tuple[Any, ...]:
        """The setting's row of the table of outcomes."""
        if self.missing:
            return (str(self.setting), f"not offered (no {', '.join(self.missing)})", None, None, None)
        alarms = "broken" if self.broken else len(self.alarms)
        return (str(self.setting), len(self.numbers), self.judged, alarms, sum(self.undecided.values()))


def shown(outcomes: Sequence[Outcome], cpu: Cpu) -> str:
    """The table of outcomes, then false alarms and breakdowns, then the totals."""
    ran = [outcome for outcome in outcomes if not outcome.missing]
    alarms = [f"FALSE ALARM under {o.setting}: {alarm}" for o in ran for alarm in o.alarms]
    broken = [f"BROKEN {reason}" for o in ran for reason in o.broken]
    table = Table(COLUMNS, tuple(outcome.row() for outcome in outcomes))
    sums = (
        f"{cpu.model}: {len(alarms)} false alarms over {sum(len(o.numbers) for o in ran):,} healthy variations "
        f"({sum(o.judged for o in ran):,} checks) under {sum(bool(o.numbers) for o in ran)} of {len(outcomes)} "
        f"settings; {len(outcomes) - len(ran)} not offered by this CPU"
    )
    return printable("\n".join([str(table), "", *alarms, *broken, sums]))


def record(outcomes: Sequence[Outcome], cpu: Cpu, asked: int, model: str = DEFAULT) -> dict[str, Any]:
    """The model that was varied, CPU, versions and the outcome of each setting, as plain data."""
    from pytest_qvl.faults.matrix.freshness import definitions_digest
    from pytest_qvl.faults.matrix.journal import versions

    return {
        "schema": SCHEMA,
        "asked": asked,
        "model": model,
        "complete": sum(len(outcome.numbers) for outcome in outcomes) == asked,
        "cpu": asdict(cpu),
        "versions": versions(),
        "definitions": definitions_digest(model),
        "settings": [_setting(outcome) for outcome in outcomes],
    }


def _setting(outcome: Outcome) -> dict[str, Any]:
    fields = asdict(outcome)
    setting = fields.pop("setting")
    numbers = sorted(fields.pop("numbers"))
    fields["seconds"] = round(outcome.seconds, 1)
    return {**setting, "offered": not outcome.missing, "variations": len(numbers), **fields, "numbers": numbers}


def markdown(data: dict[str, Any]) -> str:
    """The record as a block of Markdown, with the marks that it stands between on :data:`PAGE`."""
    settings = data["settings"]
    variations, judged, alarms = (
        sum(setting["variations"] for setting in settings),
        sum(setting["judged"] for setting in settings),
        [alarm for setting in settings for alarm in setting["alarms"]],
    )
    ran = [setting for setting in settings if setting["variations"]]
    unfinished = "" if data["complete"] else f" (of {data['asked']:,} asked for: the run is unfinished)"
    return "\n".join(
        [
            BEGIN.format(f"written by `{COMMAND}`; definitions {data['definitions']}"),
            f"**{len(alarms)} false alarms over {variations:,} healthy variations{unfinished}**: {judged:,} verdicts "
            f"of checks under {len(ran)} of {len(settings)} settings, {_machines(data)}.",
            "",
            "| `ONEDNN_MAX_CPU_ISA` | `ATEN_CPU_CAPABILITY` | threads | oneDNN says | torch says | variations | "
            "checks judged | not judged | false alarms |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(_row, settings),
            "",
            *_notes(settings, alarms),
            END,
        ]
    )


def _machines(data: dict[str, Any]) -> str:
    """The CPUs and the releases on them; a record of before they were kept by CPU has those of its last one."""
    cpus = sorted({cpu for setting in data["settings"] for cpu in setting["cpus"]}) or [data["cpu"]["model"]]
    kept = [each for setting in data["settings"] for each in setting.get("versions", [])]
    releases: dict[str, list[str]] = {}
    for each in kept or [{"cpu": cpu, **data["versions"]} for cpu in cpus]:
        words = ", ".join(f"{name} {version}" for name, version in each.items() if name != "cpu")
        on = releases.setdefault(words, [])
        on += [] if each["cpu"] in on else [each["cpu"]]
    return "; ".join(f"on {' and '.join(sorted(on))}, with {words}" for words, on in releases.items())


def _row(setting: dict[str, Any]) -> str:
    asked = [setting["onednn"] or "as the machine is", setting["aten"] or "as the machine is", setting["threads"]]
    if not setting["offered"]:
        figures: list[Any] = [f"not offered by this CPU: no {', '.join(setting['missing'])}", "", "", "", "", ""]
    else:
        said = [
            " and ".join(dict.fromkeys(_onednn(used) for used in setting["used"])),
            " and ".join(dict.fromkeys(used["aten"] for used in setting["used"])),
        ]
        undecided = sum(setting["undecided"].values())
        figures = [*said, setting["variations"], setting["judged"], undecided, len(setting["alarms"])]
    return f"| {' | '.join(map(str, [*asked, *figures]))} |"


def _onednn(used: dict[str, Any]) -> str:
    kernel = f" (`{used['bfloat16']}`)" if used["bfloat16"] else ""
    return f"{used['onednn'] or 'nothing'}{kernel}"


def _notes(settings: list[dict[str, Any]], alarms: list[str]) -> list[str]:
    undecided: Counter[str] = Counter()
    why: dict[str, str] = {}
    for setting in settings:
        undecided.update(setting["undecided"])
        why |= setting["why"]
    broken = [reason for setting in settings for reason in setting["broken"]]
    lines = [f"- Not judged by `{name}` {times} times: {_inline(why[name])}" for name, times in undecided.items()]
    lines += [f"- False alarm: {_inline(alarm)}" for alarm in alarms]
    lines += [f"- Broken: {_inline(reason)}" for reason in broken]
    return [*lines, *([""] if lines else [])]


def _inline(text: str) -> str:
    return " ".join(printable(text).split())


def write_block(data: dict[str, Any], docs: Path) -> None:
    """Put the block of a record into :data:`PAGE`, in the place of the one that stands there.

    Raises:
        ValueError: The page is not there, or has no place for it.
    """
    page = docs / PAGE
    if not page.is_file():
        raise ValueError(f"--docs: there is no {page} to write the healthy variations into")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace(block_of(text, str(page)), markdown(data)), encoding="utf-8")


def block_of(text: str, name: str = PAGE) -> str:
    """The block that stands on the page, with its marks.

    Raises:
        ValueError: The marks are not there, or not in this order.
    """
    begin, end = text.find(BEGIN.partition("{")[0]), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{name} has no place for the healthy variations: write {BEGIN.format('…')} and {END} there")
    return text[begin : end + len(END)]
