"""One training step cut into the language model's layers, each with what went in and the gradient that came back."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pytest_qvl.checks.support.activations import leaves, outputs
from pytest_qvl.checks.support.cross_entropy import token_losses
from pytest_qvl.checks.support.rounding import a_last_place_off, coarsest, last_place_noise
from pytest_qvl.checks.support.scoring import coarsest_dtype
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.autocast import autocast_dtype, autocast_to
from pytest_qvl.models.layers import MIXER
from pytest_qvl.models.training import without_dropout

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from pytest_qvl.checks.support.head_replay import HeadReplay
    from pytest_qvl.models.anatomy import Group, Parts

    RandomStates = tuple[torch.Tensor, dict[torch.device, torch.Tensor]]


NORMS = ("input_layernorm", "post_attention_layernorm")
BRANCHES = (("self_attn", MIXER), ("mlp",))  # one of each


class Segment(Protocol):
    """A part of the model between two hidden states, or between the last of them and the loss.

    Attributes:
        name: Dotted name of the layer in the base model, or ``"norm, head and loss"``.
        parameters: What is trained in it, by name in the base model, with gradients as autograd left them.
        dtype: The coarsest that it computes in.
        adds_up: Whether no sum with the residual stream is rounded in the value, so that inputs a last place apart
            round independently.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype
    adds_up: bool | None

    @property
    def x(self) -> torch.Tensor:
        """The hidden states that went in, ``(rows, length, width)``."""

    @property
    def gradient(self) -> torch.Tensor | None:
        """Autograd's gradient of the loss at ``x``, of its shape in float32; ``None`` where none was asked for."""

    @property
    def outgoing(self) -> torch.Tensor | None:
        """The same at what comes out; ``None`` of the segment that ends with the loss."""

    def branch_gradients(self) -> list[torch.Tensor]:
        """Of the loss at what each norm inside puts out, of the shape of ``x``; a backward pass of this part alone.

        They are to be moved along, not judged: what comes before these norms has no part in them.
        """

    def value(self, x: torch.Tensor) -> float:
        """The loss, to first order in what comes out, for other hidden states, with the same dropout; in float64."""

    def noise(self, times: int) -> torch.Tensor:
        """By how much the value at ``x`` differs when all that rounds is a last place off, token by token.

        Returns:
            ``(times, tokens)`` float64, independent of each other.
        """


@dataclass
class _Call:
    """A layer's call: input, keyword arguments, random states and autocast before it; its gradient, scaled."""

    x: torch.Tensor
    kwargs: dict[str, Any]
    random: RandomStates
    autocast: torch.dtype | None
    scaled_gradient: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def gradient(self) -> torch.Tensor | None:
        """In float32, not scaled; made anew every time, for it is twice as large as what is kept."""
        return None if self.scaled_gradient is None else self.scaled_gradient.float() / self.scale


@dataclass
class Layers:
    """What the layers and the final norm of the language backbone were called with, each the first time only.

    Attributes:
        parts: The model.
        modules: Layers and norm by name.
        calls: Their calls.
        dtypes: What the innermost modules of each gave, and autocast where they ran, by the name of the segment.
    """

    parts: Parts
    modules: dict[str, Any]
    calls: dict[str, _Call] = field(default_factory=dict)
    dtypes: dict[str, set[torch.dtype | None]] = field(default_factory=dict)

    def note(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a call, and the gradient that will come back to its input."""
        if name in self.calls:  # computed again by checkpointing
            return
        given = dict(kwargs)
        x = args[0] if args else given.pop("hidden_states")
        call = self.calls[name] = _Call(x.detach(), given, _random_states(module), autocast_dtype(x.device.type))
        if x.requires_grad:
            x.register_hook(partial(setattr, call, "scaled_gradient"))

    def note_dtype(self, name: str, _module: Any, _args: Any, output: Any) -> None:
        """Keep what a module inside of a segment computed in."""
        import torch

        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.dtypes.setdefault(name, set()).update((output.dtype, autocast_dtype(output.device.type)))

    def segments(self, replay: HeadReplay, labels: torch.Tensor, scale: float) -> tuple[list[Segment], list[str]]:
        """Every layer and the end of the model, after a backward pass; then layers before all that is trained.

        To these no gradient has to come back, so that there is none to be judged.

        Args:
            replay: The model behind its core.
            labels: ``(rows, length)``.
            scale: What the loss was multiplied by.

        Raises:
            CannotJudge: A layer was not called, or no gradient came back to what it put out.
        """
        silent = [name for name in self.modules if name not in self.calls]
        if silent:
            raise CannotJudge(f"the forward does not call {silent[0]} as a layer of its own, so it cannot be looked at")
        *names, norm = self.modules
        shared = self._shared()
        found: list[Segment] = []
        before: list[str] = []
        for call in self.calls.values():
            call.scale = scale
        for name, following in zip(names, [*names[1:], norm], strict=True):
            module = self.modules[name]
            if self.calls[following].scaled_gradient is None:
                if found or any(parameter.requires_grad for parameter in module.parameters()):
                    raise CannotJudge(
                        f"the loss has no gradient behind {name}; training_step says what it does not reach"
                    )
                before.append(name)
                continue
            own = _trained(module, name, shared)
            call = self.calls[name]
            found.append(Layer(name, own, self._dtype(name, "language"), module, call, self.calls[following]))
        head = self.parts.roots["lm_head"]
        end = {**_trained(self.modules[norm], norm, shared), **_trained(self.parts.lm_head, head, shared)}
        dtype = self._dtype(norm, "lm_head")
        found.append(End("norm, head and loss", end, dtype, self.calls[norm], self.parts, replay, labels))
        return found, before

    def _dtype(self, name: str, group: Group) -> torch.dtype:
        """The coarsest dtype of a segment: its stream's, its linears', what was given inside, and autocast's."""
        inside = self.dtypes.get(name, ())
        return coarsest((self.calls[name].x.dtype, coarsest_dtype(self.parts, (group,)), *inside))

    def _shared(self) -> set[int]:
        """Parameters that several parts of the model hold, whose gradient is a sum."""
        seen: dict[int, int] = {}
        for holder in [*self.modules.values(), self.parts.lm_head, self.parts.embeddings]:
            for parameter in holder.parameters():
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
        return {each for each, count in seen.items() if count > 1}


def _branch(layer: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def _trained(module: nn.Module, name: str, shared: set[int]) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": parameter
        for key, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is not None and id(parameter) not in shared
    }


@contextmanager
def layers_recorded(parts: Parts) -> Iterator[Layers]:
    """Record what the layers of the language backbone are called with inside the block."""
    backbone = parts.language_backbone
    root = parts.roots["language"]
    modules = {f"{root}.layers.{number}": layer for number, layer in enumerate(backbone.layers)}
    recorded = Layers(parts, {**modules, f"{root}.norm": backbone.norm})
    handles = [
        module.register_forward_pre_hook(partial(recorded.note, name), with_kwargs=True)
        for name, module in recorded.modules.items()
    ]
    handles += [
        leaf.register_forward_hook(partial(recorded.note_dtype, name))
        for name, module in [*recorded.modules.items(), (f"{root}.norm", parts.lm_head)]
        for leaf in leaves(module)
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def norms_held(parts: Parts) -> Iterator[None]:
    """Let DoRA divide by the norms of the first forward in the block, whatever the weights are in later ones.

    By its definition (arXiv:2402.09353, section 4.3) they are constants, and its gradients are those of such a loss.
    """
    layers: list[Any] = [module for module in parts.base.modules() if hasattr(module, "get_weight_norm")]
    try:
        for layer in layers:
            object.__setattr__(layer, "get_weight_norm", _once(layer.get_weight_norm))
        yield
    finally:
        for layer in layers:
            vars(layer).pop("get_weight_norm", None)


def _once(function: Any) -> Any:
    kept: list[Any] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(function(*args, **kwargs).detach())
        return kept[0]

    return first


@dataclass
class Layer:
    """A decoder layer; see :class:`Segment`.

    Attributes:
        module: The layer.
        call: What it was called with.
        following: What the next one was.
        adds_up: Whether what it puts out is what goes in and what attention and MLP add, but for two roundings. These
            sums are taken in float64 then: in a layer that adds little to the stream, rounding them hides more of the
            loss's derivative than all that it computes. ``None`` before it was called.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype
    module: Any
    call: _Call
    following: _Call
    adds_up: bool | None = None

    @property
    def x(self) -> torch.Tensor:
        """See :class:`Segment`."""
        return self.call.x

    @property
    def gradient(self) -> torch.Tensor | None:
        """See :class:`Segment`."""
        return self.call.gradient

    @property
    def outgoing(self) -> torch.Tensor:
        """See :class:`Segment`."""
        found = self.following.gradient
        assert found is not None
        return found

    def _out(self, x: torch.Tensor) -> torch.Tensor:
        """What comes out, in float64; where the layer is a sum, without the rounding of that."""
        import torch

        with torch.no_grad(), outputs([_branch(self.module, names) for names in BRANCHES]) as added:
            out = self._called(x).double()
        if self.adds_up is False or len(added) != len(BRANCHES):
            return out
        attended = x.to(out.device).double() + added[0].double()
        exact = attended + added[1].double()
        if self.adds_up is None:
            limits = torch.finfo(self.x.dtype)
            step = limits.eps * (attended.abs() + out.abs()).clamp_min(limits.tiny)
            self.adds_up = bool(((out - exact).abs() <= step).all())
        return exact if self.adds_up else out

    def _called(self, x: torch.Tensor) -> torch.Tensor:
        with autocast_to(self.x.device.type, self.call.autocast):
            made = self.module(x, **self.call.kwargs)
        out: torch.Tensor = made[0] if isinstance(made, tuple) else made
        return out

    def branch_gradients(self) -> list[torch.Tensor]:
        """See :class:`Segment`."""
        import torch

        begun: list[torch.Tensor] = []

        def begin(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            begun.append(output.detach().requires_grad_())
            return begun[-1]

        norms = [norm for name in NORMS if (norm := getattr(self.module, name, None)) is not None]
        handles = [norm.register_forward_hook(begin) for norm in norms]
        try:
            _put_random_states(self.call.random)
            with torch.enable_grad():
                out = self._called(self.x)
                # Scaled, as it came back: the direction is the same, and float16 would lose the rest.
                found = torch.autograd.grad(out, begun, self.following.scaled_gradient, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        return [each for each in found if each is not None]

    def value(self, x: torch.Tensor) -> float:
        """See :class:`Segment`."""
        _put_random_states(self.call.random)
        return float((self._out(x) * self.outgoing.double()).sum())

    def noise(self, times: int) -> torch.Tensor:
        """See :class:`Segment`; the elements of one token are not independent of each other.

        What the layer puts out is a last place off too where its sums with the residual stream are rounded: in a layer
        that adds little to the stream by far more than all of what it adds.
        """
        import torch

        outgoing, moved, eps = self.outgoing.double(), [], torch.finfo(self.dtype).eps
        with without_dropout(self.module):
            still = self._out(self.x)
            with last_place_noise(leaves(self.module), eps if self.dtype != self.x.dtype else 0.0):
                for _ in range(times):
                    out = self._out(self.x)
                    off = (out if self.adds_up else a_last_place_off(out.to(self.x.dtype)).double()) - still
                    moved.append((off * outgoing).sum(dim=-1).flatten())
        return torch.stack(moved)


@dataclass
class End:
    """Final norm, head and loss; see :class:`Segment`."""

    name: str
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype
    call: _Call
    parts: Parts
    replay: HeadReplay
    labels: torch.Tensor
    outgoing: None = None
    adds_up: bool | None = True

    @property
    def x(self) -> torch.Tensor:
        """See :class:`Segment`."""
        return self.call.x

    @property
    def gradient(self) -> torch.Tensor | None:
        """See :class:`Segment`."""
        return self.call.gradient

    def branch_gradients(self) -> list[torch.Tensor]:
        """See :class:`Segment`; there are no branches."""
        return []

    def _output(self, x: torch.Tensor) -> Any:
        import torch

        with torch.no_grad():
            with autocast_to(self.x.device.type, self.call.autocast):
                hidden = self.parts.language_backbone.norm(x)
            return self.replay(self.labels, hidden=hidden)

    def value(self, x: torch.Tensor) -> float:
        """See :class:`Segment`."""
        _put_random_states(self.call.random)
        return float(self._output(x).loss)

    def noise(self, times: int) -> torch.Tensor:
        """See :class:`Segment`; the loss as a whole counts as one token where the model returns no logits for it."""
        import torch

        modules = [*leaves(self.parts.language_backbone.norm), *leaves(self.parts.lm_head)]
        eps = torch.finfo(self.dtype).eps
        with without_dropout(self.parts.lm_head):
            still = self._losses(self._output(self.x))
            with last_place_noise(modules, eps if self.dtype != self.x.dtype else 0.0):
                return torch.stack([self._losses(self._output(self.x)) - still for _ in range(times)])

    def _losses(self, output: Any) -> torch.Tensor:
        """What each supervised token adds to the loss, ``(tokens,)`` float64."""
        import torch

        logits = getattr(output, "logits", None)
        # Unsloth returns an object in their place, whose attributes are functions.
        if not isinstance(logits, torch.Tensor) or logits.shape[:2] != self.labels.shape:
            return torch.tensor([float(output.loss)], dtype=torch.float64)
        found = token_losses(logits, self.labels)
        return torch.tensor(found.values, dtype=torch.float64) * abs(float(output.loss) / found.total)


def _random_states(module: nn.Module) -> RandomStates:
    """What the dropout of a module draws from: its own devices' generators, wherever its input comes from."""
    import torch

    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


def _put_random_states(states: RandomStates) -> None:
    import torch

    torch.set_rng_state(states[0])
    for device, state in states[1].items():
        torch.cuda.set_rng_state(state, device)
