"""The table of docs/forecast.md that sets predicted beside measured, made from the two records.

``python -m pytest_qvl.vram.forecast.validation.trainers.table PREDICTIONS.json MEASURED.json --write docs/forecast.md``
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.outputs import between_marks
from pytest_qvl.vram.forecast.validation.records import digest, read_record
from pytest_qvl.vram.forecast.validation.trainers.cases import MEASURED, PREDICTED
from pytest_qvl.vram.units import MiB

if TYPE_CHECKING:
    from collections.abc import Sequence

BEGIN = "<!-- real trainers: made by pytest_qvl.vram.forecast.validation.trainers.table -->"
END = "<!-- real trainers: end -->"


@dataclass(frozen=True)
class Row:
    """One case, predicted and measured.

    Attributes:
        entry: Of the predictions.
        found: Of a measured record; ``None`` where none has it.
    """

    entry: dict[str, Any]
    found: dict[str, Any] | None

    @property
    def measured(self) -> bool:
        """Whether there are figures."""
        return self.found is not None and "allocated" in self.found

    @property
    def alone(self) -> bool:
        """Whether nothing of an earlier model lay on the device: around it memory stays reserved."""
        return self.found is not None and self.found.get("baseline", 0) <= MiB

    def error(self, number: str) -> float:
        """How far off the forecast of ``"allocated"`` or ``"reserved"`` is, as a share of what was measured."""
        assert self.found is not None
        return float(self.entry[number] / self.found[number] - 1)

    def verdicts(self) -> list[tuple[str, bool, bool, bool]]:
        """Card, fits by the forecast, fits as measured, whether it was trained under that cap; of those known."""
        caps = (self.found or {}).get("caps", {})
        return [
            (card, self.entry["verdicts"][card]["fits"], cap["fits"], cap["ran"])
            for card, cap in caps.items()
            if cap["fits"] is not None
        ]


def rows_of(predictions: Path, records: Sequence[Path]) -> list[Row]:
    """Every predicted case with what was measured, in the order of the predictions.

    Raises:
        ValueError: A record belongs to other predictions, or two records have one case.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in records:
        record = read_record(path, MEASURED)
        if record["predictions"] != digest(predictions):
            raise ValueError(f"{path} was measured for other predictions than {predictions}")
        for case in record["cases"]:
            if case["name"] in found:
                raise ValueError(f"{path} has {case['name']!r}, and so has another record: name each case once")
            found[case["name"]] = case
    return [Row(entry, found.get(entry["name"])) for entry in read_record(predictions, PREDICTED)["cases"]]


def render(rows: Sequence[Row]) -> str:
    """The Markdown: a summary, the table, and what was not measured."""
    measured = [row for row in rows if row.measured]
    cards = list(rows[0].entry["verdicts"]) if rows else []
    lines = [*_summary(rows), ""]
    if measured:
        head = ["case", "allocated: forecast", "measured", "off", "reserved: forecast", "measured", "off", *cards]
        lines += [_line(head), _line(["---"] * len(head)), *(_line(_cells(row, cards)) for row in measured), ""]
    lines += [f"- {row.entry['name']}: {_why(row)}" for row in rows if not row.measured]
    return "\n".join(lines).strip() + "\n"


def _summary(rows: Sequence[Row]) -> list[str]:
    measured = [row for row in rows if row.measured]
    if not measured:
        return [f"{len(rows)} cases are predicted and none is measured."]
    said = [f"{len(measured)} of {len(rows)} cases are measured."]
    for number, judged in (("allocated", measured), ("reserved", [row for row in measured if row.alone])):
        if not judged:
            continue
        errors = [abs(row.error(number)) for row in judged]
        worst = max(judged, key=lambda row: abs(row.error(number)))
        said.append(
            f"Peak {number}: off by {sum(errors) / len(errors):.2%} on average, {max(errors):.2%} at worst "
            f"({worst.entry['name']})."
        )
    if beside := sum(not row.alone for row in measured):
        said.append(
            f"Not judged (–) is what {beside} of them reserved: part of an earlier model was still on the device. What "
            "they allocated is without it."
        )
    verdicts = [verdict for row in measured for verdict in row.verdicts()]
    right = sum(forecast == fits for _, forecast, fits, _ in verdicts)
    trained = sum(ran for *_, ran in verdicts)
    said.append(
        f"The verdict is right in {right} of {len(verdicts)} cases under the caps of cards, {trained} of them trained "
        "under the cap, the others derived from what was allocated and reserved without it."
    )
    return said


def _cells(row: Row, cards: Sequence[str]) -> list[str]:
    cells = [row.entry["name"]]
    assert row.found is not None
    for number in ("allocated", "reserved"):
        off = f"{row.error(number):+.2%}" if number == "allocated" or row.alone else "–"
        cells += [f"{row.entry[number] / MiB:,.0f}", f"{row.found[number] / MiB:,.0f}", off]
    known = {card: (forecast, fits, ran) for card, forecast, fits, ran in row.verdicts()}
    return [*cells, *(_verdict(known.get(card)) for card in cards)]


def _verdict(known: tuple[bool, bool, bool] | None) -> str:
    if known is None:
        return "–"
    forecast, fits, ran = known
    said = ("fits" if fits else "no") + (" (trained)" if ran else "")
    return said if forecast == fits else f"**{said}; forecast: {'fits' if forecast else 'no'}**"


def _why(row: Row) -> str:
    if row.found is None:
        return "not run"
    return str(row.found.get("error") or row.found.get("not_measured") or row.found["status"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def replaced(page: str, text: str) -> str:
    """The page with ``text`` between the two marks.

    Raises:
        ValueError: The page lacks a mark.
    """
    missing = f"the page lacks the marks {BEGIN!r} and {END!r}, between which the table goes"
    return between_marks(page, BEGIN, END, f"\n\n{text}\n", missing=missing)


def main(arguments: list[str]) -> int:
    """Print the table or write it into a page; 1 with ``--check`` if the page has another."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_qvl.vram.forecast.validation.trainers.table", description=__doc__
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.json")
    parser.add_argument("records", type=Path, nargs="*", metavar="MEASURED.json")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="put it between the marks of a page")
    parser.add_argument("--check", action="store_true", help="only say whether the page has this very table")
    options = parser.parse_args(arguments)
    text = render(rows_of(options.predictions, options.records))
    if options.write is None:
        print(text, end="")
        return 0
    page = options.write.read_text(encoding="utf-8")
    fresh = replaced(page, text)
    if options.check:
        print(f"{options.write} is {'fresh' if fresh == page else 'stale: run the command without --check'}")
        return int(fresh != page)
    options.write.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
