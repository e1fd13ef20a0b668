"""Lets what needs torchvision or torchaudio be imported beside a CPU torch, which their wheels are not built for."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# What torchvision registers a fake of while it is imported, and no image processor calls.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []


def declare_operators() -> bool:
    """Declare torchvision's compiled operators where its wheel cannot load them; whether that was needed.

    The package index has torchvision built for CUDA only, which a CPU build of torch cannot load. Its transforms are
    Python over torch and work all the same; only the import fails, since it asks for operators of object detection.
    """
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in OPERATORS:
            library.define(schema)
        _kept.append(library)
        import torchvision  # noqa: F401
    return bool(_kept)


def stand_in(names: Iterable[str]) -> None:
    """Put an empty module in place of each that is imported and never called for images, video and text."""
    for name in names:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)  # libraries that ask whether it is installed look here
        sys.modules.setdefault(name, module)
