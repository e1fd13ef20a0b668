"""The one owner of the model: loads once, attaches and detaches LoRA in place, serves no stale state.

At most one base model is resident. What is resident is keyed by the *values* of the configurations that made
it: two folders with different LoRA configurations, or a base-only test after a LoRA test, each get their own.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapter_versions import FRESH, AdapterVersions, attach_adapter
from pytest_qvl.models.backends import BASELINE, Backend, LoadRequest, ModelLoadError, backend
from pytest_qvl.models.base_weights import BaseWeights
from pytest_qvl.models.memory import collect, refuse_if_too_big
from pytest_qvl.models.progress_bars import no_progress_bars

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

Key = str


def value_key(*configs: Any) -> Key:
    """A key that is equal exactly when the configurations' values are."""

    def plain(value: Any) -> Any:
        to_dict = getattr(value, "to_dict", None)
        if callable(to_dict):
            return {type(value).__name__: to_dict()}
        if is_dataclass(value) and not isinstance(value, type):
            return {type(value).__name__: asdict(value)}
        if isinstance(value, set | frozenset):
            return sorted(map(str, value))
        return str(value)

    return json.dumps(configs, sort_keys=True, default=plain)


class ModelOwner:
    """Holds the resident model and puts it into the state that each test asks for.

    Args:
        notify: Called with a line of progress on loads.
        phase: What a load and the attaching of an adapter run in, by name: the meter's phases.
    """

    def __init__(
        self, notify: Callable[[str], object], phase: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self._notify = notify
        self._phase = phase
        self._base_key: Key | None = None
        self._base: BaseWeights | None = None
        self._backend: Backend | None = None
        self._adapted: AdapterVersions | None = None

    @property
    def resident(self) -> Any:
        """The wrapped model if an adapter is on it, else the base model, else ``None``."""
        if self._adapted is not None and self._adapted.slot.attached:
            return self._adapted.slot.peft_model
        return self._model

    @property
    def _model(self) -> Any:
        """The base model, or ``None``."""
        return None if self._base is None else self._base.model

    def base(self, request: LoadRequest, backend_name: str) -> Any:
        """The base model without an adapter, loading it if what is resident was made from other values.

        Raises:
            ModelLoadError: It cannot be loaded.
            ValueError: No such backend.
        """
        key = value_key(str(request.source), request.quantization_config, request.device, request.dtype, backend_name)
        if key != self._base_key or not self.usable_by(frozenset()) or not self.show_base():
            self.release()
            collect()
            self._notify(f"loading {request.source} on {request.device}")
            with self._phase("load"), no_progress_bars():
                self._hold(_load(request, backend_name), key)
            self._backend = backend(backend_name)
        return self._model

    def adapted(self, model: Any, backend_name: str, lora_config: Any, adapter: str | None, seed: int) -> Any:
        """``model`` with an adapter on it: fresh from ``lora_config``, or loaded from the folder ``adapter``.

        Raises:
            ModelLoadError: The adapter cannot be attached; the base model is left without one.
        """
        if not self.track_external(model, maker=None):
            raise ModelLoadError(f"no adapter on {type(model).__name__}: not a model that this package knows")
        key = value_key(lora_config, adapter, seed)
        if self._adapted is None or self._adapted.key != key or not self.show_adapted(FRESH):
            self.drop_adapter()
            with self._phase("attach adapter"):
                self._note_adapter(attach_adapter(model, backend_name, lora_config, adapter, seed), key)
        assert self._adapted is not None
        return self._adapted.slot.peft_model

    @contextmanager
    def full_precision(self, request: LoadRequest, backend_name: str) -> Iterator[Any]:
        """The same model without quantization, alone in memory and gone afterwards.

        Raises:
            CannotJudge: It does not fit.
            ModelLoadError: It cannot be loaded.
        """
        self.release()
        collect()
        refuse_if_too_big(request)
        self._notify(f"recording the full-precision reference of {request.source}")
        with no_progress_bars():
            model = _load(replace(request, quantization_config=None), backend_name)
        yield model

    def track_external(self, model: Any, maker: Hashable) -> bool:
        """Own a model that ``maker`` made: loaded by somebody else, or wrapped around the one held here.

        Returns:
            Whether it is a model that this package knows, and so can watch and restore.
        """
        from pytest_qvl.models.adapters import peft_layers
        from pytest_qvl.models.anatomy import UnknownModelError, anatomy

        held = self._adapted is not None and self._adapted.slot.attached
        if model is self.resident and held:
            return True
        try:
            parts = anatomy(model)
        except (UnknownModelError, AttributeError):
            return False
        if model is self._model and (held or not peft_layers(parts)):
            return True
        if parts.base is not self._model:
            self.release()
            self._hold(parts.base, key=None)
        self._adapted = None
        if parts.is_peft or peft_layers(parts):  # Transformers adds an adapter without a wrapper
            self._note_adapter(model, key=None)
            if self._base is not None:
                self._base.snapshot(maker)
        return True

    def usable_by(self, users: frozenset[Hashable]) -> bool:
        """Whether the base model is as loaded, or as one of ``users`` changed it."""
        return self._base is None or self._base.usable_by(users)

    def show_base(self) -> bool:
        """Take the adapter off, keeping its weights.

        Returns:
            Whether it is off; not if somebody put layers of PEFT into the model past this owner.
        """
        from pytest_qvl.models.adapters import peft_layers
        from pytest_qvl.models.anatomy import anatomy

        if self._model is None:
            return True
        if self._adapted is not None:
            self._adapted.detach()
        self._reset()
        return not peft_layers(anatomy(self._model))

    def show_adapted(self, version: Hashable) -> bool:
        """Put the adapter on, with the weights that ``version`` left (:data:`FRESH`: as attached).

        Returns:
            Whether it could be done; not if adapters were added or removed since.
        """
        if self._adapted is None or not self._adapted.show(version):
            return False
        self._reset()
        return True

    def snapshot_trained(self, trainer: Hashable) -> None:
        """Remember what ``trainer`` made of the model, so that it is not held against a test."""
        if self._adapted is not None:
            self._adapted.snapshot(trainer)
        if self._base is not None:
            self._base.snapshot(trainer)

    def latest(self, trainers: frozenset[Hashable]) -> Hashable:
        """Which of the trainers trained last; :data:`FRESH` if none of them did."""
        return FRESH if self._adapted is None else self._adapted.latest(trainers)

    def forget(self, trainer: Hashable) -> None:
        """Drop what ``trainer`` made: the adapter is loaded when next shown, a changed base fits nobody."""
        if self._base is not None:
            self._base.forget(trainer)
        if self._adapted is not None:
            self._adapted.forget(trainer)

    def adapter_changes(self) -> list[str]:
        """Names of adapter tensors that are not bitwise those of the shown version, or come or gone since."""
        return [] if self._adapted is None else self._adapted.changes()

    def restore_adapter(self) -> bool:
        """Put back the weights of the version that is shown; ``False`` if adapters were added or removed."""
        return self._adapted is None or self._adapted.restore()

    def base_changes(self) -> list[str]:
        """Names of base tensors that are not bitwise what they were when the model was loaded."""
        return [] if self._base is None else self._base.changes()

    def storages(self) -> frozenset[int]:
        """Addresses of the storages that the resident model is made of."""
        from pytest_qvl.models.anatomy import anatomy
        from pytest_qvl.models.quantized import base_tensors

        if self.resident is None:
            return frozenset()
        parts = anatomy(self.resident)
        tensors = (*base_tensors(parts), *parts.wrapped.named_parameters())
        return frozenset(tensor.untyped_storage().data_ptr() for _, tensor in tensors)

    def drop_adapter(self) -> None:
        """Detach the adapter and forget its weights."""
        if self._adapted is not None:
            self._adapted.detach()
        self._adapted = None

    def release(self) -> None:
        """Drop the model, its adapter and the backend's buffers, and free their memory."""
        if self._model is None:
            return
        self.free_buffers()
        self._adapted = None
        self._base = self._backend = self._base_key = None
        collect()

    def free_buffers(self) -> None:
        """Free what the backend keeps on the device beside the model."""
        if self._backend is not None:
            self._backend.free_buffers()

    def _hold(self, model: Any, key: Key | None) -> None:
        """Take a model for the resident one and remember its weights."""
        self._base, self._base_key = BaseWeights(model), key

    def _note_adapter(self, adapted: Any, key: Key | None) -> None:
        """Take an adapter for the one on the resident model and remember its weights."""
        self._adapted = AdapterVersions(adapted, key)
        self._reset()

    def _reset(self) -> None:
        """Put the model into the state tests start from: eval mode, no gradients, no positions of an earlier call."""
        from pytest_qvl.models.anatomy import anatomy
        from pytest_qvl.models.taps import forget_positions

        model = self.resident
        if model is not None:
            (self._backend or backend(BASELINE)).reset(model)
            model.zero_grad(set_to_none=True)
            forget_positions(anatomy(model))


def _load(request: LoadRequest, backend_name: str) -> Any:
    """Load a model, and refuse it if the checkpoint does not fill it or a layer cannot compute."""
    from pytest_qvl.models.sources.loading import refuse_unfit

    model = backend(backend_name).load(request)
    refuse_unfit(model)
    return model
