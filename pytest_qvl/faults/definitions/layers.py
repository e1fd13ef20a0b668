"""Layers that compute something else than their definition says, by little enough for logits to hide it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, all_of, attribute, before, values
from pytest_qvl.models.adapters import original_module
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers, vision_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pytest_qvl.faults.case import Case

PLACE = "model.language_model.layers.1"


def product_times(case: Case, times: float) -> Any:
    """One 4-bit product off by a factor, as a kernel with a wrong scale is."""
    layer = original_module(language_layers(anatomy(case.model))[1].mlp.up)
    return after([layer], lambda _m, _a, out: out * times)


@fault(
    "4bit-product-off-by-5-percent",
    "The kernel of one quantized layer returns 1.05 times x·Wᵀ + b.",
    target="model",
    check="layer_arithmetic",
    expected_words=("4-bit product", f"{PLACE}.mlp.up_proj returns 1.05 times what it has to"),
)
def _five_percent(case: Case) -> Iterator[None]:
    with product_times(case, 1.05):
        yield


@fault(
    "4bit-product-off-by-1-percent",
    "The kernel of one quantized layer returns 1.01 times x·Wᵀ + b.",
    target="model",
    check="layer_arithmetic",
    expected_words=("4-bit product", f"{PLACE}.mlp.up_proj returns 1.01 times what it has to"),
)
def _one_percent(case: Case) -> Iterator[None]:
    with product_times(case, 1.01):
        yield


@fault(
    "4bit-bias-not-added",
    "Quantized q projections do not add their bias.",
    target="model",
    check="layer_arithmetic",
    expected_words=("4-bit product", "q_proj does not add its bias"),
    requires=("biases of q, k and v",),
)
def _bias_not_added(case: Case) -> Iterator[None]:
    queries = [original_module(layer.inputs[0]) for layer in language_layers(anatomy(case.model))]

    def without(module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = output - module.bias.to(output.dtype)
        return made

    with after([query for query in queries if query.bias is not None], without):
        yield


@fault(
    "qv-biases-lost",
    "q and v projections were rebuilt without their biases.",
    target="model",
    check="layer_arithmetic",
    expected_words=("bias: model.language_model.layers.0.self_attn.q_proj has no bias, where the family has one",),
    requires=("biases of q, k and v",),
)
def _biases_lost(case: Case) -> Iterator[None]:
    layers = language_layers(anatomy(case.model))
    linears = [original_module(layer.inputs[place]) for layer in layers for place in (0, 2)]
    kept = [linear.bias for linear in linears]
    for linear in linears:
        linear.bias = None
    try:
        yield
    finally:
        for linear, bias in zip(linears, kept, strict=True):
            linear.bias = bias


def tower_eps(case: Case, eps: float) -> Any:
    """Norms of the vision blocks with another eps."""
    norms = [norm for block in vision_blocks(anatomy(case.model)) for norm in block.norms]
    name = "variance_epsilon" if hasattr(norms[0], "variance_epsilon") else "eps"
    return all_of([attribute(norm, name, eps) for norm in norms])


@fault(
    "tower-eps-too-large",
    "The norms of the vision tower have eps 1e-2 instead of 1e-6.",
    target="model",
    check="layer_arithmetic",
    expected_words=("eps of a norm: model.visual.blocks.0.norm1 computes as with eps 0.01, not 1e-06",),
)
def _tower_eps(case: Case) -> Iterator[None]:
    with tower_eps(case, 1e-2):
        yield


@fault(
    "eps-ten-times",
    "One norm of the language backbone has ten times its eps.",
    target="model",
    check="layer_arithmetic",
    expected_words=("eps of a norm", f"{PLACE}.input_layernorm computes as with eps", ", not 1e-0"),
)
def _eps_ten_times(case: Case) -> Iterator[None]:
    norm = language_layers(anatomy(case.model))[1].norms[0]
    with attribute(norm, "variance_epsilon", 10 * norm.variance_epsilon):
        yield


def _sections(rotary: Any, sections: list[int]) -> Any:
    return attribute(rotary, "mrope_section", sections)


@fault(
    "mrope-sections-permuted",
    "The rotary module deals its frequencies out as (6, 6, 4), where the configuration says (4, 6, 6).",
    target="model",
    check="layer_arithmetic",
    expected_words=("rotary embedding", "by time, height and width, where mrope_section is"),
    requires=("mrope sections in the module",),
)
def _sections_permuted(case: Case) -> Iterator[None]:
    rotary = anatomy(case.model).language_backbone.rotary_emb
    with _sections(rotary, list(rotary.mrope_section)[::-1]):
        yield


@fault(
    "mrope-one-frequency-moved",
    "The rotary module turns one frequency by width that belongs to height.",
    target="model",
    check="layer_arithmetic",
    expected_words=("rotary embedding", "by time, height and width, where mrope_section is"),
    requires=("mrope sections in the module",),
)
def _frequency_moved(case: Case) -> Iterator[None]:
    rotary = anatomy(case.model).language_backbone.rotary_emb
    time, height, width = rotary.mrope_section
    with _sections(rotary, [time, height - 1, width + 1]):
        yield


@fault(
    "rotary-base-off",
    "The rotary module has 1.1 times the base of the configuration.",
    target="model",
    check="layer_arithmetic",
    expected_words=("rotary embedding", "turns as with base", "(rope_theta)"),
)
def _base_off(case: Case) -> Iterator[None]:
    from pytest_qvl.models.layers import rope_of
    from pytest_qvl.oracles.rotary import frequencies

    parts = anatomy(case.model)
    buffer = parts.language_backbone.rotary_emb.inv_freq
    wrong = frequencies(1.1 * rope_of(parts).theta, len(buffer))
    with values(buffer, wrong.to):
        yield


def attention_times(case: Case, times: float) -> Any:
    """Another scaling of the scores in one language layer."""
    attention = language_layers(anatomy(case.model))[1].attention
    return attribute(attention, "scaling", times * attention.scaling)


@fault(
    "attention-scaling-off",
    "One attention scales its scores by 1.05 / sqrt(d).",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"attention: {PLACE}.self_attn scales its scores by", "1.05 times 1 / sqrt(head width)"),
)
def _scaling_off(case: Case) -> Iterator[None]:
    with attention_times(case, 1.05):
        yield


@fault(
    "vision-attention-scaling-off",
    "One attention of the vision tower scales its scores by 1.05 / sqrt(d).",
    target="model",
    check="layer_arithmetic",
    expected_words=("vision attention: model.visual.blocks.1.attn scales its scores by", "1.05 times"),
)
def _vision_scaling_off(case: Case) -> Iterator[None]:
    attention = vision_blocks(anatomy(case.model))[1].attention
    with attribute(attention, "scaling", 1.05 * attention.scaling):
        yield


@fault(
    "vision-rotation-not-applied",
    "The tower's blocks get a rotation by nothing; whoever records a reference afterwards records it so.",
    target="model",
    check="layer_arithmetic",
    expected_words=("vision rotary embedding: model.visual.blocks.0.attn is given no rotation",),
    source="huggingface/transformers#35749",
)
def _rotation_not_applied(case: Case) -> Iterator[None]:
    def drop(_module: Any, args: Any, kwargs: Any) -> Any:
        cosines, sines = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cosines * 0 + 1, sines * 0)}

    with before([block.module for block in vision_blocks(anatomy(case.model))], drop):
        yield


@fault(
    "cache-one-step-stale",
    "While decoding, one layer's cache gets the key and value of the step before.",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"key-value cache: {PLACE}.self_attn holds at position", "the cache is one step stale"),
)
def _cache_stale(case: Case) -> Iterator[None]:
    from transformers import cache_utils

    kind: Any = cache_utils.DynamicLayer
    number = 1
    original = kind.update
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    attention = language_layers(anatomy(case.model))[number].attention
    inside = [False]

    def update(layer: Any, keys: torch.Tensor, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if inside[0]:
            older = kept.get(id(layer))
            kept[id(layer)] = keys[:, :, -1:], states[:, :, -1:]
            if keys.shape[2] == 1 and older is not None:
                keys, states = older
        return original(layer, keys, states, *args, **kwargs)

    def enter(_module: Any, _args: Any, _kwargs: Any) -> None:
        inside[0] = True

    def leave(_module: Any, _args: Any, _output: Any) -> None:
        inside[0] = False

    kind.update = update
    try:
        with before([attention], enter), after([attention], leave):
            yield
    finally:
        kind.update = original


@fault(
    "activation-exchanged",
    "The MLPs of the language backbone use GELU where the configuration says SiLU.",
    target="model",
    check="layer_arithmetic",
    expected_words=("activation in an MLP: model.language_model.layers.0.mlp",),
)
def _activation(case: Case) -> Iterator[None]:
    from torch import nn

    mlps = [layer.mlp.module for layer in language_layers(anatomy(case.model))]
    kept = [mlp.act_fn for mlp in mlps]
    for mlp in mlps:
        mlp.act_fn = nn.GELU()
    try:
        yield
    finally:
        for mlp, activation in zip(mlps, kept, strict=True):
            mlp.act_fn = activation


@fault(
    "key-heads-exchanged",
    "In one language layer the two key heads serve each other's query heads.",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"attention: {PLACE}.self_attn",),
)
def _heads_exchanged(case: Case) -> Iterator[None]:
    layer = language_layers(anatomy(case.model))[1]
    heads, keys = case.model.config.get_text_config().num_attention_heads, layer.attention.num_key_value_groups

    def exchange(_module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0].unflatten(-1, (heads, -1)).roll(keys, dims=-2).flatten(-2)
        return (hidden, *args[1:]), kwargs

    with before([layer.output], exchange):
        yield
