"""Which model runs on which device: one target per parametrised test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.options import Settings

FIXTURE = "qvl_target"
NEEDS_CUDA = "needs CUDA: "  # how the reason of every skip for want of CUDA begins


@dataclass(frozen=True)
class Target:
    """One model on one device.

    Attributes:
        model: What the user typed or ``embedded``; overriding the fixture ``qvl_model`` wins over it.
        device: ``"cpu"`` or ``"cuda"``.
        label: Short name of the model, for test ids.
    """

    model: str
    device: str
    label: str

    def __str__(self) -> str:
        return f"{self.model} on {self.device}"


def targets(settings: Settings) -> Iterator[Target]:
    """Every model on every device that this run asked for."""
    for source in settings.model:
        devices = [settings.device]
        if settings.fault is not None:  # faults are made for the CPU
            devices = ["cpu"]
        elif settings.device == "auto":
            devices = ["cpu", "cuda"] if source.kind == "embedded" else ["cuda"]
        for device in devices:
            yield Target(str(source), device, source.label)


def target_of(item: pytest.Item) -> Target | None:
    """The target that a test runs on; ``None`` if it uses no model fixture."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get(FIXTURE)


def on_cuda(item: pytest.Item) -> bool:
    """Whether a test runs on a model on CUDA."""
    target = target_of(item)
    return target is not None and target.device == "cuda"


def parametrize(metafunc: pytest.Metafunc, settings: Settings) -> None:
    """Run a test once per target if it uses a model fixture; CUDA targets carry the mark ``gpu``.

    The mark has to come from ``pytest.param``: one added after collection is too late for ``-m``.
    """
    if FIXTURE not in metafunc.fixturenames:
        return
    params = []
    seen: dict[str, int] = {}
    for target in targets(settings):
        name = f"{target.label}-{target.device}"
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:  # two folders of the same name; strict pytest refuses equal ids
            name += f"-{seen[name]}"
        marks = [pytest.mark.gpu] if target.device == "cuda" else []
        params.append(pytest.param(target, marks=marks, id=name))
    metafunc.parametrize(FIXTURE, params, indirect=True, scope="session")
