"""What a run is compared with: a record in a file, or a reference that this package brings for the embedded model."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from pytest_qvl.records.stored import RecordError, as_newest, read_record, targets

SHIPPED = "shipped"
# In this order a shipped record with the same version is the nearer one, or with a nearer version.
DECISIVE = ("transformers", "torch", "peft", "bitsandbytes", "accelerate")


def is_shipped(name: str) -> bool:
    """Whether a name means a shipped reference: ``shipped``, or ``shipped:transformers5.17.0`` for one of those."""
    return name.partition(":")[0] == SHIPPED


def base_record(name: str, new: dict[str, Any]) -> dict[str, Any]:
    """The record of that name, or the shipped one whose versions are nearest to those of ``new``.

    Args:
        name: A file, or what :func:`is_shipped` takes.
        new: The record that is compared with it.

    Raises:
        RecordError: No record, or none is shipped for what ``new`` ran on.
    """
    return _nearest(name, new) if is_shipped(name) else read_record(Path(name))


def named_record(name: str) -> dict[str, Any]:
    """The record of that name; of the shipped ones, the only one that is called so.

    Raises:
        RecordError: No record, or several are shipped that are called so.
    """
    if not is_shipped(name):
        return read_record(Path(name))
    found = shipped_records(name)
    if len(found) > 1:
        raise RecordError(f"{name!r} means {len(found)} of the references that are shipped: {_listed(shipped_names())}")
    return found[0]


def shipped_names() -> list[str]:
    """What the references in the package are called: the versions that they were made with."""
    folder = files("pytest_qvl").joinpath("records", SHIPPED)
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def shipped_records(name: str = SHIPPED) -> list[dict[str, Any]]:
    """Every reference record in the package that a name means.

    Raises:
        RecordError: None is called so.
    """
    wanted = name.partition(":")[2]
    # "peft0.2" is not meant by "peft0.21.2".
    named = [one for one in shipped_names() if f"-{wanted}-" in f"-{one}-" or not wanted]
    if not named:
        raise RecordError(f"no reference is shipped for {wanted!r}, but for {_listed(shipped_names())}")
    folder = files("pytest_qvl").joinpath("records", SHIPPED)
    return [as_newest(json.loads(folder.joinpath(f"{one}.json").read_text(encoding="utf-8")), one) for one in named]


def _listed(names: list[str]) -> str:
    return ", ".join(name.removeprefix("embedded-cpu-") for name in names)


def _nearest(name: str, new: dict[str, Any]) -> dict[str, Any]:
    same = [record for record in shipped_records(name) if set(targets(record)) & set(targets(new))]
    if not same:
        raise RecordError(
            f"no reference is shipped for {', '.join(targets(new)) or 'a run without a model'}, only for the embedded "
            "model on the CPU; compare with a record of your own"
        )
    have = new["environment"]["packages"]

    def distance(record: dict[str, Any]) -> list[tuple[int, ...]]:
        packages = record["environment"]["packages"]
        return [_apart(packages.get(one), have.get(one)) for one in DECISIVE]

    return min(same, key=distance)


def _apart(old: str | None, new: str | None) -> tuple[int, ...]:
    """How far two versions are apart, without names of builds (``+cpu``); of two as far, the older is nearer."""
    from packaging.version import InvalidVersion, Version

    try:
        was, now = Version(old or ""), Version(new or "")
    except InvalidVersion:
        return (0,) if old == new else (1, *(10**6,) * 4)
    if was.public == now.public:
        return (0,)
    steps = (abs(a - b) for a, b in zip((*was.release, 0, 0)[:3], (*now.release, 0, 0)[:3], strict=True))
    return (1, *steps, int(was > now))
