"""docs/collators.md, made of the records. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from collating.frameworks import COMMON, FRAMEWORKS
from collating.known import known

FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
RED, UNJUDGED = "red", "not judged"
HEAD = """# Collators of public frameworks

What the real collators of {count} frameworks make of the same rows, judged by [`checks.batch`](checks.md). Written by
`python tools/collators.py` from `docs/records/collators-*.json`; each framework runs in an environment of its own, on
the CPU, with the processor classes, special tokens and configurations of the released models, and with rendered scenes
in place of photographs.

- **green**: no finding; with "refused", the collator raises an error that says what is wrong.
- **red**: `checks.batch` found a defect, or the collator raises on rows that its framework takes. Each red cell links
  to the finding and to lines that show it.
- **–**: not judged; the reason is in the last section. It is not a pass.

A red cell is about one version, one set-up and the rows of this page: it is no verdict on a framework. Some are what a
set-up is for (every token is learned unless asked otherwise) and are red because few want it. The tokenizer has the
special tokens of the released ones but spells text byte by byte: faults that need merged tokens do not show here. A
property that has rows of its own (several turns, text, video, ...) is red where those rows have a kind of finding that
plain rows do not have.

"""


def page(records: Iterable[Mapping[str, Any]]) -> str:
    """The whole page."""
    given = list(records)
    parts = [HEAD.format(count=_number(len(given))), _versions(given)]
    for family, label in FAMILIES.items():
        parts += [f"## {label}\n\n", _table(given, family)]
    parts += ["## Red cells\n\n", *_reds(given), "## Not judged\n\n", *_unjudged(given)]
    return "".join(parts).rstrip("\n") + "\n"


def _number(count: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[count] if count < len(words) else str(count)


def _versions(records: list[Mapping[str, Any]]) -> str:
    rows = ["| framework | version | Transformers | set-up | how it is made |\n| --- | --- | --- | --- | --- |\n"]
    for record in records:
        package = FRAMEWORKS[record["framework"]].package
        for set_up, words in record["set_ups"].items():
            versions = f"{package} {record['versions'][package]} | {record['versions']['transformers']}"
            rows.append(f"| {record['title']} | {versions} | {set_up} | {words} |\n")
    bare = [f"{FRAMEWORKS[r['framework']].title}" for r in records if FRAMEWORKS[r["framework"]].bare]
    said = (
        f"\nAll with {COMMON[0]} for the CPU. Installed without their own requirements, which hold CUDA-only packages "
        f"or far more than collators import: {', '.join(bare)}; what they do import is beside them, in the "
        "versions that they ask for (`tools/collating/frameworks.py`). The index has torchvision for CUDA only; "
        "its compiled operators, which no image processor calls, are declared so that it can be imported.\n\n"
    )
    return "".join(rows) + said


def _table(records: list[Mapping[str, Any]], family: str) -> str:
    columns = [(record, set_up) for record in records for set_up in record["set_ups"]]
    head = " | ".join(
        f"{record['title']}: {set_up}" if len(record["set_ups"]) > 1 else record["title"] for record, set_up in columns
    )
    lines = [f"| property | {head} |\n", "| --- |" + " --- |" * len(columns) + "\n"]
    for name in _properties(records):
        cells = [_shown(record, _cell(record, family, set_up, name)) for record, set_up in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    return "".join(lines) + "\n"


def _properties(records: list[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(cell["property"] for record in records for cell in record["cells"]))


def _cell(record: Mapping[str, Any], family: str, set_up: str, name: str) -> Mapping[str, Any]:
    found = [
        cell for cell in record["cells"] if (cell["family"], cell["set_up"], cell["property"]) == (family, set_up, name)
    ]
    return found[0] if found else {"verdict": UNJUDGED, "why": "not in the record"}


def _shown(record: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    if cell["verdict"] == RED:
        return f"[**red**](#{_anchor(_title(record, cell['set_up'], cell['property']))})"
    if cell["verdict"] == UNJUDGED:
        return "–"
    return "green (refused)" if cell["why"].startswith("refused") else "green"


def _title(record: Mapping[str, Any], set_up: str, name: str) -> str:
    where = f"{record['title']}, {set_up}" if len(record["set_ups"]) > 1 else record["title"]
    return f"{where}: {name}".replace("`", "")


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _grouped(records: list[Mapping[str, Any]], verdict: str) -> Iterable[tuple[Mapping[str, Any], str, str, list[Any]]]:
    """Each (record, set-up, property) with the cells of its families that have a verdict."""
    names = _properties(records)
    for record in records:
        chosen = [cell for cell in record["cells"] if cell["verdict"] == verdict]
        set_ups = list(record["set_ups"])
        chosen.sort(key=lambda cell: (set_ups.index(cell["set_up"]), names.index(cell["property"])))
        for (set_up, name), cells in groupby(chosen, key=lambda cell: (cell["set_up"], cell["property"])):
            yield record, set_up, name, list(cells)


def _reds(records: list[Mapping[str, Any]]) -> Iterable[str]:
    for record, set_up, name, cells in _grouped(records, RED):
        yield f"### {_title(record, set_up, name)}\n\n"
        yield f"{', '.join(FAMILIES[cell['family']] for cell in cells)}. {_story(cells[0])}\n\n"
        comment = known(record["framework"], set_up, name)
        if comment:
            yield f"{comment}\n\n"
        shown = next(cell for cell in cells if "reproducer" in cell)
        raised = shown["raised"].partition(":")[0]
        framework = FRAMEWORKS[record["framework"]]
        # Where the module is missing, the tests of the page skip the reproducer and say so.
        yield f"<!-- block: slow; needs {framework.module or framework.name}; raises {raised} -->\n"
        yield f"```python\n{shown['reproducer']}```\n\nraises `{shown['raised']}`\n\n"


def _story(cell: Mapping[str, Any]) -> str:
    if not cell["findings"]:
        return f"{cell['why'][0].upper()}{cell['why'][1:]}."
    said = []
    for kind, group in groupby(cell["findings"], key=lambda finding: finding["kind"]):
        first = next(iter(group))
        place = "the batch" if first["row"] is None else f"row {first['row']}"
        place += "" if first["token"] is None else f", token {first['token']}"
        said.append(f"`{kind}`: {place} has {first['found']}, expected {first['expected']}")
    return "; ".join(said) + "."


def _unjudged(records: list[Mapping[str, Any]]) -> Iterable[str]:
    yield "| framework | set-up | property | families | why |\n| --- | --- | --- | --- | --- |\n"
    for record, set_up, name, cells in _grouped(records, UNJUDGED):
        for why, group in groupby(cells, key=lambda cell: cell["why"]):
            labels = ", ".join(FAMILIES[cell["family"]] for cell in group)
            yield f"| {record['title']} | {set_up} | {name} | {labels} | {why} |\n"
