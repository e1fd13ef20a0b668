"""Which GPUs the caller lets this run use: ``CUDA_VISIBLE_DEVICES`` read as CUDA reads it.

The caller's list is a right, not a hint: a run that counts physical GPUs and picks its own lands on somebody
else's. Standard library only.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.gpu.nvml import Gpu, Inventory, driver

if TYPE_CHECKING:
    from collections.abc import Mapping

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
DEVICE_ORDER = "CUDA_DEVICE_ORDER"
_UUID = re.compile(r"(GPU|MIG)-.+", re.IGNORECASE)


class VisibleDevicesError(ValueError):
    """The caller's list cannot be translated without guessing; the message names it and the fix."""


@dataclass(frozen=True)
class Visible:
    """The GPUs (or MIG slices) this run may use, in the caller's order.

    Attributes:
        gpus: Empty when there is none.
        reason: Why there is none.
        note: What in the caller's list was ignored, and why; empty when nothing was.
    """

    gpus: tuple[Gpu, ...] = ()
    reason: str = ""
    note: str = ""


def visible_gpus(inventory: Inventory | None = None, environ: Mapping[str, str] | None = None) -> Visible:
    """Apply ``CUDA_VISIBLE_DEVICES`` to the machine's GPUs, by CUDA's own rules.

    Not set: all. Empty: none. Entries are indices, UUIDs or unambiguous beginnings of UUIDs, of GPUs or MIG
    slices; the first entry that names nothing hides itself and everything after it; an entry given twice
    hides everything. A GPU divided by MIG stands for its slices, since CUDA computes on those. Without a
    driver library a UUID still names a device, an index does not.

    Args:
        inventory: The machine's GPUs; by default the driver is asked.
        environ: The environment; by default this process's.

    Raises:
        VisibleDevicesError: An index on a machine with different GPUs, where CUDA's own order (fastest first)
            is not the driver's and nobody but CUDA knows it.
    """
    environ = os.environ if environ is None else environ
    inventory = driver().inventory() if inventory is None else inventory
    listed = environ.get(VISIBLE_DEVICES)
    if listed is None:
        return Visible(_computable(inventory.gpus), inventory.reason)
    entries = [entry.strip() for entry in listed.split(",")]
    if not any(entries):
        return Visible(reason=f"{VISIBLE_DEVICES} is empty: the caller allows no GPU")
    chosen: list[Gpu] = []
    for entry in entries:
        found = _find(entry, inventory, environ)
        if found is None:
            note = f"{VISIBLE_DEVICES}={listed!r}: {entry!r} names no GPU here; CUDA ignores it and all after it"
            reason = inventory.reason if not inventory.gpus else note
            return Visible(tuple(chosen), "" if chosen else reason, note if chosen else "")
        if found in chosen:
            return Visible(reason=f"{VISIBLE_DEVICES}={listed!r} names {found} twice, and CUDA then shows no GPU")
        chosen.append(found)
    return Visible(_computable(tuple(chosen)))


def auto_workers(
    *, asked: bool, inventory: Inventory | None = None, environ: Mapping[str, str] | None = None
) -> int | None:
    """How many pytest-xdist workers ``-n auto`` means when GPUs were asked for: one per allowed GPU.

    One where there is no GPU to count: every GPU test is then skipped, and one worker skips as fast as many.
    ``None`` leaves the answer to pytest-xdist (its number of cores): when this run did not ask for GPUs, and when
    the caller fixed the number by ``PYTEST_XDIST_AUTO_NUM_WORKERS``.

    Args:
        asked: Whether this run asked for GPUs; the driver is only asked if so.
        inventory: The machine's GPUs; by default the driver is asked.
        environ: The environment; by default this process's.

    Raises:
        VisibleDevicesError: As :func:`visible_gpus`.
    """
    environ = os.environ if environ is None else environ
    if not asked or environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    return max(1, len(visible_gpus(inventory, environ).gpus))


def _computable(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    return tuple(dict.fromkeys(part for gpu in gpus for part in (gpu.slices or (gpu,))))


def _find(entry: str, inventory: Inventory, environ: Mapping[str, str]) -> Gpu | None:
    if _UUID.fullmatch(entry):
        return _by_uuid(entry, inventory)
    if not entry.isdecimal() or int(entry) >= len(inventory.gpus):
        return None
    models = sorted({gpu.name for gpu in inventory.gpus})
    if len(models) > 1 and environ.get(DEVICE_ORDER) != "PCI_BUS_ID":
        raise VisibleDevicesError(
            f"{VISIBLE_DEVICES}={environ.get(VISIBLE_DEVICES)!r} counts in CUDA's own order, fastest first, "
            f"and this machine has different GPUs ({', '.join(models)}), so only CUDA knows which one is "
            f"meant; set {DEVICE_ORDER}=PCI_BUS_ID, or name the GPUs by UUID (nvidia-smi -L)"
        )
    return inventory.gpus[int(entry)]


def _by_uuid(entry: str, inventory: Inventory) -> Gpu | None:
    known = [gpu for whole in inventory.gpus for gpu in (whole, *whole.slices)]
    matching = [gpu for gpu in known if gpu.uuid.casefold().startswith(entry.casefold())]
    if len(matching) == 1:
        return matching[0]
    # The driver's older MIG names (MIG-GPU-…/instance/instance) are not in its list, nor is anything without
    # a driver.
    if not matching and (not inventory.gpus or entry.upper().startswith("MIG-GPU-")):
        return Gpu(entry)
    return None
