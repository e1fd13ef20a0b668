"""The layers of a Qwen-VL model by what they do, under the names that each family gives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.anatomy import TOWER
from pytest_qvl.models.families import FAMILIES

if TYPE_CHECKING:
    import torch

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.families import Family

# Of every norm in the tower and its mergers; no configuration has a field for it.
VISION_EPS = 1e-6
# Base of the tower's rotary embedding in every release; configurations of older Transformers have no field for it.
VISION_THETA = 10_000.0
# The linear-attention mixer of Qwen3.5 in its layer, and the linears that its input goes through.
MIXER, MIXER_INPUTS = "linear_attn", ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


@dataclass(frozen=True)
class Mlp:
    """A gated MLP, or one of two linears where `gate` is None.

    Attributes:
        name: Dotted name in the base model.
        module: The MLP.
        gate: Its output goes through the activation; None for an MLP without a gate.
        up: Its output is multiplied by the gate's, or goes through the activation.
        down: The last linear.
        activation: Name of the activation, as the configuration has it.
    """

    name: str
    module: Any
    gate: Any
    up: Any
    down: Any
    activation: str


@dataclass(frozen=True)
class Layer:
    """One layer of the language backbone or block of the vision tower.

    Attributes:
        name: Dotted name in the base model.
        number: Its place, from 0.
        module: The layer.
        norms: Before attention and before the MLP.
        attention: The attention, or the linear-attention mixer in its place (Qwen3.5).
        attends: Whether it is attention over keys and values.
        inputs: ``(q, k, v)``, or one linear that makes all three; all that a mixer's input goes through.
        output: The linear behind the attention.
        head_norms: Norms of queries and keys (from Qwen3-VL on), or empty.
        mlp: The MLP.
    """

    name: str
    number: int
    module: Any
    norms: tuple[Any, Any]
    attention: Any
    inputs: tuple[Any, ...]
    output: Any
    head_norms: tuple[Any, ...]
    mlp: Mlp
    attends: bool = True

    @property
    def parts(self) -> tuple[Any, ...]:
        """The linears and norms of attention and MLP."""
        first = (self.mlp.up,) if self.mlp.gate is None else (self.mlp.gate, self.mlp.up)
        return (*self.norms, *self.inputs, *self.head_norms, self.output, *first, self.mlp.down)


@dataclass(frozen=True)
class Merger:
    """A multimodal projector: norm, first linear, exact GELU, second linear.

    Attributes:
        name: Dotted name in the base model.
        module: The merger.
        norm: Its norm.
        first: The linear before the activation.
        second: The linear behind it.
    """

    name: str
    module: Any
    norm: Any
    first: Any
    second: Any


@dataclass(frozen=True)
class Rope:
    """Rotary positions of the language backbone, from the configuration.

    Attributes:
        theta: Base of the frequencies.
        kind: ``"default"``, or how context is extended (``"yarn"``).
        sections: Frequencies per axis: time, height, width.
        interleaved: Whether the axes take turns.
        share: Of each head's width that is turned; the rest of it knows no position.
    """

    theta: float
    kind: str
    sections: tuple[int, ...]
    interleaved: bool
    share: float = 1.0


def language_layers(parts: Parts) -> list[Layer]:
    """Every layer of the language backbone, in order."""
    root, found = parts.roots["language"], []
    for number, layer in enumerate(parts.language_backbone.layers):
        name = f"{root}.layers.{number}"
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        mlp = _mlp(f"{name}.mlp", layer.mlp, parts.text_config.hidden_act)
        if not hasattr(layer, "self_attn"):
            mixer = getattr(layer, MIXER)
            inputs = tuple(getattr(mixer, key) for key in MIXER_INPUTS)
            found.append(Layer(name, number, layer, norms, mixer, inputs, mixer.out_proj, (), mlp, attends=False))
            continue
        attention = layer.self_attn
        head_norms = tuple(getattr(attention, key) for key in ("q_norm", "k_norm") if hasattr(attention, key))
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        found.append(Layer(name, number, layer, norms, attention, inputs, attention.o_proj, head_norms, mlp))
    return found


def vision_blocks(parts: Parts) -> list[Layer]:
    """Every block of the vision tower, in order."""
    root, found = parts.roots["vision"], []
    blocks: Any = parts.blocks
    for number, block in enumerate(blocks):
        name = f"{root}.blocks.{number}"
        found.append(
            Layer(
                name,
                number,
                block,
                (block.norm1, block.norm2),
                block.attn,
                (block.attn.qkv,),
                block.attn.proj,
                (),
                _mlp(f"{name}.mlp", block.mlp, parts.config.vision_config.hidden_act),
            )
        )
    return found


def _mlp(name: str, mlp: Any, activation: str) -> Mlp:
    if hasattr(mlp, "gate_proj"):
        return Mlp(name, mlp, mlp.gate_proj, mlp.up_proj, mlp.down_proj, activation)
    first, second = (mlp.fc1, mlp.fc2) if hasattr(mlp, "fc1") else (mlp.linear_fc1, mlp.linear_fc2)
    return Mlp(name, mlp, None, first, second, activation)


def mergers(parts: Parts) -> Iterator[Merger]:
    """The multimodal projector, and those of Qwen3-VL's deepstack."""
    tower: Any = parts.vision_tower
    named = [(parts.roots["merger"], parts.merger)]
    for number, each in enumerate(getattr(tower, "deepstack_merger_list", ())):
        named.append((f"{parts.roots['vision']}.deepstack_merger_list.{number}", each))
    for name, module in named:
        merger: Any = module
        if hasattr(merger, "ln_q"):
            yield Merger(name, merger, merger.ln_q, merger.mlp[0], merger.mlp[2])
        else:
            yield Merger(name, merger, merger.norm, merger.linear_fc1, merger.linear_fc2)


def rope_of(parts: Parts) -> Rope:
    """Rotary positions as the configuration has them; Transformers 5 keeps them in one dictionary."""
    config = parts.text_config
    theta = getattr(config, "rope_theta", None)
    scaling = config.rope_parameters if theta is None else config.rope_scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return Rope(
        float(scaling["rope_theta"] if theta is None else theta),
        "default" if kind == "mrope" else kind,
        tuple(scaling["mrope_section"]),
        family_of(parts).interleaved,
        float(scaling.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)),
    )


def family_of(parts: Parts) -> Family:
    """The row of the model's family."""
    return FAMILIES[parts.config.model_type]


def centred_on_zero(parts: Parts, module: Any) -> bool:
    """Whether a norm scales by one more than its weight, so that weights of zero leave what it normed as it is."""
    return type(module).__name__ == family_of(parts).zero_centred_norms


def vision_theta(parts: Parts) -> float:
    """Base of the tower's rotary embedding: as the configuration has it, or :data:`VISION_THETA` where it has none."""
    declared: Any = getattr(parts.config.vision_config, "rope_parameters", None)
    return float((declared or {}).get("rope_theta", VISION_THETA))


def has_bias(parts: Parts, name: str) -> bool | None:
    """Whether the family's linear of this dotted name has a bias; None where it may have one or not.

    Attention of Qwen2 has biases of q, k and v, which no configuration mentions; every linear of the towers has one.
    """
    group, last = parts.group_of(name), name.rpartition(".")[2]
    if group in TOWER:
        return True
    if group == "language" and last in ("q_proj", "k_proj", "v_proj", "o_proj"):
        declared = getattr(parts.text_config, "attention_bias", None)
        attentions = (layer.self_attn for layer in parts.language_backbone.layers if hasattr(layer, "self_attn"))
        if any(hasattr(attention, "q_norm") for attention in attentions):  # from Qwen3 on
            return bool(declared)
        return last != "o_proj"
    return None


def head_sizes(parts: Parts) -> tuple[int, int, int]:
    """Query heads, key heads and width of a head of the language backbone, from the configuration."""
    config = parts.text_config
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(config.num_key_value_heads), int(width)


def cached_layer(cache: Any, number: int) -> Any:
    """What a key-value cache keeps of one layer, with ``keys`` and ``values``; None where it cannot be read so."""
    layers = getattr(cache, "layers", None)
    if not layers or number >= len(layers) or getattr(layers[number], "is_sliding", False):
        return None
    kept = layers[number]
    return kept if getattr(kept, "keys", None) is not None and "Dynamic" in type(kept).__name__ else None


def kept_state(cache: Any, number: int) -> torch.Tensor | None:
    """S of linear attention that a cache keeps of one layer, ``(rows, heads, ...)``; None where it cannot be read.

    Releases before 5.4 keep one list of all layers, later ones what each layer has.
    """
    import torch

    layers = getattr(cache, "layers", None)
    if layers is None:
        layers = getattr(cache, "recurrent_states", None) or ()
        kept: Any = layers[number] if number < len(layers) else None
    else:
        kept = getattr(layers[number], "recurrent_states", None) if number < len(layers) else None
    state = kept if isinstance(kept, torch.Tensor) else kept[0] if kept else None
    return state if isinstance(state, torch.Tensor) else None
