"""What goes wrong in linear attention (Qwen3.5): its convolution, its gates, and the state that it keeps."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, all_of, attribute, before, replaced_while_running, while_running
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case

RULE = "gated delta rule: model.language_model.layers.0.linear_attn"
CHUNKED, STEPWISE = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
CONVOLUTION, CONVOLUTION_STEP = "causal_conv1d_fn", "causal_conv1d_update"
CHUNK = 64


def _mixers(case: Case) -> list[Any]:
    return [layer.attention for layer in language_layers(anatomy(case.model)) if not layer.attends]


def _function(case: Case, name: str, change: Callable[..., Any]) -> AbstractContextManager[None]:
    """Call ``change(own, *args, **kwargs)`` where the mixers' module calls a function of its own."""
    home: Any = sys.modules[type(_mixers(case)[0]).__module__]
    own = getattr(home, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(own, *args, **kwargs)

    return attribute(home, name, changed)


@contextmanager
def _rule(case: Case, change: Callable[..., Any]) -> Iterator[None]:
    """The same of both functions that compute the delta rule: of prompts, and of single tokens."""
    with _function(case, CHUNKED, change), _function(case, STEPWISE, change):
        yield


@contextmanager
def _rule_of_mixer(case: Case, change: Callable[..., Any]) -> Iterator[None]:
    """The same as ``change(mixer, own, ...)``, of the mixer that runs; those of another model compute as they do."""
    running: list[Any] = []

    def note(module: Any, _args: Any, _kwargs: Any) -> None:
        running[:] = [module]

    def changed(own: Any, *args: Any, **kwargs: Any) -> Any:
        return change(running.pop(), own, *args, **kwargs) if running else own(*args, **kwargs)

    with before(_mixers(case), note), _rule(case, changed):
        yield


@fault(
    "padding-enters-the-state",
    "Linear attention is given no mask: what stands at padding enters its convolution and its state.",
    target="model",
    check="layer_arithmetic",
    expected_words=("linear_attn does not give its own input, padding zeroed, to its linears",),
    source="AI-Hypercomputer/maxtext#5295",
    requires=("linear attention",),
)
def _padding(case: Case) -> Iterator[None]:
    with before(_mixers(case), lambda _m, args, kwargs: (args, {**kwargs, "attention_mask": None})):
        yield


@fault(
    "state-lost-between-steps",
    "Each decode step of linear attention begins with an empty state.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "(decode step 1)"),
    requires=("linear attention",),
)
def _lost(case: Case) -> Iterator[None]:
    with _function(case, STEPWISE, lambda own, *args, **kwargs: own(*args, **{**kwargs, "initial_state": None})):
        yield


@fault(
    "state-of-the-next-row",
    "While decoding, each row of a batch goes on with another row's state.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "(decode step 1)"),
    requires=("linear attention",),
)
def _other_row(case: Case) -> Iterator[None]:
    def roll(own: Any, *args: Any, initial_state: Any = None, **kwargs: Any) -> Any:
        return own(*args, initial_state=None if initial_state is None else initial_state.roll(1, 0), **kwargs)

    with _function(case, STEPWISE, roll):
        yield


@fault(
    "state-lost-between-chunks",
    "In a prompt of more than 64 tokens, each chunk of 64 begins with an empty state.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "from token 64 on"),
    requires=("linear attention",),
)
def _lost_between_chunks(case: Case) -> Iterator[None]:
    import torch

    def apart(own: Any, *tokens: torch.Tensor, g: Any, beta: Any, initial_state: Any = None, **kwargs: Any) -> Any:
        read, state = [], initial_state
        for start in range(0, g.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            out, after = own(
                *(each[:, part] for each in tokens), g=g[:, part], beta=beta[:, part], initial_state=state, **kwargs
            )
            read.append(out)
            state = None
        return torch.cat(read, dim=1), after

    with _function(case, CHUNKED, apart):
        yield


@fault(
    "convolution-state-not-kept",
    "Decode steps read the convolution's last inputs and do not write their own: each sees the prompt's end.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "(decode step 2)"),
    requires=("linear attention",),
)
def _stale_convolution(case: Case) -> Iterator[None]:
    def stale(own: Any, x: torch.Tensor, state: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(x, state.clone(), *args, **kwargs)

    with _function(case, CONVOLUTION_STEP, stale):
        yield


@fault(
    "state-lost-between-pieces",
    "Several tokens at once behind a state begin with an empty one: only single tokens go on with what is kept.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "(piece 1 behind a state)"),
    source="huggingface/transformers#45513",
    requires=("linear attention",),
)
def _lost_between_pieces(case: Case) -> Iterator[None]:
    with _function(case, CHUNKED, lambda own, *args, **kwargs: own(*args, **{**kwargs, "initial_state": None})):
        yield


@fault(
    "state-of-a-piece-not-kept",
    "Several tokens at once read the state and do not write it: what follows goes on from before them.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "(piece 2 behind a state)"),
    requires=("linear attention",),
)
def _piece_not_kept(case: Case) -> Iterator[None]:
    def forgets(own: Any, *args: Any, initial_state: Any = None, **kwargs: Any) -> Any:
        made, after = own(*args, initial_state=initial_state, **kwargs)
        return made, after if initial_state is None else initial_state

    with _function(case, CHUNKED, forgets):
        yield


@fault(
    "convolution-lost-between-pieces",
    "Several tokens at once behind a state see zeros where the convolution reaches back to the tokens before them.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "(piece 1 behind a state)"),
    source="huggingface/transformers#45513",
    requires=("linear attention",),
)
def _convolution_between_pieces(case: Case) -> Iterator[None]:
    lengths: list[int] = []

    def note(_module: Any, args: Any, kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        lengths[:] = [hidden.shape[1]]
        return args, kwargs

    def forgets(own: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = x.clone()
        x[..., : x.shape[-1] - lengths[0]] = 0
        return own(x, *args, **kwargs)

    with before(_mixers(case), note), _function(case, CONVOLUTION, forgets):
        yield


@fault(
    "convolution-left-out",
    "Linear attention activates what its projection gives, without the convolution before.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE,),
    requires=("linear attention",),
)
def _no_convolution(case: Case) -> Iterator[None]:
    def skipped(_own: Any, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        from torch.nn.functional import silu

        return silu(x)

    with _function(case, CONVOLUTION, skipped):
        yield


@fault(
    "decay-left-out",
    "Linear attention forgets nothing: the decay of its state is left out.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE,),
    requires=("linear attention",),
)
def _no_decay(case: Case) -> Iterator[None]:
    with _rule(case, lambda own, *args, g, **kwargs: own(*args, g=0 * g, **kwargs)):
        yield


@fault(
    "decay-too-strong",
    "The state of linear attention decays by a tenth too fast.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE,),
    requires=("linear attention",),
)
def _more_decay(case: Case) -> Iterator[None]:
    with _rule(case, lambda own, *args, g, **kwargs: own(*args, g=1.1 * g, **kwargs)):
        yield


@fault(
    "keys-not-normalised",
    "Keys and queries of linear attention are not brought to length one.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE,),
    requires=("linear attention",),
)
def _not_normalised(case: Case) -> Iterator[None]:
    def plain(own: Any, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "use_qk_l2norm_in_kernel": False})

    with _rule(case, plain):
        yield


@fault(
    "mixer-gated-by-a-sigmoid",
    "The norm of linear attention is gated by a sigmoid, as full attention is, and not by SiLU.",
    target="model",
    check="layer_arithmetic",
    expected_words=("gated norm: model.language_model.layers.0.linear_attn.norm",),
    requires=("linear attention",),
)
def _sigmoid(case: Case) -> Iterator[None]:
    with while_running([mixer.norm for mixer in _mixers(case)], "activation", lambda _own: "sigmoid"):
        yield


@fault(
    "attention-gate-left-out",
    "A kernel of full attention leaves out the gate that every head is multiplied by.",
    target="model",
    check="layer_arithmetic",
    expected_words=("attention: model.language_model.layers.", ".self_attn"),
    requires=("linear attention",),
)
def _no_gate(case: Case) -> Iterator[None]:
    attending = [layer for layer in language_layers(anatomy(case.model)) if layer.attends]
    with all_of([change for layer in attending for change in _ungated(layer)]):
        yield


def _ungated(layer: Any) -> list[Any]:
    import torch

    width = layer.attention.head_dim
    gates: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> None:
        split = output.view(*output.shape[:-1], -1, 2 * width)
        gates[:] = [torch.sigmoid(split[..., width:]).flatten(-2)]

    def undo(_module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] / gates[0], *args[1:]), kwargs

    return [after([layer.inputs[0]], keep), before([layer.output], undo)]


@fault(
    "gain-without-one",
    "Norms scale by their weight, and not by one more than it.",
    target="model",
    check="layer_arithmetic",
    expected_words=("norm: model.language_model.layers.0.input_layernorm",),
    requires=("linear attention",),
)
def _gain(case: Case) -> Iterator[None]:
    def plain(norm: Any) -> Any:
        return lambda x: (norm._norm(x.float()) * norm.weight.float()).type_as(x)

    norms = [norm for layer in language_layers(anatomy(case.model)) for norm in (*layer.norms, *layer.head_norms)]
    with all_of([attribute(norm, "forward", plain(norm)) for norm in norms]):
        yield


@fault(
    "gated-norm-left-out",
    "Linear attention was written anew: it gates what it has read and does not call its norm.",
    target="model",
    check="layer_arithmetic",
    expected_words=(
        "gated norm: model.language_model.layers.0.linear_attn.norm",
        "its module is never called, and what goes on is not what it has to return",
    ),
    requires=("linear attention",),
)
def _no_norm(case: Case) -> Iterator[None]:
    from torch.nn.functional import silu

    def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return (x.float() * silu(gate.float())).to(x.dtype)

    with all_of([replaced_while_running(mixer, "norm", gated) for mixer in _mixers(case)]):
        yield


@fault(
    "state-kept-in-training",
    "In training linear attention goes on with the state that the step before left, of another batch.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "begins with the state that the forward before left", "(in train mode, checkpointed)"),
    requires=("linear attention",),
)
def _kept_in_training(case: Case) -> Iterator[None]:
    kept: dict[tuple[int, int], torch.Tensor] = {}

    def keeps(mixer: Any, own: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not mixer.training:
            return own(query, *args, **kwargs)
        place = id(mixer), len(query)
        made, after = own(query, *args, **{**kwargs, "initial_state": kept.get(place), "output_final_state": True})
        kept[place] = after.detach()
        return made, None

    with _rule_of_mixer(case, keeps):
        yield


@fault(
    "query-scale-left-out",
    "Queries of linear attention are not divided by the root of their width; the norm behind hides all but its eps.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "times what it has to"),
    source="NeuraLegion/shainet#176",
    requires=("linear attention",),
)
def _no_query_scale(case: Case) -> Iterator[None]:
    def unscaled(own: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made, after = own(query, *args, **kwargs)
        return made * query.shape[-1] ** 0.5, after

    with _rule(case, unscaled):
        yield


@fault(
    "key-heads-in-turns",
    "Value heads take key heads in turns (h % keys), where consecutive ones share one (h // group).",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE,),
    source="NeuraLegion/shainet#204",
    requires=("linear attention", "value heads that share a key head"),
)
def _in_turns(case: Case) -> Iterator[None]:
    keys = _mixers(case)[0].num_k_heads

    def turns(own: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group = query.shape[2] // keys
        query, key = (each[:, :, ::group].repeat(1, 1, group, 1) for each in (query, key))
        return own(query, key, *args, **kwargs)

    with _rule(case, turns):
        yield


@fault(
    "decay-exponentiated-twice",
    "A_log is taken for -exp(A_log), which converters store in its place, and the other way round: exp is taken twice.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE,),
    source="NeuraLegion/shainet#204",
    requires=("linear attention",),
)
def _twice(case: Case) -> Iterator[None]:
    def again(mixer: Any, own: Any, *args: Any, g: torch.Tensor, **kwargs: Any) -> Any:
        rate = mixer.A_log.detach().float().exp()
        return own(*args, g=g * (-rate).exp() / rate, **kwargs)

    with _rule_of_mixer(case, again):
        yield


@fault(
    "dt-bias-left-out",
    "The decay of linear attention is made of its projection alone: dt_bias is not added.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE,),
    requires=("linear attention",),
)
def _no_bias(case: Case) -> Iterator[None]:
    from torch.nn.functional import softplus

    rates: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> None:
        rates[:] = [output]

    def plain(mixer: Any, own: Any, *args: Any, g: torch.Tensor, **kwargs: Any) -> Any:
        alone = -mixer.A_log.float().exp() * softplus(rates[0].float())
        return own(*args, g=alone.to(g.dtype), **kwargs)

    with after([mixer.in_proj_a for mixer in _mixers(case)], keep), _rule_of_mixer(case, plain):
        yield


@fault(
    "gates-read-across-a-stride",
    "A kernel reads two gates that lie interleaved in one tensor as if each were contiguous: heads and tokens mix.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE,),
    source="sgl-project/sglang#21836",
    requires=("linear attention",),
)
def _across(case: Case) -> Iterator[None]:
    import torch
    from torch.nn.functional import softplus

    made: dict[str, torch.Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_module: Any, _args: Any, output: torch.Tensor) -> None:
            made[name] = output

        return after([getattr(mixer, name) for mixer in _mixers(case)], keep)

    def flat(mixer: Any, own: Any, *args: Any, g: torch.Tensor, beta: torch.Tensor, **kwargs: Any) -> Any:
        share, rate = made["in_proj_b"], made["in_proj_a"]
        packed = torch.stack([share, rate], dim=-1).flatten()
        share, rate = packed[: share.numel()].view_as(share), packed[1 : 1 + rate.numel()].view_as(rate)
        g = (-mixer.A_log.float().exp() * softplus(rate.float() + mixer.dt_bias)).to(g.dtype)
        return own(*args, g=g, beta=share.sigmoid().to(beta.dtype), **kwargs)

    with keeper("in_proj_b"), keeper("in_proj_a"), _rule_of_mixer(case, flat):
        yield


@fault(
    "convolution-step-out-of-order",
    "While decoding, the newest input takes the convolution's first weight, and the kept ones those behind it.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE, "(decode step 1)"),
    source="vllm-project/vllm-ascend#8544",
    requires=("linear attention",),
)
def _step_out_of_order(case: Case) -> Iterator[None]:
    def turn(own: Any, x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(x, state, weight.roll(-1, dims=-1), *args, **kwargs)

    with _function(case, CONVOLUTION_STEP, turn):
        yield


@fault(
    "convolution-looks-ahead",
    "The convolution of a prompt is padded on both sides: each token sees the one behind it.",
    target="model",
    check="layer_arithmetic",
    expected_words=(RULE,),
    requires=("linear attention",),
)
def _looks_ahead(case: Case) -> Iterator[None]:
    from torch.nn.functional import pad

    def ahead(own: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(pad(x[..., 1:], (0, 1)), *args, **kwargs)

    with _function(case, CONVOLUTION, ahead):
        yield


@fault(
    "gates-taken-for-queries",
    "q_proj's output is split in its middle, where each head's query is followed by its own gate.",
    target="model",
    check="layer_arithmetic",
    expected_words=("attention: model.language_model.layers.", ".self_attn"),
    source="llmmanorg/llmman#16",
    requires=("linear attention",),
)
def _split_in_the_middle(case: Case) -> Iterator[None]:
    def misread(layer: Any) -> Any:
        project, width = layer.inputs[0], layer.attention.head_dim

        def halves(hidden: torch.Tensor) -> Any:
            made: Any = project(hidden)
            return made.unflatten(-1, (2, -1, width)).transpose(-3, -2).flatten(-3)

        return replaced_while_running(layer.attention, "q_proj", halves)

    with all_of([misread(layer) for layer in language_layers(anatomy(case.model)) if layer.attends]):
        yield


@fault(
    "whole-head-rotated",
    "partial_rotary_factor is not read: attention turns the whole of each head, not its first quarter.",
    target="model",
    check="layer_arithmetic",
    expected_words=("attention: model.language_model.layers.", ".self_attn"),
    source="AI-Hypercomputer/maxtext#4616",
    requires=("linear attention",),
)
def _whole_head(case: Case) -> Iterator[None]:
    attending = next(layer for layer in language_layers(anatomy(case.model)) if layer.attends)
    home: Any = sys.modules[type(attending.attention).__module__]
    own = home.apply_rotary_pos_emb

    def whole(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        half = cos.shape[-1] // 2
        times = q.shape[-1] // half
        return own(q, k, cos[..., :half].repeat(1, 1, times), sin[..., :half].repeat(1, 1, times), *args, **kwargs)

    with attribute(home, "apply_rotary_pos_emb", whole):
        yield


@fault(
    "frequencies-of-the-whole-head",
    "A rotary kernel spreads its frequencies over the head's width, and not over the part of it that is turned.",
    target="model",
    check="layer_arithmetic",
    expected_words=("rotary embedding", "turns as with base", "(rope_theta)"),
    source="pie-project/pie#602",
    requires=("linear attention",),
)
def _spread_over_the_head(case: Case) -> Iterator[None]:
    from pytest_qvl.models.layers import rope_of

    parts = anatomy(case.model)
    share = rope_of(parts).share
    with while_running([parts.language_backbone.rotary_emb], "inv_freq", lambda own: own**share):
        yield


@fault(
    "gain-shifted-twice",
    "Weights of the norms were converted to one more than they were, and norms scale by one more than them again.",
    target="model",
    check="layer_arithmetic",
    expected_words=("norm: model.language_model.layers.0.input_layernorm returns", "times what it has to"),
    source="ml-explore/mlx-lm#1623",
    requires=("linear attention",),
)
def _shifted_twice(case: Case) -> Iterator[None]:
    def shifted(norm: Any) -> Any:
        return lambda x: (norm._norm(x.float()) * (2 + norm.weight.float())).type_as(x)

    norms = [norm for layer in language_layers(anatomy(case.model)) for norm in (*layer.norms, *layer.head_norms)]
    with all_of([attribute(norm, "forward", shifted(norm)) for norm in norms]):
        yield


@fault(
    "state-kept-between-prompts",
    "A server gives the slot of a prompt that is done to the next one, and does not empty its state.",
    target="model",
    check="generation_repeatable",
    expected_words=("logits of two runs on the same inputs differ", "remembered between calls"),
    source="InternLM/lmdeploy#4434",
    requires=("linear attention",),
)
def _kept_between_prompts(case: Case) -> Iterator[None]:
    slots: dict[tuple[int, int], torch.Tensor] = {}

    def reuse(mixer: Any, own: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        slot = id(mixer), len(query)
        if not mixer.training and kwargs.get("initial_state") is None:
            kwargs["initial_state"] = slots.get(slot)
        made, after = own(query, *args, **{**kwargs, "output_final_state": True})
        slots[slot] = after.detach()
        return made, after if kwargs.get("output_final_state") else None

    with _rule_of_mixer(case, reuse):
        yield


@fault(
    "state-rounded-between-steps",
    "A kernel computes in float32 and writes the state of linear attention in the dtype of its inputs, bfloat16.",
    target="model",
    check="layer_arithmetic",
    expected_words=(
        "kept state: model.language_model.layers.0.linear_attn is rounded to bfloat16 between two calls",
        "where it has to be one of float32",
    ),
    source="ollama/ollama#15865",
    requires=("linear attention",),
)
def _rounded_state(case: Case) -> Iterator[None]:
    def rounds(own: Any, *args: Any, **kwargs: Any) -> Any:
        made, after = own(*args, **kwargs)
        return made, None if after is None else after.bfloat16().to(after.dtype)

    with _rule(case, rounds):
        yield


@fault(
    "gain-shifted-in-bfloat16",
    "One is added to the weights of norms when they are loaded, and the sum kept in bfloat16: last bits are lost.",
    target="model",
    check="layer_arithmetic",
    expected_words=(
        "norm: model.language_model.layers.0.input_layernorm",
        "scales by 1 + weight rounded to bfloat16, not by that of float32",
    ),
    source="InternLM/lmdeploy#4790",
    requires=("linear attention", "gains that bfloat16 rounds"),
)
def _shifted_in_bfloat16(case: Case) -> Iterator[None]:
    def shifted(norm: Any) -> Any:
        return lambda x: (norm._norm(x.float()) * (1 + norm.weight.float()).bfloat16().float()).type_as(x)

    norms = [norm for layer in language_layers(anatomy(case.model)) for norm in (*layer.norms, *layer.head_norms)]
    with all_of([attribute(norm, "forward", shifted(norm)) for norm in norms]):
        yield
