"""The full-precision model that a reference is recorded from: the tested one, dequantized or not, or a named one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.sources.hub import hub_options, saved_quantization
from pytest_qvl.models.sources.model_source import DEQUANTIZED, ModelSource, ModelSourceError
from pytest_qvl.models.sources.released import released_config

if TYPE_CHECKING:
    from pytest_qvl.models.backends import LoadRequest


@dataclass(frozen=True)
class ReferenceBase:
    """The model that a reference is recorded from.

    Attributes:
        request: Loads it in full precision.
        name: What to call it in findings; empty for the tested model itself.
        caveat: What a comparison with it cannot show; empty for nothing.
    """

    request: LoadRequest
    name: str = ""
    caveat: str = ""


def reference_request(tested: LoadRequest, named: ModelSource | None) -> ReferenceBase:
    """How to load the full-precision model that the tested one is compared with.

    Args:
        tested: How the model under test is loaded.
        named: A 16-bit model to take instead (``--qvl-reference-model``).

    Raises:
        ModelSourceError: The named model is saved in 4 bits itself, or is of another architecture.
    """
    full = replace(tested, quantization_config=None)
    if named is not None and named != tested.source:
        _refuse_other(tested.source, named)
        return ReferenceBase(replace(full, source=named), f"full precision of {named}")
    if saved_quantization(tested.source) is not None:
        return ReferenceBase(full, "the 4-bit checkpoint, dequantized", f"the reference is {DEQUANTIZED}")
    return ReferenceBase(full)


def _refuse_other(tested: ModelSource, named: ModelSource) -> None:
    if saved_quantization(named) is not None:
        raise ModelSourceError(f"reference model {str(named)!r} is itself saved in 4 bits; name the 16-bit model")
    ours, theirs = _sizes(tested), _sizes(named)
    other = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if other:
        raise ModelSourceError(
            f"reference model {str(named)!r} is not the base of {str(tested)!r}: {', '.join(other)}; name the 16-bit "
            "model that the tested one was made from"
        )


def _sizes(source: ModelSource) -> dict[str, Any]:
    """What models of one architecture have in common; the vocabulary may be padded, so it is left out."""
    config = _config(source)
    text, vision = config.get_text_config(), config.vision_config
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vision depth": vision.depth,
    }


def _config(source: ModelSource) -> Any:
    if source.kind == "synthetic":
        return released_config(source.location)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source.location, **hub_options(source))
