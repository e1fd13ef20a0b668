"""Where things are inside a Qwen-VL model; what a single layer is made of is in :mod:`pytest_qvl.models.layers`.

Module trees differ by release (Transformers 4.52 moved the vision tower from ``visual`` to ``model.visual``) and
by wrapping (PEFT adds ``base_model.model``). Everything else in this package asks :func:`anatomy`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_qvl.evidence import InputTypeError
from pytest_qvl.models.families import FAMILIES

if TYPE_CHECKING:
    import torch
    from torch import nn

Group = Literal["language", "vision", "merger", "lm_head", "embeddings", "other"]
GROUPS: tuple[Group, ...] = ("language", "vision", "merger", "lm_head", "embeddings", "other")
# What turns pixels into visual tokens.
TOWER: tuple[Group, ...] = ("vision", "merger")


class UnknownModelError(InputTypeError):
    """The object is not a Qwen-VL model that this package knows."""


@dataclass(frozen=True)
class Parts:
    """The named parts of one model, wrapped by PEFT or not.

    Attributes:
        wrapped: The object that was given; call this one.
        base: The ``...ForConditionalGeneration`` inside it.
        core: The multimodal model without the head (``base.model``); owns ``rope_deltas``.
        vision_tower: Patches in, merged visual tokens out.
        patch_embed: First layer of the vision tower.
        blocks: The vision blocks.
        merger: The multimodal projector.
        language_backbone: Embeddings in, hidden states out.
        embeddings: Text embedding table.
        lm_head: Output head.
        family: ``"Qwen2.5-VL"`` and so on.
        image_token_id: Placeholder token of images (``<|image_pad|>``).
        video_token_id: Placeholder token of videos.
        vision_token_ids: All ids that stand for vision and must never be generated.
        merge_size: Patches per visual token along each side.
        roots: Dotted name in ``base`` of each group's root module, the most specific first.
    """

    wrapped: nn.Module
    base: Any
    core: Any
    vision_tower: nn.Module
    patch_embed: nn.Module
    blocks: nn.ModuleList
    merger: nn.Module
    language_backbone: Any
    embeddings: nn.Embedding
    lm_head: nn.Module
    family: str
    image_token_id: int
    video_token_id: int
    vision_token_ids: tuple[int, ...]
    merge_size: int
    roots: dict[Group, str]

    @property
    def config(self) -> Any:
        """The configuration of the whole model, with ``vision_config`` and ``text_config`` inside."""
        return self.base.config

    @property
    def text_config(self) -> Any:
        """The language backbone's part of the configuration."""
        return self.base.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """The device of the text embeddings, where ``input_ids`` have to be."""
        return self.embeddings.weight.device

    @property
    def vocabulary(self) -> int:
        """Rows of the text embeddings, adapted, packed or neither."""
        declared = getattr(self.embeddings, "num_embeddings", None)
        return declared if isinstance(declared, int) else int(self.embeddings.weight.shape[0])

    @property
    def is_peft(self) -> bool:
        """Whether a ``PeftModel`` wraps the base model (an adapter added by Transformers has no wrapper)."""
        return self.wrapped is not self.base

    def group_of(self, name: str) -> Group:
        """The group that a module or parameter of :attr:`base` belongs to, by its dotted name in ``base``."""
        for group, prefix in self.roots.items():
            if name == prefix or name.startswith(prefix + "."):
                return group
        return "other"

    def named_linears(self) -> Iterator[tuple[str, nn.Module]]:
        """Every linear layer of :attr:`base` by the name that it has without PEFT; nothing that PEFT has added."""
        from torch import nn

        from pytest_qvl.models.adapters import base_modules

        for name, module in base_modules(self).items():
            if isinstance(module, nn.Linear):
                yield name, module


def _near_the_root(module: nn.Module, name: str = "", depth: int = 3) -> Iterator[tuple[str, nn.Module]]:
    """Modules by dotted name, down to ``model.language_model.embed_tokens``: walking all layers takes milliseconds."""
    yield name, module
    for key, child in module.named_children() if depth else ():
        yield from _near_the_root(child, f"{name}.{key}" if name else key, depth - 1)


def unwrap(model: Any) -> Any:
    """The ``...ForConditionalGeneration`` inside a PEFT wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def anatomy(model: Any) -> Parts:
    """Name the parts of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 model, bare or wrapped.

    Raises:
        UnknownModelError: The object is no such model.
    """
    base = unwrap(model)
    if callable(getattr(base, "get_base_model", None)) or type(model).__name__ == "PeftMixedModel":
        raise UnknownModelError(
            f"{type(model).__name__} holds a {type(base).__name__}: wrap the base model once, with "
            "peft.get_peft_model, and put further adapters on it with add_adapter"
        )
    config: Any = getattr(base, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    core = getattr(base, "model", None)
    if family is None or core is None or not hasattr(core, "language_model"):
        labels = ", ".join(known.label for known in FAMILIES.values())
        raise UnknownModelError(
            f"{type(model).__name__} (model_type {getattr(config, 'model_type', None)!r}) is not a model this package "
            f"knows; expected {labels} for conditional generation on Transformers >= 4.57"
        )
    vision = core.visual
    text_ids = (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "vision_token_id",
    )
    names = {id(module): name for name, module in _near_the_root(base)}
    roots: dict[Group, str] = {
        "merger": names[id(vision.merger)],
        "vision": names[id(vision)],
        "embeddings": names[id(core.language_model.embed_tokens)],
        "language": names[id(core.language_model)],
        "lm_head": names[id(base.lm_head)],
    }
    vision_ids = sorted({i for name in text_ids if isinstance(i := getattr(config, name, None), int)})
    return Parts(
        wrapped=model,
        base=base,
        core=core,
        vision_tower=vision,
        patch_embed=vision.patch_embed,
        blocks=vision.blocks,
        merger=vision.merger,
        language_backbone=core.language_model,
        embeddings=core.language_model.embed_tokens,
        lm_head=base.lm_head,
        family=family.label,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_token_ids=tuple(vision_ids),
        merge_size=config.vision_config.spatial_merge_size,
        roots=roots,
    )
