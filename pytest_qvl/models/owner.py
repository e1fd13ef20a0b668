"""The one owner of the model: loads once, attaches and detaches LoRA in place, serves no stale state.

At most one base model is resident. What is resident is keyed by the *values* of the configurations that made
it: two folders with different LoRA configurations, or a base-only test after a LoRA test, each get their own.
"""

from __future__ import annotations

import copy
import gc
import json
import warnings
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.backends import BASELINE, Backend, LoadRequest, ModelLoadError, backend
from pytest_qvl.models.fingerprint.digests import Fingerprint
from pytest_qvl.models.sources.hub import model_folder
from pytest_qvl.models.sources.model_source import parameter_count

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    import torch

    from pytest_qvl.models.adapters import AdapterSlot

Key = str
FRESH = None
GIB = 2**30
_UNKNOWN = object()


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


@dataclass(frozen=True)
class _Version:
    """Adapter weights that somebody made.

    Attributes:
        weights: CPU copies by parameter name.
        digests: Of the same, to see cheaply that nothing changed.
    """

    weights: dict[str, torch.Tensor]
    digests: dict[str, int]


@dataclass
class _Adapted:
    """The adapter on the resident base model.

    Attributes:
        key: Values of LoRA configuration, adapter folder and seed; ``None`` if somebody else attached it.
        slot: The PEFT wrapper and its layers.
        versions: What the adapter held, by who trained it, in the order of training, :data:`FRESH` first.
        current: Which version the adapter holds now.
    """

    key: Key | None
    slot: AdapterSlot
    versions: dict[Hashable, _Version] = field(default_factory=dict)
    current: Hashable = FRESH


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
        self._model: Any = None
        self._backend: Backend | None = None
        self._adapted: _Adapted | None = None
        self._pristine: dict[str, int] = {}
        self._changed_by: Hashable = None
        self._new_fingerprints()

    @property
    def resident(self) -> Any:
        """The wrapped model if an adapter is on it, else the base model, else ``None``."""
        if self._adapted is not None and self._adapted.slot.attached:
            return self._adapted.slot.peft_model
        return self._model

    def base(self, request: LoadRequest, backend_name: str) -> Any:
        """The base model without an adapter, loading it if what is resident was made from other values.

        Raises:
            ModelLoadError: It cannot be loaded.
            ValueError: No such backend.
        """
        key = value_key(str(request.source), request.quantization_config, request.device, request.dtype, backend_name)
        if key != self._base_key or self._changed_by is not None or not self.show_base():
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
                self._note_adapter(self._attach(model, backend_name, lora_config, adapter, seed), key)
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
            self._snapshot_base(maker)
        return True

    def usable_by(self, users: frozenset[Hashable]) -> bool:
        """Whether the base model is as loaded, or as one of ``users`` changed it."""
        return self._changed_by is None or self._changed_by in users

    def show_base(self) -> bool:
        """Take the adapter off, keeping its weights.

        Returns:
            Whether it is off; not if somebody put layers of PEFT into the model past this owner.
        """
        from pytest_qvl.models.adapters import peft_layers
        from pytest_qvl.models.anatomy import anatomy

        if self._model is None:
            return True
        if self._adapted is not None and self._adapted.slot.attached:
            self._adapted.slot.detach()
        self._reset()
        return not peft_layers(anatomy(self._model))

    def show_adapted(self, version: Hashable) -> bool:
        """Put the adapter on, with the weights that ``version`` left (:data:`FRESH`: as attached).

        Returns:
            Whether it could be done; not if adapters were added or removed since.
        """
        if self._adapted is None:
            return False
        if not self._adapted.slot.attached:
            self._adapted.slot.attach()
        if version != self._adapted.current and not self._load_version(version):
            return False
        self._reset()
        return True

    def snapshot_trained(self, trainer: Hashable) -> None:
        """Remember what ``trainer`` made of the model, so that it is not held against a test."""
        if self._model is None:
            return
        if self._adapted is not None and self.adapter_changes():
            self._adapted.versions.pop(trainer, None)
            self._adapted.versions[trainer] = self._version()
            self._adapted.current = trainer
        self._snapshot_base(trainer)

    def latest(self, trainers: frozenset[Hashable]) -> Hashable:
        """Which of the trainers trained last; :data:`FRESH` if none of them did."""
        versions = () if self._adapted is None else reversed(self._adapted.versions)
        return next((version for version in versions if version in trainers), FRESH)

    def forget(self, trainer: Hashable) -> None:
        """Drop what ``trainer`` made: the adapter is loaded when next shown, a changed base fits nobody."""
        if self._changed_by == trainer:
            self._changed_by = _UNKNOWN
        if self._adapted is not None:
            self._adapted.versions.pop(trainer, None)
            if self._adapted.current == trainer:
                self._adapted.current = _UNKNOWN

    def adapter_changes(self) -> list[str]:
        """Names of adapter tensors that are not bitwise those of the shown version, or come or gone since."""
        if self._adapted is None or not self._adapted.slot.attached or self._adapted.current is _UNKNOWN:
            return []
        return _differences(self._adapted.versions[self._adapted.current].digests, self._adapter_digests())

    def restore_adapter(self) -> bool:
        """Put back the weights of the version that is shown; ``False`` if adapters were added or removed."""
        return self._adapted is None or self._load_version(self._adapted.current)

    def base_changes(self) -> list[str]:
        """Names of base tensors that are not bitwise what they were when the model was loaded."""
        return _differences(self._pristine, self._base_digests())

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
        """Take the adapter off for good."""
        if self._adapted is not None and self._adapted.slot.attached:
            self._adapted.slot.detach()
        self._adapted = None

    def release(self) -> None:
        """Drop everything and give the memory back."""
        if self._model is None:
            return
        self.free_buffers()
        self._adapted = None
        self._model = self._backend = None
        self._base_key = None
        self._pristine = {}
        self._changed_by = None
        self._new_fingerprints()
        collect()

    def free_buffers(self) -> None:
        """Let go of what the backend keeps on the device beside the model."""
        if self._backend is not None:
            self._backend.free_buffers()

    def _new_fingerprints(self) -> None:
        """Kept from test to test, because base and adapter are read after every one."""
        self._base_fingerprint = Fingerprint()
        self._adapter_fingerprint = Fingerprint()

    def _hold(self, model: Any, key: Key | None) -> None:
        from pytest_qvl.models.quantized import keep_quantized_weights_in_place

        # A first forward must not change the model: the test that runs it would be named for it.
        keep_quantized_weights_in_place(model)
        cast_quantized_biases(model)
        self._model, self._base_key = model, key
        self._pristine = self._base_digests()

    def _snapshot_base(self, maker: Hashable) -> None:
        now = self._base_digests()
        if now != self._pristine:
            self._pristine, self._changed_by = now, maker

    def _attach(self, model: Any, backend_name: str, lora_config: Any, adapter: str | None, seed: int) -> AdapterSlot:
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

    def _note_adapter(self, adapted: Any, key: Key | None) -> None:
        from pytest_qvl.models.adapters import AdapterSlot

        slot = adapted if isinstance(adapted, AdapterSlot) else AdapterSlot.of(adapted)
        self._adapted = _Adapted(key, slot)
        self._adapted.versions[FRESH] = self._version()
        self._reset()

    def _reset(self) -> None:
        """The state every test starts from: eval mode, no gradients, no positions of an earlier call."""
        from pytest_qvl.models.anatomy import anatomy
        from pytest_qvl.models.taps import forget_positions

        model = self.resident
        if model is not None:
            (self._backend or backend(BASELINE)).reset(model)
            model.zero_grad(set_to_none=True)
            forget_positions(anatomy(model))

    def _adapter_parameters(self) -> dict[str, Any]:
        from pytest_qvl.models.adapters import adapter_parameters
        from pytest_qvl.models.anatomy import anatomy
        from pytest_qvl.models.training import trained_copies

        assert self._adapted is not None
        parts = anatomy(self._adapted.slot.peft_model)
        return {**adapter_parameters(parts), **trained_copies(parts)}

    def _adapter_digests(self) -> dict[str, int]:
        return self._adapter_fingerprint.read(self._adapter_parameters().items())

    def _base_digests(self) -> dict[str, int]:
        """Digests under the names that the tensors have without PEFT, whatever PEFT has wrapped by now."""
        from pytest_qvl.models.anatomy import anatomy
        from pytest_qvl.models.quantized import base_tensors

        return self._base_fingerprint.read(base_tensors(anatomy(self._model)))

    def _version(self) -> _Version:
        weights = {n: p.detach().to("cpu", copy=True) for n, p in self._adapter_parameters().items()}
        return _Version(weights, self._adapter_digests())

    def _load_version(self, version: Hashable) -> bool:
        import torch

        assert self._adapted is not None
        parameters = self._adapter_parameters()
        stored = self._adapted.versions.get(version)
        if stored is None or parameters.keys() != stored.weights.keys():
            return False
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored.weights[name])
        self._adapted.current = version
        return True


def _load(request: LoadRequest, backend_name: str) -> Any:
    """Load a model, and refuse it if the checkpoint does not fill it or a layer cannot compute."""
    from pytest_qvl.models.sources.loading import refuse_unfit

    model = backend(backend_name).load(request)
    refuse_unfit(model)
    return model


def _differences(before: dict[str, int], now: dict[str, int]) -> list[str]:
    names = [*before, *(name for name in now if name not in before)]
    return [name for name in names if before.get(name) != now.get(name)]


def cast_quantized_biases(model: Any) -> None:
    """Cast the biases of 4-bit layers to the compute dtype, as their first forward would do in place.

    It does so where the dtypes differ (``Linear4bit.forward`` in bitsandbytes).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.bias is not None and module.compute_dtype is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """No progress bars while something is loaded: a failing test would show them in its captured output."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where an environment variable fixes the bars, each switch would warn
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def refuse_if_too_big(request: LoadRequest) -> None:
    """Refuse to load in full precision what cannot fit.

    Raises:
        CannotJudge: The weights alone need more than is free; says how much.
    """
    import torch

    folder = model_folder(request.source)
    if folder is None:
        return
    needed = parameter_count(folder) * getattr(torch, request.dtype).itemsize
    free = torch.cuda.mem_get_info()[0] if request.device == "cuda" else _free_memory()
    if free is not None and needed > free:
        raise CannotJudge(
            f"the full-precision reference of {request.source} needs {needed / GIB:.1f} GiB for its weights "
            f"alone, {free / GIB:.1f} GiB are free on {request.device}"
        )


def _free_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; ``None`` where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else int(kib) * 1024


def collect() -> None:
    """Free what Python and the CUDA allocator still hold of dropped models."""
    import torch

    gc.collect()
    # Asking is_available() would fix CUDA's devices, before a lease may have chosen one.
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        cuda.empty_cache()
