"""Backends side by side: what each needed of memory and time, how far their logits agree, what each quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import Table, Value

if TYPE_CHECKING:
    from pytest_qvl.evidence import Evidence
    from pytest_qvl.report.run_results import RunResults

TITLE = "backends side by side"
PEAKS, CENSUS = "peak_vram", "quantization_census"
TOP_TOKENS, SOME_LOGITS = "prefill: most probable tokens", "prefill: some logits"  # in the data of PEAKS
Row = tuple[Value | None, ...]


def write_comparison(terminal: Any, results: RunResults) -> None:
    """Write one table for each thing that more than one backend has measured, on pytest's terminal reporter."""
    tables = comparison(results)
    if tables:
        terminal.section(TITLE, sep="=", bold=True)
    for name, table in tables.items():
        terminal.line(name, bold=True)
        for line in str(table).splitlines():
            terminal.line(f"   {line}")


def comparison(results: RunResults) -> dict[str, Table]:
    """Tables by title; empty where nothing was measured by more than one backend."""
    made: dict[str, Table] = {}
    for subject, by_check in _comparable(results).items():
        peaks, census = by_check.get(PEAKS, {}), by_check.get(CENSUS, {})
        if len(peaks) > 1:
            made[f"{subject}: memory and time"] = _peaks(peaks)
            logits = _logits(peaks)
            if logits.rows:
                made[f"{subject}: logits of the same inputs"] = logits
        if len(census) > 1:
            made[f"{subject}: what is quantized"] = _census(census)
    return made


def _comparable(results: RunResults) -> dict[str, dict[str, dict[str, Evidence]]]:
    """What can be compared, by subject (model and device), check and backend; of each the last."""
    found: dict[str, dict[str, dict[str, Evidence]]] = {}
    for _, finding in results.findings:
        if finding.subject is None or finding.backend is None:
            continue
        for evidence in finding.evidence:
            if evidence.check in (PEAKS, CENSUS):
                by_check = found.setdefault(finding.subject, {})
                by_check.setdefault(evidence.check, {})[finding.backend] = evidence
    return found


def _peaks(found: dict[str, Evidence]) -> Table:
    """Each phase by each backend; for every backend but the first also the ratio to the first."""
    tables = {backend: evidence.table for backend, evidence in found.items() if evidence.table}
    first, *others = tables
    rows: list[Row] = []
    for row in tables[first].rows:
        rows.append((row[0], first, *row[1:]))
        for other in others:
            there = next((r for r in tables[other].rows if r[0] == row[0]), None)
            if there is not None:
                ratios = tuple(_ratio(mine, its) for its, mine in zip(row[1:], there[1:], strict=True))
                rows += [(row[0], other, *there[1:]), (row[0], f"{other} / {first}", *ratios)]
    return Table(("phase", "backend", *tables[first].columns[1:]), tuple(rows))


def _ratio(value: Any, reference: Any) -> Value | None:
    return round(value / reference, 3) if value is not None and reference else None


def _logits(found: dict[str, Evidence]) -> Table:
    """How far some logits and the most probable tokens of every backend are from those of the first."""
    digests: dict[str, tuple[list[Value], list[float]]] = {}
    for backend, evidence in found.items():
        if TOP_TOKENS in evidence.data and SOME_LOGITS in evidence.data:
            digests[backend] = evidence.data[TOP_TOKENS], [float(value) for value in evidence.data[SOME_LOGITS]]
    rows: list[Row] = []
    names = list(digests)
    for other in names[1:]:
        (tokens, logits), (its_tokens, its_logits) = digests[names[0]], digests[other]
        if (len(tokens), len(logits)) == (len(its_tokens), len(its_logits)):
            same = sum(a == b for a, b in zip(tokens, its_tokens, strict=True))
            largest = max(abs(a - b) for a, b in zip(logits, its_logits, strict=True))
            rows.append((f"{other} against {names[0]}", f"{same} of {len(tokens)}", largest, len(logits)))
    return Table(("backends", "same most probable token", "largest difference", "logits compared"), tuple(rows))


def _census(found: dict[str, Evidence]) -> Table:
    tables = {backend: evidence.table for backend, evidence in found.items() if evidence.table}
    first = next(iter(tables.values()))
    rows = [
        (row[0], backend, *row[1:])
        for group in dict.fromkeys(row[0] for table in tables.values() for row in table.rows)
        for backend, table in tables.items()
        for row in table.rows
        if row[0] == group
    ]
    return Table((first.columns[0], "backend", *first.columns[1:]), tuple(rows))
