"""Which model runs on which device by which backend: one target per parametrised test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.models.backends import BASELINE, registered

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.options import Settings

FIXTURE = "qvl_target"
NEEDS_CUDA = "needs CUDA: "  # how the reason of every skip for want of CUDA begins


@dataclass(frozen=True)
class Target:
    """One model on one device by one backend.

    The baseline is not named in ids and reports: they are the same whichever backends run beside it.

    Attributes:
        model: What the user typed or ``embedded``; overriding the fixture ``qvl_model`` wins over it.
        device: ``"cpu"`` or ``"cuda"``.
        label: Short name of the model, for test ids.
        backend: How it is loaded; overriding the fixture ``qvl_backend`` wins over it.
    """

    model: str
    device: str
    label: str
    backend: str = BASELINE

    def __str__(self) -> str:
        return self.subject + ("" if self.backend == BASELINE else f" by {self.backend}")

    @property
    def subject(self) -> str:
        """What several backends have in common: the model and the device."""
        return f"{self.model} on {self.device}"

    @property
    def id(self) -> str:
        """How tests are called that run on it: ``embedded-cuda``, ``embedded-cuda-unsloth``."""
        return f"{self.label}-{self.device}" + ("" if self.backend == BASELINE else f"-{self.backend}")


def check_devices(settings: Settings) -> None:
    """Refuse a backend that has no device to run on.

    Raises:
        pytest.UsageError: Names it and the fix.
    """
    for name in settings.backend:
        devices = registered(name).devices
        if settings.device not in ("auto", *devices):
            raise pytest.UsageError(
                f"{settings.source('device')}: backend {name!r} runs on {' and '.join(devices)} only, "
                f"not on {settings.device!r}; choose another device or backend"
            )


def targets(settings: Settings) -> Iterator[Target]:
    """Every model on every device by every backend that this run asked for."""
    for source in settings.model:
        devices = [settings.device]
        if settings.device == "auto":
            devices = ["cpu", "cuda"] if source.kind == "embedded" else ["cuda"]
            if settings.fault is not None:  # shown once; where it is wanted elsewhere, --qvl-device says so
                devices = devices[:1]
        for device in devices:
            for backend in settings.backend:
                if device in registered(backend).devices:
                    yield Target(str(source), device, source.label, backend)


def named_targets(settings: Settings) -> dict[str, Target]:
    """All targets by the name that they have in ids of tests."""
    found: dict[str, Target] = {}
    seen: dict[str, int] = {}
    for target in targets(settings):
        name = target.id
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:  # two folders of the same name; strict pytest refuses equal ids
            name += f"-{seen[name]}"
        found[name] = target
    return found


def target_in(parameters: str, settings: Settings) -> Target | None:
    """The target that is named among a test's parameters, such as ``left-embedded-cpu``; ``None`` for none."""
    named = named_targets(settings)
    inside = [name for name in named if f"-{name}-" in f"-{parameters}-"]
    return named[max(inside, key=len)] if inside else None


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
    params = [
        pytest.param(target, marks=[pytest.mark.gpu] if target.device == "cuda" else [], id=name)
        for name, target in named_targets(settings).items()
    ]
    metafunc.parametrize(FIXTURE, params, indirect=True, scope="session")
