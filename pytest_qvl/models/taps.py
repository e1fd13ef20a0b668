"""What flows where inside a forward: features, embeddings and positions as the modules really receive them.

Hooks on the real modules, so that a wrapper, a patched forward or a release that moves code cannot hide from a check.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.anatomy import Parts
from pytest_qvl.models.autocast import autocast_dtype
from pytest_qvl.models.renamed import kv_cache_in

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LanguageCall:
    """One call of the language backbone.

    Attributes:
        inputs_embeds: ``(batch, length, hidden)``, compute dtype, after visual tokens were scattered in.
        position_ids: ``(3, batch, length)`` int64: t, h, w as the rotary embedding receives them.
        attention_mask: The mask that was passed in, or ``None``.
        past_length: Tokens already in the KV cache.
    """

    inputs_embeds: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: Any
    past_length: int


@dataclass(frozen=True)
class VisionCall:
    """One call of the vision tower.

    Attributes:
        pixel_values: ``(patches, channels * temporal_patch * patch * patch)`` as the tower received them.
        grid_thw: ``(images, 3)`` int64, in patches.
        features: ``(visual tokens, hidden)``: merged visual tokens, window order undone.
        requires_grad: Whether autograd followed the tower.
        autocast: The dtype of the ``torch.autocast`` that it ran under; None outside of one.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    features: torch.Tensor
    requires_grad: bool
    autocast: torch.dtype | None


@dataclass
class Tap:
    """Everything recorded while a :func:`tapped` block ran, in call order."""

    language: list[LanguageCall] = field(default_factory=list)
    vision: list[VisionCall] = field(default_factory=list)
    _pending: dict[str, Any] = field(default_factory=dict)


def vision_features(output: Any) -> torch.Tensor:
    """Merged visual tokens out of whatever this release's vision tower returns."""
    features: torch.Tensor
    if isinstance(output, tuple):
        features = output[0]
    elif hasattr(output, "pooler_output"):
        features = output.pooler_output
    else:
        features = output
    return features


@contextmanager
def tapped(parts: Parts) -> Iterator[Tap]:
    """Record every call of the vision tower and the language backbone inside the block.

    Tensors are cloned (detached): in-place work later in the forward cannot change what was seen.
    """
    tap = Tap()

    def before_language(_module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kv_cache_in(kwargs)
        tap._pending = {
            "inputs_embeds": kwargs["inputs_embeds"].detach().clone(),
            "attention_mask": kwargs.get("attention_mask"),
            "past_length": 0 if cache is None else int(cache.get_seq_length()),
        }

    def before_rotary(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        if tap._pending:
            tap.language.append(LanguageCall(position_ids=positions.detach().clone(), **tap._pending))
            tap._pending = {}

    def after_vision(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        features = vision_features(output)
        pixels: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("pixel_values"))
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        tap.vision.append(
            VisionCall(
                pixels.detach().clone(),
                grid.clone(),
                features.detach().clone(),
                features.requires_grad,
                autocast_dtype(features.device.type),
            )
        )

    handles = [
        parts.language_backbone.register_forward_pre_hook(before_language, with_kwargs=True),
        parts.language_backbone.rotary_emb.register_forward_pre_hook(before_rotary, with_kwargs=True),
        parts.vision_tower.register_forward_hook(after_vision, with_kwargs=True),
    ]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def features_replaced(parts: Parts, change: Any) -> Iterator[None]:
    """Pass the vision tower's merged visual tokens through ``change(features) -> features`` inside the block.

    ``features`` is ``(visual tokens, hidden)`` of the whole batch; the result must have the same shape and dtype.
    """

    def after_vision(_module: Any, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        if hasattr(output, "pooler_output"):
            output.pooler_output = change(output.pooler_output)
            return output
        return change(output)

    handle = parts.vision_tower.register_forward_hook(after_vision)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def embeddings_changed(parts: Parts, change: Any) -> Iterator[None]:
    """Pass ``inputs_embeds`` ``(batch, length, hidden)`` through ``change`` on its way into the language backbone."""

    def before_language(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "inputs_embeds": change(kwargs["inputs_embeds"])}

    handle = parts.language_backbone.register_forward_pre_hook(before_language, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def positions_changed(parts: Parts, change: Any) -> Iterator[None]:
    """Pass the rotary embedding's ``(3, batch, length)`` position ids through ``change`` inside the block."""

    def before_rotary(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": change(kwargs["position_ids"])}
        return (args[0], change(args[1]), *args[2:]), kwargs

    handle = parts.language_backbone.rotary_emb.register_forward_pre_hook(before_rotary, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def forget_positions(parts: Parts) -> None:
    """Drop the ``rope_deltas`` that an earlier call left behind (huggingface/transformers#36013)."""
    parts.core.rope_deltas = None
