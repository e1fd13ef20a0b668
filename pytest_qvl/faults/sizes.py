"""What a fault's expected words count and name: every model has its own numbers, and every family its own names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_PLACE = re.compile(r"\{(\w+)\}")
# Linears of a language layer behind its attention or mixer, whose output included: output, gate, up, down.
_BEHIND_INPUTS = 4


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
        mixers: Language layers of linear attention, which stands in the place of attention (Qwen3.5).
        first_two: Linears of the first two language layers.
        first_input: Name, in the first language layer, of the first linear that attention or mixer hands its input to.
        first_output: Name, in the first language layer, of the linear behind attention or mixer.
        merger_last: Name, in the merger, of its last linear.
        tower_up: Name, in a vision block, of its MLP's linear before the activation, without a gate's.
        tower_down: Name, in a vision block, of its MLP's last linear.
    """

    layers: int
    language: int
    vision: int
    merger: int
    vision_mlp: int
    merger_tensors: int
    dtype: str = "bfloat16"
    attending: int = 0
    mixers: int = 0
    first_two: int = 14
    first_input: str = "self_attn.q_proj"
    first_output: str = "self_attn.o_proj"
    merger_last: str = "mlp.2"
    tower_up: str = "mlp.up_proj"
    tower_down: str = "mlp.down_proj"

    @property
    def adapter(self) -> int:
        """Tensors of an adapter on every language linear: an A and a B each."""
        return 2 * self.language

    @property
    def beyond_two_layers(self) -> int:
        """Language linears of all layers but the first two."""
        return self.language - self.first_two

    @property
    def behind_inputs(self) -> int:
        """Language linears that attention or mixer does not hand its input to."""
        return _BEHIND_INPUTS * self.layers

    @property
    def with_attention(self) -> int:
        """Language layers that are attention over keys and values."""
        return self.layers - self.mixers

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
    from pytest_qvl.models.adapters import base_modules, original_module
    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.models.layers import language_layers, mergers, vision_blocks

    parts = anatomy(model)
    places = {id(module): name for name, module in base_modules(parts).items()}

    def within(owner: str, linear: Any) -> str:
        return places[id(original_module(linear))].removeprefix(f"{owner}.")

    names = [name for name, _ in parts.named_linears()]
    groups = [parts.group_of(name) for name in names]
    layers, block, merger = language_layers(parts), vision_blocks(parts)[0], next(mergers(parts))
    first, start = layers[0], tuple(f"{layer.name}." for layer in layers[:2])
    shared = [n for n, g in zip(names, groups, strict=True) if g == "vision" and n.rpartition(".")[2] in SEVEN]
    return Sizes(
        layers=len(layers),
        language=groups.count("language"),
        vision=groups.count("vision"),
        merger=groups.count("merger"),
        vision_mlp=len(shared),
        merger_tensors=len(list(parts.merger.parameters())),
        dtype=dtype,
        attending=next(layer.number for layer in layers if layer.attends),
        mixers=sum(not layer.attends for layer in layers),
        first_two=sum(name.startswith(start) for name in names),
        first_input=within(first.name, first.inputs[0]),
        first_output=within(first.name, first.output),
        merger_last=within(merger.name, merger.second),
        tower_up=within(block.name, block.mlp.up),
        tower_down=within(block.name, block.mlp.down),
    )
