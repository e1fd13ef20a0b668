"""LoRA adapters on a model: attach in place, take off again, put back, switch off, list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.anatomy import Parts, anatomy

if TYPE_CHECKING:
    import torch
    from torch import nn


ADAPTER_FILE = "adapter_model.safetensors"
# The regular expression of every linear layer of the language backbone, and of nothing else.
LANGUAGE_ONLY = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_PEFT_MARKS = ("peft_config", "_hf_peft_config_loaded")


def adapted_layers(parts: Parts) -> dict[str, Any]:
    """PEFT's tuner layers by dotted name in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in parts.base.named_modules() if isinstance(m, BaseTunerLayer)}


def adapter_parameters(parts: Parts) -> dict[str, nn.Parameter]:
    """Every adapter parameter by dotted name in the base model, of all adapters, active or not."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in adapted_layers(parts).items():
        own = set(layer.adapter_layer_names)
        for key, parameter in layer.named_parameters():
            if key.split(".")[0] in own:
                found[f"{name}.{key}"] = parameter
    return found


def active_adapters(parts: Parts) -> tuple[str, ...]:
    """Names of the adapters that take part in a forward now; empty when none is attached or all are switched off."""
    layer = next(iter(adapted_layers(parts).values()), None)
    if layer is None or layer.disable_adapters:
        return ()
    return tuple(layer.active_adapters)


def chosen_adapter(parts: Parts) -> str:
    """Name of the adapter that is active, or would be if adapters were not switched off; empty without one."""
    layer = next(iter(adapted_layers(parts).values()), None)
    return "" if layer is None else str(layer.active_adapters[0])


def name_on_disk(name: str, adapter: str) -> str:
    """The name under which PEFT saves an adapter tensor, less its prefix and a closing ``.weight``.

    PEFT leaves the adapter's name out; where it keeps ``.weight`` depends on the kind of tensor.
    """
    bare = name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
    return bare.removesuffix(".weight")


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, on the CPU, named as :func:`name_on_disk` does."""
    from safetensors.torch import load_file

    loaded: dict[str, torch.Tensor] = load_file(folder / ADAPTER_FILE)
    return {name.removeprefix("base_model.model.").removesuffix(".weight"): value for name, value in loaded.items()}


def save_adapter(model: Any, folder: Path) -> None:
    """Save the active adapter of a PEFT model the way training scripts do, the embeddings left out."""
    adapter = chosen_adapter(anatomy(model))
    model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False, safe_serialization=True)


@contextmanager
def adapters_disabled(parts: Parts) -> Iterator[None]:
    """Switch every adapter off without touching ``requires_grad``, and put each layer back as it was.

    PEFT's own ``disable_adapter`` re-enables gradients of all adapters on leaving, also of those that were frozen.
    """
    layers = list(adapted_layers(parts).values())
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


@dataclass
class AdapterSlot:
    """One LoRA-wrapped view of a base model that can be taken off and put back with its weights.

    ``PeftModel.unload`` throws the adapter away; a trained adapter that a user's module fixture holds must survive a
    base-only test in between.

    Attributes:
        peft_model: The wrapper that tests see.
        layers: Tuner layer with its place: parent module, attribute name.
        attached: Whether the base model now runs through the tuner layers.
        marks: What PEFT noted on the base model, while the adapter is off.
    """

    peft_model: Any
    layers: list[tuple[Any, str, Any]]
    attached: bool = True
    marks: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, peft_model: Any) -> AdapterSlot:
        """Note where PEFT put its tuner layers."""
        parts = anatomy(peft_model)
        places = []
        for name, layer in adapted_layers(parts).items():
            parent, _, child = name.rpartition(".")
            places.append((parts.base.get_submodule(parent) if parent else parts.base, child, layer))
        return cls(peft_model, places)

    @property
    def _base(self) -> Any:
        return self.peft_model.base_model.model

    def take_off(self) -> None:
        """Let the base model run on its own layers; the adapter's weights stay in this slot."""
        for parent, child, layer in self.layers:
            setattr(parent, child, layer.get_base_layer())
        self.marks = {name: vars(self._base).pop(name) for name in _PEFT_MARKS if name in vars(self._base)}
        self.attached = False

    def put_back(self) -> None:
        """Let the base model run through the adapter again."""
        for parent, child, layer in self.layers:
            setattr(parent, child, layer)
        vars(self._base).update(self.marks)
        self.attached = True
