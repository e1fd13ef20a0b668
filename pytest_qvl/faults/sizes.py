"""How many layers a model has: a fault's expected words count them, and every model has its own number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_PLACE = re.compile(r"\{(\w+)\}")
# Linear layers of one language layer of every Qwen-VL: q, k, v, o, gate, up, down.
PER_LAYER = 7


@dataclass(frozen=True)
class Sizes:
    """What expected words may name in braces: ``"{language} of {language} linears"``.

    Attributes:
        layers: Language layers.
        language: Linears of the language backbone.
        vision: Linears of the vision tower, without the merger.
        merger: Linears of the merger, or mergers.
        vision_mlp: Linears of the tower that share a name with linears of the language backbone.
        merger_tensors: Parameters of the merger.
        dtype: Of everything that is not quantized.
        attending: Number of the first language layer that is attention over keys and values.
    """

    layers: int
    language: int
    vision: int
    merger: int
    vision_mlp: int
    merger_tensors: int
    dtype: str = "bfloat16"
    attending: int = 0

    @property
    def adapter(self) -> int:
        """Tensors of an adapter on every language linear: an A and a B each."""
        return 2 * self.language

    @property
    def beyond_two_layers(self) -> int:
        """Language linears of all layers but the first two."""
        return PER_LAYER * (self.layers - 2)

    @property
    def without_qkv(self) -> int:
        """Language linears that are not q, k or v."""
        return (PER_LAYER - 3) * self.layers

    def fill(self, words: Iterable[str]) -> tuple[str, ...]:
        """The words with this model's numbers in place of the names in braces.

        Raises:
            AttributeError: A name in braces is none of these sizes.
        """
        return tuple(_PLACE.sub(lambda place: str(getattr(self, place[1])), one) for one in words)


# The embedded model's; a test holds them to it. Explaining a fault needs no torch.
EMBEDDED = Sizes(layers=4, language=28, vision=20, merger=2, vision_mlp=12, merger_tensors=5)


def sizes_of(model: Any, dtype: str = "bfloat16") -> Sizes:
    """The sizes of a model, wrapped or not, that was loaded in `dtype`."""
    from pytest_qvl.faults.definitions.adapters import SEVEN
    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.models.layers import language_layers

    parts = anatomy(model)
    names = [name for name, _ in parts.named_linears()]
    groups = [parts.group_of(name) for name in names]
    layers: Any = parts.language_backbone.layers
    shared = [n for n, g in zip(names, groups, strict=True) if g == "vision" and n.rpartition(".")[2] in SEVEN]
    return Sizes(
        layers=len(layers),
        language=groups.count("language"),
        vision=groups.count("vision"),
        merger=groups.count("merger"),
        vision_mlp=len(shared),
        merger_tensors=len(list(parts.merger.parameters())),
        dtype=dtype,
        attending=next(layer.number for layer in language_layers(parts) if layer.attends),
    )
