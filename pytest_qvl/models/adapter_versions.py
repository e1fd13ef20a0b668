"""The adapter on the resident base model, and what it held each time that somebody had trained it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.backends import ModelLoadError, backend
from pytest_qvl.models.fingerprint.digests import Fingerprint, differences
from pytest_qvl.models.progress_bars import no_progress_bars

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch

    from pytest_qvl.models.adapters import AdapterSlot

FRESH = None
_UNKNOWN = object()


@dataclass(frozen=True)
class _Version:
    """Adapter weights that somebody made.

    Attributes:
        weights: CPU copies by parameter name.
        digests: Of the same, to see cheaply that nothing changed.
    """

    weights: dict[str, torch.Tensor]
    digests: dict[str, int]


class AdapterVersions:
    """One adapter with the weights it had as attached and after each training, any of which can be put back.

    Args:
        adapted: The model that PEFT wrapped (or into which Transformers put the adapter), or its slot.
        key: Values of LoRA configuration, adapter folder and seed; ``None`` if somebody else attached it.

    Attributes:
        slot: The wrapper and its layers.
        key: As given.
    """

    def __init__(self, adapted: Any, key: str | None) -> None:
        from pytest_qvl.models.adapters import AdapterSlot

        self.slot = adapted if isinstance(adapted, AdapterSlot) else AdapterSlot.of(adapted)
        self.key = key
        # Kept from test to test, because the adapter is read after every one.
        self._fingerprint = Fingerprint()
        # By who trained it, in the order of training, FRESH first.
        self._versions: dict[Hashable, _Version] = {FRESH: self._copy()}
        self._current: Hashable = FRESH

    def show(self, version: Hashable) -> bool:
        """Attach the adapter with the weights of a version (:data:`FRESH`: as it was first attached).

        Returns:
            Whether it could be done; not if adapters were added or removed since, or nobody made that version.
        """
        if not self.slot.attached:
            self.slot.attach()
        return version == self._current or self._load(version)

    def detach(self) -> None:
        """Let the base model run without it; the weights stay here."""
        if self.slot.attached:
            self.slot.detach()

    def snapshot(self, trainer: Hashable) -> None:
        """Remember the present weights as what ``trainer`` made, if they are not those of the shown version."""
        if self.changes():
            self._versions.pop(trainer, None)
            self._versions[trainer] = self._copy()
            self._current = trainer

    def latest(self, trainers: frozenset[Hashable]) -> Hashable:
        """Which of the trainers trained last; :data:`FRESH` if none of them did."""
        return next((version for version in reversed(self._versions) if version in trainers), FRESH)

    def forget(self, trainer: Hashable) -> None:
        """Drop what ``trainer`` made; where it is shown, other weights are loaded when the adapter is next shown."""
        self._versions.pop(trainer, None)
        if self._current == trainer:
            self._current = _UNKNOWN

    def changes(self) -> list[str]:
        """Names of tensors that are not bitwise those of the shown version, or come or gone since; none if detached."""
        if not self.slot.attached or self._current is _UNKNOWN:
            return []
        return differences(self._versions[self._current].digests, self._digests())

    def restore(self) -> bool:
        """Put back the weights of the version that is shown; ``False`` if adapters were added or removed."""
        return self._load(self._current)

    def _parameters(self) -> dict[str, Any]:
        from pytest_qvl.models.adapters import adapter_parameters
        from pytest_qvl.models.anatomy import anatomy
        from pytest_qvl.models.training import trained_copies

        parts = anatomy(self.slot.peft_model)
        return {**adapter_parameters(parts), **trained_copies(parts)}

    def _digests(self) -> dict[str, int]:
        return self._fingerprint.read(self._parameters().items())

    def _copy(self) -> _Version:
        weights = {n: p.detach().to("cpu", copy=True) for n, p in self._parameters().items()}
        return _Version(weights, self._digests())

    def _load(self, version: Hashable) -> bool:
        import torch

        parameters = self._parameters()
        stored = self._versions.get(version)
        if stored is None or parameters.keys() != stored.weights.keys():
            return False
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored.weights[name])
        self._current = version
        return True


def attach_adapter(model: Any, backend_name: str, lora_config: Any, adapter: str | None, seed: int) -> AdapterSlot:
    """Put an adapter on a base model; the random numbers of torch go on as if nothing had been drawn.

    Args:
        model: The base model.
        backend_name: The backend that attaches it.
        lora_config: Its configuration; not written into.
        adapter: Folder of a saved adapter, or ``None`` for new weights.
        seed: Seed of torch for new weights.

    Raises:
        ModelLoadError: The adapter cannot be attached; the base model is left without one.
        OutOfMemoryError: Of torch, as it is.
    """
    import torch

    from pytest_qvl.models.adapters import remove_peft_layers
    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.models.attaching import check_lora_config, why_not_attached

    check_lora_config(lora_config)
    device = anatomy(model).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), no_progress_bars():
        torch.manual_seed(seed)
        try:
            # A copy, because PEFT writes into the configuration what it made of it.
            return backend(backend_name).attach(model, copy.deepcopy(lora_config), adapter)
        except Exception as error:
            remove_peft_layers(model)
            if type(error).__name__ == "OutOfMemoryError":
                raise
            why = why_not_attached(error, lora_config, adapter)
            raise ModelLoadError(f"no adapter on {type(model).__name__}: {why}") from None
