"""LoRA adapters on a model: list, switch off, take off and put back, save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
LANGUAGE_ONLY = (
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    r"|in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|out_proj)"
)
_PEFT_MARKS = ("peft_config", "_hf_peft_config_loaded")


def adapted_layers(parts: Parts) -> dict[str, Any]:
    """PEFT's tuner layers by dotted name in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in parts.base.named_modules() if isinstance(m, BaseTunerLayer)}


def adapter_parameters(parts: Parts) -> dict[str, nn.Parameter]:
    """Every adapter parameter by dotted name in the base model, of all adapters, active or not.

    Of every kind that PEFT knows: each of its layers names what it has added, to be trained (``adapter_layer_names``)
    or beside that (``other_param_names``: AdaLoRA's ranks, which PEFT leaves trainable once it has moved or cast them).
    """
    found: dict[str, nn.Parameter] = {}
    for name, layer in adapted_layers(parts).items():
        own = {*layer.adapter_layer_names, *layer.other_param_names}
        for key, parameter in layer.named_parameters():
            if key.split(".")[0] in own:
                found[f"{name}.{key}"] = parameter
    return found


def auxiliary_layers(parts: Parts) -> dict[str, Any]:
    """PEFT's wrappers around modules that it trains in full or in part, by dotted name in the base model.

    They stand for ``modules_to_save`` and ``trainable_token_indices``.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {n: m for n, m in parts.base.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}


def adapter_configs(parts: Parts) -> dict[str, Any]:
    """The configuration of each adapter on the model, by the adapter's name; empty while they are taken off."""
    configs = vars(parts.base).get("peft_config")
    if configs is None and parts.is_peft:
        configs = parts.wrapped.peft_config
    return dict(configs or {})


@contextmanager
def orthogonality_penalty_off(parts: Parts) -> Iterator[None]:
    """Keep AdaLoRA's penalty on A and B that are not orthogonal (``orth_reg_weight``) out of the loss.

    PEFT adds it in ``AdaLoraModel.forward``, so of a model of a task type only: a plain ``PeftModel`` goes past that.
    Times zero it is no part of the loss in either, and no matrix has a gradient of it that is not zero or not finite.
    """
    configs = [config for config in adapter_configs(parts).values() if hasattr(config, "orth_reg_weight")]
    before = [config.orth_reg_weight for config in configs]
    try:
        for config in configs:
            config.orth_reg_weight = 0.0
        yield
    finally:
        for config, weight in zip(configs, before, strict=True):
            config.orth_reg_weight = weight


def active_adapters(parts: Parts) -> tuple[str, ...]:
    """Names of the adapters that take part in a forward now; empty when none is attached or all are switched off."""
    layers = adapted_layers(parts).values()
    return tuple(dict.fromkeys(n for layer in layers if not layer.disable_adapters for n in layer.active_adapters))


def is_merged(parts: Parts) -> bool:
    """Whether an adapter is merged into the weights of a layer that it adapts."""
    return any(layer.merged for layer in adapted_layers(parts).values())


def chosen_adapter(parts: Parts) -> str:
    """Name of the adapter that is active, or would be if adapters were not switched off; empty without one.

    The first where several are active, and the one attached first where none is.
    """
    chosen = (str(name) for layer in adapted_layers(parts).values() for name in layer.active_adapters)
    return next(chosen, next(iter(adapter_configs(parts)), ""))


def adapter_tensors(parts: Parts, adapter: str) -> dict[str, nn.Parameter]:
    """Tensors of one adapter, its trained copies and token rows among them, by their names on disk.

    The name on disk is PEFT's, less its prefix and a closing ``.weight``, since where PEFT keeps that depends on the
    kind of tensor. It does not hold the adapter's name, which may be any that a module can have: ``default``, ``vlm``,
    ``step-500``, even ``weight``. It is therefore made from where a tensor is, and not by cutting the name out.
    """
    found: dict[str, nn.Parameter] = {}
    for name, layer in adapted_layers(parts).items():
        if getattr(layer, "tied_adapter", None) is not None:
            continue  # another layer's rows, saved with that one
        for kind in layer.adapter_layer_names:
            found |= _entries(f"{name}.{kind}", getattr(layer, kind, None), adapter)
    for name, wrapper in auxiliary_layers(parts).items():
        found |= _entries(name, getattr(wrapper, "modules_to_save", None), adapter)
    return found


def _entries(name: str, holder: Any, adapter: str) -> dict[str, nn.Parameter]:
    from torch import nn

    if not isinstance(holder, nn.ModuleDict | nn.ParameterDict) or adapter not in holder:
        return {}
    entry: Any = holder[adapter]
    if isinstance(entry, nn.Parameter):
        return {name: entry}
    return {f"{name}.{key}".removesuffix(".weight"): parameter for key, parameter in entry.named_parameters()}


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, on the CPU, named as :func:`adapter_tensors` does."""
    from safetensors.torch import load_file

    loaded: dict[str, torch.Tensor] = load_file(folder / ADAPTER_FILE)
    return {name.removeprefix("base_model.model.").removesuffix(".weight"): value for name, value in loaded.items()}


def save_adapter(model: Any, folder: Path) -> Path:
    """Save the active adapter the way training scripts do, the embeddings left out.

    Returns:
        Where its files are: PEFT saves every adapter that is not called ``default`` in a folder of its name inside
        `folder`. What ``model.add_adapter`` of Transformers made is saved by Transformers, in `folder` itself.
    """
    parts = anatomy(model)
    if not parts.is_peft:
        model.save_pretrained(folder)
        return folder
    adapter = chosen_adapter(parts)
    model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False, safe_serialization=True)
    return folder if adapter == "default" else folder / adapter


@contextmanager
def adapters_disabled(parts: Parts) -> Iterator[None]:
    """Switch every adapter off without touching ``requires_grad``, and put each layer back as it was.

    Copies and token rows that PEFT trains beside the adapter are off too, so that the model computes with the base
    model's own weights. PEFT's own ``disable_adapter`` re-enables gradients of all adapters on leaving, also of those
    that were frozen.
    """
    with _switched_off([*adapted_layers(parts).values(), *auxiliary_layers(parts).values()]):
        yield


@contextmanager
def copies_disabled(parts: Parts) -> Iterator[None]:
    """Let trained copies (``modules_to_save``) and token rows rest inside the block, and the adapters work."""
    beside = auxiliary_layers(parts)
    inside = [layer for name, layer in adapted_layers(parts).items() if _is_inside(name, beside)]
    with _switched_off([*beside.values(), *inside]):
        yield


@contextmanager
def _switched_off(layers: list[Any]) -> Iterator[None]:
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def _is_inside(name: str, outer: Iterable[str]) -> bool:
    return any(name.startswith(f"{one}.") for one in outer)


def peft_layers(parts: Parts) -> dict[str, Any]:
    """Everything that PEFT has put in place of a module of the base model, by that module's dotted name."""
    return {name: module for name, module in _places(parts.base) if _is_of_peft(module)}


def base_modules(parts: Parts) -> dict[str, nn.Module]:
    """Every module of the base model by the dotted name that it has without PEFT, whatever PEFT has wrapped by now."""
    return {name: original_module(module) for name, module in _places(parts.base)}


def original_module(module: Any) -> Any:
    """The base model's own module that a layer of PEFT stands in place of; any other module itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if _is_of_peft(module) else module


def _is_of_peft(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _places(module: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every module of the base model by dotted name, a layer of PEFT where one stands; what PEFT added is left out."""
    yield name, module
    for key, child in original_module(module).named_children():
        yield from _places(child, f"{name}.{key}" if name else key)


def remove_peft_layers(model: Any) -> None:
    """Put every module of the base model back in its place, also after an attachment that failed half way."""
    base = anatomy(model).base
    for name, layer in peft_layers(anatomy(model)).items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, original_module(layer))
    for mark in _PEFT_MARKS:
        vars(base).pop(mark, None)


@dataclass
class AdapterSlot:
    """One adapted view of a base model that can be detached and attached again with its weights.

    ``PeftModel.unload`` throws the adapter away; a trained adapter that a user's module fixture holds must survive a
    base-only test in between.

    Attributes:
        peft_model: The wrapper that tests see; the base model itself where Transformers' ``add_adapter`` was used.
        base: The base model, which some wrappers cannot find while they are off.
        layers: What PEFT put into the base model, by the dotted name of the module that it replaces, with its place:
            parent module, attribute name, layer.
        attached: Whether the base model now runs through the adapter's layers.
        marks: What PEFT noted on the base model, while the adapter is off.
        unfrozen: Parameters of the base model that are trained with the adapter (its ``bias``), while it is off.
    """

    peft_model: Any
    base: Any
    layers: dict[str, tuple[Any, str, Any]]
    attached: bool = True
    marks: dict[str, Any] = field(default_factory=dict)
    unfrozen: list[nn.Parameter] = field(default_factory=list)

    @classmethod
    def of(cls, peft_model: Any) -> AdapterSlot:
        """A slot for a model whose adapter is attached: notes which modules of the base model PEFT replaced."""
        parts = anatomy(peft_model)
        places = {}
        for name, layer in peft_layers(parts).items():
            parent, _, child = name.rpartition(".")
            places[name] = (parts.base.get_submodule(parent), child, layer)
        return cls(peft_model, parts.base, places)

    def detach(self) -> None:
        """Let the base model run on its own modules; the adapter's weights stay in this slot."""
        for parent, child, layer in self.layers.values():
            setattr(parent, child, original_module(layer))
        noted = vars(self.base)
        self.marks = {name: noted.pop(name) for name in _PEFT_MARKS if name in noted}
        self.unfrozen = [parameter for parameter in self.base.parameters() if parameter.requires_grad]
        for parameter in self.unfrozen:
            parameter.requires_grad_(False)
        self.attached = False

    def attach(self) -> None:
        """Let the base model run through the adapter's layers again, after :meth:`detach`."""
        for parent, child, layer in self.layers.values():
            setattr(parent, child, layer)
        vars(self.base).update(self.marks)
        for parameter in self.unfrozen:
            parameter.requires_grad_(True)
        self.attached = True
