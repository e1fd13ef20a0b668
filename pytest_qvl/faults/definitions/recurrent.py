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
    mixers = _mixers(case)
    kept: dict[tuple[int, int], torch.Tensor] = {}
    running = [0]

    def note(module: Any, args: Any, kwargs: Any) -> Any:
        running[0] = id(module)
        return args, kwargs

    def keeps(own: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not mixers[0].training:
            return own(query, *args, **kwargs)
        place = running[0], len(query)
        made, after = own(query, *args, **{**kwargs, "initial_state": kept.get(place), "output_final_state": True})
        kept[place] = after.detach()
        return made, None

    with before(mixers, note), _function(case, CHUNKED, keeps):
        yield
