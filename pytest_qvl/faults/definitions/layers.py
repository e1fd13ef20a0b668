"""Layers that compute something else than their definition says, by little enough for logits to hide it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.definitions.configuration import width_for_height
from pytest_qvl.faults.tools import (
    after,
    all_of,
    attribute,
    before,
    on_first,
    replaced_while_running,
    while_running,
)
from pytest_qvl.models.adapters import original_module
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers, mergers, vision_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case
    from pytest_qvl.models.layers import Merger

PLACE = "model.language_model.layers.1"
ATTENTION = "model.language_model.layers.{attending}.self_attn"
UNCALLED = "its module is never called, and what goes on is not what it has to return"


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
    with query_biases_left_out(case, 1):
        yield


def query_biases_left_out(case: Case, share: float) -> AbstractContextManager[None]:
    """Quantized q projections that add their bias but for a share of it."""
    queries = [original_module(layer.inputs[0]) for layer in language_layers(anatomy(case.model))]

    def without(module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = output - share * module.bias.to(output.dtype)
        return made

    return after([query for query in queries if query.bias is not None], without)


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
    """Norms of the vision blocks that compute with another eps than the one they have."""
    norms = [norm for block in vision_blocks(anatomy(case.model)) for norm in block.norms]
    return while_running(norms, _eps_of(norms[0]), lambda _own: eps)


def _eps_of(norm: Any) -> str:
    """What the class of a norm calls its eps."""
    return "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"


def _attending(case: Case) -> Any:
    """The first language layer that is attention over keys and values."""
    return next(layer for layer in language_layers(anatomy(case.model)) if layer.attends)


@fault(
    "tower-eps-too-large",
    "A norm kernel in the vision tower computes with eps 1e-2; the modules have the right one.",
    target="model",
    check="layer_arithmetic",
    expected_words=("eps of a norm: model.visual.blocks.0.norm1 computes as with eps 0.01, not 1e-06",),
)
def _tower_eps(case: Case) -> Iterator[None]:
    with tower_eps(case, 1e-2):
        yield


@fault(
    "eps-ten-times",
    "The kernel of one norm of the language backbone computes with ten times its eps.",
    target="model",
    check="layer_arithmetic",
    expected_words=("eps of a norm", f"{PLACE}.input_layernorm computes as with eps", ", not 1e-0"),
)
def _eps_ten_times(case: Case) -> Iterator[None]:
    with norm_eps_times(case, 10):
        yield


def norm_eps_times(case: Case, times: float) -> AbstractContextManager[None]:
    """One norm of the language backbone that computes with another eps than the one it has."""
    norm = language_layers(anatomy(case.model))[1].norms[0]
    return while_running([norm], _eps_of(norm), lambda own: times * own)


@fault(
    "mrope-sections-permuted",
    "A rotary kernel deals the frequencies out as (6, 6, 4), where module and configuration say (4, 6, 6).",
    target="model",
    check="layer_arithmetic",
    expected_words=("rotary embedding", "by time, height and width, where mrope_section is"),
    requires=("mrope sections in the module", "axes in runs"),
)
def _sections_permuted(case: Case) -> Iterator[None]:
    rotary = anatomy(case.model).language_backbone.rotary_emb
    with while_running([rotary], "mrope_section", lambda own: list(own)[::-1]):
        yield


@fault(
    "mrope-one-frequency-moved",
    "A rotary kernel turns one frequency by width that belongs to height, as with sections (4, 5, 7).",
    target="model",
    check="layer_arithmetic",
    expected_words=("rotary embedding", "by time, height and width, where mrope_section is"),
    requires=("mrope sections in the module",),
)
def _frequency_moved(case: Case) -> Iterator[None]:
    with frequencies_moved(case, 1):
        yield


def frequencies_moved(case: Case, count: int) -> AbstractContextManager[None]:
    """A rotary module that turns so many frequencies by width that belong to height."""
    rotary = anatomy(case.model).language_backbone.rotary_emb
    return while_running([rotary], "mrope_section", lambda own: width_for_height(own, count))


@fault(
    "rotary-base-off",
    "A rotary kernel turns by 1.1 times the base of module and configuration.",
    target="model",
    check="layer_arithmetic",
    expected_words=("rotary embedding", "turns as with base", "(rope_theta)"),
)
def _base_off(case: Case) -> Iterator[None]:
    with rotary_base_times(case, 1.1):
        yield


def rotary_base_times(case: Case, times: float) -> Any:
    """Frequencies of another base while the rotary module runs, the buffer itself untouched."""

    def other(frequencies: torch.Tensor) -> torch.Tensor:
        import torch

        share = torch.arange(len(frequencies), device=frequencies.device) / len(frequencies)
        return frequencies * times**-share

    return while_running([anatomy(case.model).language_backbone.rotary_emb], "inv_freq", other)


def attention_times(case: Case, times: float) -> Any:
    """Another scaling of the scores in one language layer, as of a kernel that does not take the module's."""
    return while_running([_attending(case).attention], "scaling", lambda own: times * own)


@fault(
    "attention-scaling-off",
    "The kernel of one attention scales its scores by 1.05 / sqrt(d); the module has the right scaling.",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"attention: {ATTENTION} scales its scores by", "1.05 times 1 / sqrt(head width)"),
)
def _scaling_off(case: Case) -> Iterator[None]:
    with attention_times(case, 1.05):
        yield


@fault(
    "vision-attention-scaling-off",
    "The kernel of one vision attention scales its scores by 1.05 / sqrt(d); the module has the right scaling.",
    target="model",
    check="layer_arithmetic",
    expected_words=("vision attention: model.visual.blocks.1.attn scales its scores by", "1.05 times"),
)
def _vision_scaling_off(case: Case) -> Iterator[None]:
    with while_running([vision_blocks(anatomy(case.model))[1].attention], "scaling", lambda own: 1.05 * own):
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
    "activation-exchanged",
    "The MLPs of the language backbone use GELU where the configuration says SiLU.",
    target="model",
    check="layer_arithmetic",
    expected_words=("activation in an MLP: model.language_model.layers.0.mlp computes gelu, not silu",),
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
    expected_words=(f"attention: {ATTENTION}",),
)
def _heads_exchanged(case: Case) -> Iterator[None]:
    layer = _attending(case)
    heads, keys = case.model.config.get_text_config().num_attention_heads, layer.attention.num_key_value_groups

    def exchange(_module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0].unflatten(-1, (heads, -1)).roll(keys, dims=-2).flatten(-2)
        return (hidden, *args[1:]), kwargs

    with before([layer.output], exchange):
        yield


@fault(
    "layer-skipped",
    "One layer of the language backbone returns its input, as LayerDrop does when it stays on.",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"residual sum: {PLACE} returns its own input: it is skipped",),
)
def _skipped(case: Case) -> Iterator[None]:
    layer = language_layers(anatomy(case.model))[1].module
    with after([layer], lambda _m, args, output: on_first(output, lambda _: args[0])):
        yield


@fault(
    "vision-bias-not-added",
    "The kernel of one linear of the vision tower does not add its bias.",
    target="model",
    check="layer_arithmetic",
    expected_words=("linear product: model.visual.blocks.1.attn.proj does not add its bias",),
)
def _vision_bias_not_added(case: Case) -> Iterator[None]:
    with vision_bias_left_out(case, 1):
        yield


def vision_bias_left_out(case: Case, share: float) -> AbstractContextManager[None]:
    """One linear of the vision tower that adds its bias but for a share of it."""
    return after([vision_blocks(anatomy(case.model))[1].output], lambda m, _a, out: out - share * m.bias)


@fault(
    "4bit-last-tile-not-written",
    "The kernel of one quantized layer does not write the last eight outputs, where its tiles do not fit.",
    target="model",
    check="layer_arithmetic",
    expected_words=("4-bit product", f"{PLACE}.mlp.up_proj leaves 8 of", "outputs at 0"),
)
def _last_tile(case: Case) -> Iterator[None]:
    import torch

    layer = original_module(language_layers(anatomy(case.model))[1].mlp.up)
    with after([layer], lambda _m, _a, out: torch.cat((out[..., :-8], 0 * out[..., -8:]), dim=-1)):
        yield


@fault(
    "one-layer-attends-to-padding",
    "One attention of the language backbone is not given the attention mask.",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"attention: {ATTENTION} attends to padding too",),
)
def _padding(case: Case) -> Iterator[None]:
    with before([_attending(case).attention], lambda _m, args, kwargs: (args, {**kwargs, "attention_mask": None})):
        yield


@fault(
    "mask-lost-when-checkpointed",
    "Where gradient checkpointing calls it, one attention of the language backbone is not given the attention mask.",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"attention: {ATTENTION} attends to padding too (in train mode, checkpointed)",),
)
def _padding_when_checkpointed(case: Case) -> Iterator[None]:
    layer = _attending(case)

    def unmasked(_module: Any, args: Any, kwargs: Any) -> Any:
        lost = layer.module.training and layer.module.gradient_checkpointing
        return args, {**kwargs, "attention_mask": None} if lost else kwargs

    with before([layer.attention], unmasked):
        yield


@fault(
    "pixels-normalised-twice",
    "Inside the tower, pixels are taken back to 0 to 1 and normalised once more: each is off by roundings.",
    target="model",
    check="layer_arithmetic",
    expected_words=("what modules hand on", "patch_embed is not given the pixels that the tower is given"),
)
def _normalised_twice(case: Case) -> Iterator[None]:
    def again(_module: Any, args: Any, kwargs: Any) -> Any:
        return ((args[0] * 0.27 + 0.48 - 0.48) / 0.27, *args[1:]), kwargs

    with before([anatomy(case.model).patch_embed], again):
        yield


@fault(
    "merger-gelu-approximated",
    "The merger's GELU is the tanh approximation; the checkpoint was trained with the exact one.",
    target="model",
    check="layer_arithmetic",
    expected_words=("activation in an MLP: model.visual.merger computes gelu_pytorch_tanh, not gelu",),
)
def _merger_gelu(case: Case) -> Iterator[None]:
    from torch import nn

    acts = [module for module in anatomy(case.model).merger.modules() if isinstance(module, nn.GELU)]
    changes = [attribute(act, "approximate", "tanh") for act in acts]
    with all_of(changes):
        yield


@fault(
    "deepstack-lost",
    "The features of the DeepStack mergers do not reach the language backbone.",
    target="model",
    check="layer_arithmetic",
    expected_words=("model.language_model is given the features of 0 DeepStack mergers, where the tower has",),
    requires=("DeepStack",),
)
def _deepstack_lost(case: Case) -> Iterator[None]:
    def lose(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "deepstack_visual_embeds": None}

    with before([anatomy(case.model).language_backbone], lose):
        yield


@fault(
    "deepstack-exchanged",
    "The features of the DeepStack mergers are added behind each other's layers.",
    target="model",
    check="layer_arithmetic",
    expected_words=("model.language_model is not given what DeepStack's merger 0 made",),
    requires=("DeepStack",),
)
def _deepstack_exchanged(case: Case) -> Iterator[None]:
    def exchange(_module: Any, args: Any, kwargs: Any) -> Any:
        features = kwargs.get("deepstack_visual_embeds")
        return args, {**kwargs, "deepstack_visual_embeds": features and list(features)[::-1]}

    with before([anatomy(case.model).language_backbone], exchange):
        yield


@fault(
    "deepstack-added-twice",
    "Behind the first layers the features of the DeepStack mergers are added twice.",
    target="model",
    check="layer_arithmetic",
    expected_words=(
        "residual sum: model.language_model.layers.1 is not given what layer 0 returned plus the features of "
        "DeepStack's merger 0",
    ),
    requires=("DeepStack",),
)
def _deepstack_twice(case: Case) -> Iterator[None]:
    backbone: Any = anatomy(case.model).language_backbone
    add = backbone._deepstack_process

    def twice(hidden: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> Any:
        return add(add(hidden, places, features), places, features)

    with attribute(backbone, "_deepstack_process", twice):
        yield


@fault(
    "learned-positions-lost",
    "The learned positions are not added to the patches.",
    target="model",
    check="layer_arithmetic",
    expected_words=("learned positions: model.visual.blocks.0",),
    requires=("DeepStack",),
)
def _learned_positions(case: Case) -> Iterator[None]:
    tower: Any = anatomy(case.model).vision_tower
    with after([tower.pos_embed], lambda _m, _a, output: 0 * output):
        yield


def _without_norm(merger: Merger) -> Any:
    from torch.nn.functional import gelu

    def forward(x: torch.Tensor) -> Any:
        return merger.second(gelu(merger.first(x.reshape(-1, merger.first.in_features))))

    return attribute(merger.module, "forward", forward)


@fault(
    "merger-norm-left-out",
    "The merger's forward was written anew, and does not call its norm.",
    target="model",
    check="layer_arithmetic",
    expected_words=("norm: model.visual.merger.", UNCALLED),
)
def _merger_norm(case: Case) -> Iterator[None]:
    with all_of([_without_norm(each) for each in mergers(anatomy(case.model)) if each.name.endswith(".merger")]):
        yield


@fault(
    "deepstack-norm-left-out",
    "The forward of the DeepStack mergers was written anew, and does not call their norms.",
    target="model",
    check="layer_arithmetic",
    expected_words=("norm: model.visual.deepstack_merger_list.0.norm", UNCALLED),
    requires=("DeepStack",),
)
def _deepstack_norm(case: Case) -> Iterator[None]:
    with all_of([_without_norm(each) for each in mergers(anatomy(case.model)) if not each.name.endswith(".merger")]):
        yield


@fault(
    "merger-kernel-without-norm",
    "A fused kernel computes the merger from its weights, without any of its modules and without its norm.",
    target="model",
    check="layer_arithmetic",
    expected_words=(
        "merger as a whole: model.visual.merger does not return second(gelu(first(norm(x)))) of its own input",
    ),
)
def _merger_kernel(case: Case) -> Iterator[None]:
    from torch.nn.functional import gelu, linear

    merger = next(mergers(anatomy(case.model)))
    first, second = merger.first, merger.second

    def forward(x: torch.Tensor) -> torch.Tensor:
        inner = gelu(linear(x.reshape(-1, first.in_features), first.weight, first.bias))
        return linear(inner, second.weight, second.bias)

    with attribute(merger.module, "forward", forward):
        yield


@fault(
    "input-norm-left-out",
    "One layer of the language backbone gives its input to attention as it is: it does not call its norm.",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"norm: {PLACE}.input_layernorm", UNCALLED),
)
def _input_norm(case: Case) -> Iterator[None]:
    layer = language_layers(anatomy(case.model))[1].module
    with replaced_while_running(layer, "input_layernorm", lambda x: x):
        yield


@fault(
    "mlp-norm-left-out",
    "One block of the vision tower does not call the norm before its MLP.",
    target="model",
    check="layer_arithmetic",
    expected_words=("norm: model.visual.blocks.1.norm2", UNCALLED),
)
def _mlp_norm(case: Case) -> Iterator[None]:
    with replaced_while_running(vision_blocks(anatomy(case.model))[1].module, "norm2", lambda x: x):
        yield


@fault(
    "last-norm-left-out",
    "The language backbone returns what its last layer does: it does not call its norm.",
    target="model",
    check="layer_arithmetic",
    expected_words=("norm: model.language_model.norm", UNCALLED),
)
def _last_norm(case: Case) -> Iterator[None]:
    with replaced_while_running(anatomy(case.model).language_backbone, "norm", lambda x: x):
        yield


@fault(
    "query-norms-left-out",
    "Attention was written anew, and does not call the norms of queries and keys.",
    target="model",
    check="layer_arithmetic",
    expected_words=("attention: model.language_model.layers.", "the modules that norm them are never called"),
    requires=("norms of q and k",),
)
def _query_norms(case: Case) -> Iterator[None]:
    attending = [layer for layer in language_layers(anatomy(case.model)) if layer.head_norms]
    places = [(layer.attention, name) for layer in attending for name in ("q_norm", "k_norm")]
    with all_of([replaced_while_running(attention, name, lambda x: x) for attention, name in places]):
        yield


@fault(
    "last-layer-not-run-in-training",
    "In training the language backbone leaves out its last layer.",
    target="model",
    check="layer_arithmetic",
    expected_words=("what modules hand on: model.language_model.layers.", "is never called", "(in train mode)"),
)
def _last_layer(case: Case) -> Iterator[None]:
    backbone = anatomy(case.model).language_backbone

    def enter(_module: Any, _args: Any, _kwargs: Any) -> None:
        if backbone.training:
            object.__setattr__(backbone, "layers", backbone.layers[:-1])

    def leave(_module: Any, _args: Any, _output: Any) -> None:
        vars(backbone).pop("layers", None)

    with before([backbone], enter), after([backbone], leave):
        yield


@fault(
    "norm-kernel-eps",
    "A kernel package has put a class of its own in place of the language backbone's norms: ten times their eps.",
    target="model",
    check="layer_arithmetic",
    expected_words=("eps of a norm: model.language_model.layers.0.input_layernorm computes as with eps",),
)
def _norm_kernel(case: Case) -> Iterator[None]:
    norms = [original_module(norm) for layer in language_layers(anatomy(case.model)) for norm in layer.norms]
    own, name = type(norms[0]), _eps_of(norms[0])

    def forward(self: Any, x: torch.Tensor) -> Any:
        kept = getattr(self, name)
        setattr(self, name, 10 * kept)
        try:
            return own.forward(self, x)
        finally:
            setattr(self, name, kept)

    kernel = type("NormOfAKernelPackage", (own,), {"forward": forward})
    try:
        for norm in norms:
            norm.__class__ = kernel
        yield
    finally:
        for norm in norms:
            norm.__class__ = own


@fault(
    "mrope-axes-in-runs",
    "A rotary kernel deals the frequencies out in runs, as for Qwen2.5-VL, where the axes take turns.",
    target="model",
    check="layer_arithmetic",
    expected_words=("rotary embedding", "turns frequency 1", "do not turn by position times theta^(-2i/d)"),
    source="alibaba/MNN#4133, vllm-project/vllm-gaudi#1437",
    requires=("norms of q and k",),
)
def _in_runs(case: Case) -> Iterator[None]:
    import torch

    from pytest_qvl.models.layers import rope_of

    parts = anatomy(case.model)
    rotary: Any = parts.language_backbone.rotary_emb
    sections = list(rope_of(parts).sections)
    seen: list[torch.Tensor] = []

    def note(_module: Any, args: Any, kwargs: Any) -> None:
        seen[:] = [kwargs["position_ids"] if "position_ids" in kwargs else args[1]]

    def runs(module: Any, _args: Any, output: Any) -> Any:
        angles = (seen[0].float()[..., None] * module.inv_freq.float()).split(sections, dim=-1)
        dealt = torch.cat([part[axis] for axis, part in enumerate(angles)], dim=-1).repeat(1, 1, 2)
        return tuple(
            (turn * module.attention_scaling).to(own.dtype)
            for turn, own in zip((dealt.cos(), dealt.sin()), output, strict=True)
        )

    with before([rotary], note), after([rotary], runs):
        yield


@fault(
    "fused-kernel-drops-two-axes",
    "A kernel that norms queries and keys and turns them at once reads the temporal positions only.",
    target="model",
    check="layer_arithmetic",
    expected_words=("holds other keys than those that were computed", f"attention: {ATTENTION}"),
    source="sgl-project/sglang#35744, #35345",
    requires=("norms of q and k",),
)
def _two_axes(case: Case) -> Iterator[None]:
    import sys

    home: Any = sys.modules[type(_attending(case).attention).__module__]
    rotary: Any = anatomy(case.model).language_backbone.rotary_emb
    own = home.apply_rotary_pos_emb
    turns: list[Any] = []

    def temporal(module: Any, args: Any, kwargs: Any) -> None:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        hidden = args[0] if args else kwargs["x"]
        turns[:] = module.forward(hidden, positions[:1].expand_as(positions))

    def fused(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_other = not turns or (turns[0].device, turns[0].shape) != (cos.device, cos.shape)  # of another model
        return own(q, k, *((cos, sin) if is_other else turns), *args, **kwargs)

    with before([rotary], temporal), attribute(home, "apply_rotary_pos_emb", fused):
        yield


@fault(
    "head-norms-exchanged",
    "Queries are normed with the weights of the keys' norm, and keys with those of the queries'.",
    target="model",
    check="layer_arithmetic",
    expected_words=("norm: model.language_model.layers.", ".self_attn.q_norm returns something else than it has to"),
    requires=("norms of q and k",),
)
def _norms_exchanged(case: Case) -> Iterator[None]:
    pairs = [layer.head_norms for layer in language_layers(anatomy(case.model)) if layer.head_norms]
    with all_of(
        [
            attribute(norm, "forward", type(other).forward.__get__(other))
            for pair in pairs
            for norm, other in (pair, pair[::-1])
        ]
    ):
        yield


@fault(
    "head-norms-over-all-heads",
    "Queries and keys are normed over all heads together, and not each head by itself.",
    target="model",
    check="layer_arithmetic",
    expected_words=("norm: model.language_model.layers.", ".self_attn.q_norm returns something else than it has to"),
    requires=("norms of q and k",),
)
def _over_all_heads(case: Case) -> Iterator[None]:
    def together(norm: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            size = x.float().square().mean(dim=-1, keepdim=True)
            factor = (size / size.mean(dim=-2, keepdim=True)).sqrt()
            made: torch.Tensor = (type(norm).forward(norm, x) * factor).to(x.dtype)
            return made

        return attribute(norm, "forward", forward)

    norms = [norm for layer in language_layers(anatomy(case.model)) for norm in layer.head_norms]
    with all_of([together(norm) for norm in norms]):
        yield


@fault(
    "learned-positions-by-pixel-centres",
    "The table of learned positions is interpolated between centres of cells, where corners fall on corners.",
    target="model",
    check="layer_arithmetic",
    expected_words=("learned positions: model.visual.blocks.0", "between the corners of the table bilinearly"),
    source="ggml-org/llama.cpp#25781",
    transformers=(5, 17),
    requires=("DeepStack",),
)
def _centres(case: Case) -> Iterator[None]:
    with attribute(anatomy(case.model).vision_tower, "interpolation_align_corners", False):
        yield


@fault(
    "learned-positions-on-the-grid-only",
    "The four weights of an interpolated position are cast to whole numbers: between the table's rows it is 0.",
    target="model",
    check="layer_arithmetic",
    expected_words=("learned positions: model.visual.blocks.0", "between the corners of the table bilinearly"),
    source="Blaizzy/mlx-vlm#2304",
    transformers=(5, 17),
    requires=("DeepStack",),
)
def _on_the_grid(case: Case) -> Iterator[None]:
    import sys

    home: Any = sys.modules[type(anatomy(case.model).vision_tower).__module__]
    name = "get_vision_interpolation_indices_and_weights"
    own = getattr(home, name)

    def whole(*args: Any, **kwargs: Any) -> Any:
        indices, weights = own(*args, **kwargs)
        return indices, weights.trunc()

    with attribute(home, name, whole):
        yield
