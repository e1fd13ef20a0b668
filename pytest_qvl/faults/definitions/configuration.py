"""Values that decide arithmetic and are not those of ``config.json``: nothing raises, answers get worse."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import all_of, attribute, values
from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case


def _settings(case: Case, name: str, change: Callable[[Any], Any], where: Callable[[str], bool]) -> Any:
    """Change an attribute of every module of the base model that has it and whose name is meant."""
    modules = base_modules(anatomy(case.model))
    meant = [m for n, m in modules.items() if where(n) and getattr(m, name, None) is not None]
    return all_of([attribute(module, name, change(getattr(module, name))) for module in meant])


@fault(
    "epsilon-of-the-tower",
    "The norms of the vision tower add 1e-2 instead of 1e-6.",
    target="model",
    check="weights_as_stored",
    expected_words=("not as config.json has it", "blocks.0.norm1: epsilon is 0.01 instead of 1e-06"),
)
def _epsilon(case: Case) -> Iterator[None]:
    def tower(name: str) -> bool:
        return name.startswith("model.visual")

    with _settings(case, "variance_epsilon", lambda _: 1e-2, tower), _settings(case, "eps", lambda _: 1e-2, tower):
        yield


@fault(
    "epsilon-of-the-language-layers",
    "The norms of the language layers add ten times what the checkpoint says, another library's default.",
    target="model",
    check="weights_as_stored",
    expected_words=(
        "layers.0.input_layernorm: epsilon is",
        "not as config.json has it",
    ),
)
def _language_epsilon(case: Case) -> Iterator[None]:
    with language_epsilon_times(case, 10):
        yield


def language_epsilon_times(case: Case, times: float) -> AbstractContextManager[None]:
    """Give every norm of the language layers another eps, as an attribute of its module."""

    def language(name: str) -> bool:
        return "language_model" in name

    names = ("variance_epsilon", "eps")
    return all_of([_settings(case, name, lambda epsilon: times * epsilon, language) for name in names])


@fault(
    "mrope-section-moved",
    "M-RoPE divides a head's frequencies among time, height and width otherwise: one more for width.",
    target="model",
    check="weights_as_stored",
    expected_words=("mrope_section is [", "not as config.json has it"),
)
def _sections(case: Case) -> Iterator[None]:
    with sections_changed(case, lambda section: width_for_height(section, 1)):
        yield


def width_for_height(section: Sequence[int], count: int) -> list[int]:
    """M-RoPE's sections (time, height, width) with so many frequencies of the height given to the width."""
    time, height, width = section
    return [time, height - count, width + count]


@contextmanager
def sections_changed(case: Case, change: Callable[[Sequence[int]], list[int]]) -> Iterator[None]:
    """Pass M-RoPE's sections (time, height, width) through ``change``, wherever this release reads them."""
    parts = anatomy(case.model)
    rotary: Any = parts.language_backbone.rotary_emb
    changes = []
    if hasattr(rotary, "mrope_section"):
        changes.append(attribute(rotary, "mrope_section", change(rotary.mrope_section)))
    for attention in (layer.attention for layer in language_layers(parts)):
        for name in ("rope_scaling", "rope_parameters"):  # where some releases read them
            kept = getattr(attention, name, None) or {}
            if section := kept.get("mrope_section"):
                changes.append(attribute(attention, name, {**kept, "mrope_section": change(section)}))
    with all_of(changes):
        yield


@contextmanager
def _rotary_base(case: Case, factor: float) -> Iterator[None]:
    rotary: Any = anatomy(case.model).language_backbone.rotary_emb

    def other(frequencies: torch.Tensor) -> torch.Tensor:
        import torch

        share = torch.arange(len(frequencies), device=frequencies.device) / len(frequencies)
        return frequencies * factor**-share

    with values(rotary.inv_freq, other):
        yield


@fault(
    "rotary-base-10-percent-off",
    "The rotary base of the language model is 10 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=("rotary_emb.inv_freq[1] is", "as of a rotary base of"),
)
def _base(case: Case) -> Iterator[None]:
    with _rotary_base(case, 1.1):
        yield


@fault(
    "rotary-base-times-1000",
    "The rotary base of the language model is a thousand times too large: another release's default.",
    target="model",
    check="weights_as_stored",
    expected_words=("rotary_emb.inv_freq[1] is", "as of a rotary base of"),
)
def _base_thousand(case: Case) -> Iterator[None]:
    with _rotary_base(case, 1000.0):
        yield


@fault(
    "frequencies-in-bfloat16",
    "The whole model was cast after it was loaded, rotary frequencies included: positions beyond 256 blur.",
    target="model",
    check="weights_as_stored",
    expected_words=("rotary_emb.inv_freq is bfloat16 instead of float32", ".half() or .to(dtype)"),
)
def _coarse(case: Case) -> Iterator[None]:
    rotary: Any = anatomy(case.model).language_backbone.rotary_emb
    frequencies = rotary.inv_freq
    rotary.inv_freq = frequencies.bfloat16()
    try:
        yield
    finally:
        rotary.inv_freq = frequencies


@fault(
    "attention-scaling-5-percent-off",
    "Attention scores of the language layers are 5 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=("layers.{attending}.self_attn.scaling is",),
)
def _scaling(case: Case) -> Iterator[None]:
    with _settings(case, "scaling", lambda s: s * 1.05, lambda n: "language_model" in n and n.endswith("self_attn")):
        yield


@fault(
    "vision-scaling-5-percent-off",
    "Attention scores of the vision tower are 5 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=("blocks.0.attn.scaling is",),
)
def _vision_scaling(case: Case) -> Iterator[None]:
    with _settings(case, "scaling", lambda scaling: scaling * 1.05, lambda name: name.endswith(".attn")):
        yield
