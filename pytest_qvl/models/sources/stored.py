"""The values that a model was made from, tensor by tensor: a checkpoint's files, or synthetic weights drawn again.

Nothing is kept: a file's tensor is read in pieces of 8 Mi elements, one that was saved in 4 bits or that is drawn again
as a whole, so that a model of any size can be compared beside itself.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.renamed import in_todays_layout
from pytest_qvl.models.sources.base_names import name_of_base
from pytest_qvl.models.sources.hub import model_folder
from pytest_qvl.models.sources.loading import compared_with, compared_with_drawn, kept_report
from pytest_qvl.models.sources.model_source import ModelSourceError, parse_model, stored_tensors, weight_files
from pytest_qvl.models.sources.synthetic import Drawn, draw_again

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.sources.loading import LoadingReport

PIECE = 8 * 2**20  # elements
_STATE = ".quant_state.bitsandbytes__"


def loaded_from(parts: Parts) -> Path | None:
    """The folder that a model was loaded from: as its backend kept it, as it names it, or where the hub's cache has it.

    ``None`` where nobody knows.
    """
    report = kept_report(parts.base)
    if report is not None and report.folder is not None:
        return report.folder.expanduser()
    name = name_of_base(parts)
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        source = parse_model(f"hub:{name}")
    except ModelSourceError:
        return None
    return model_folder(replace(source, revision=getattr(parts.config, "_commit_hash", None)))


class Piece(NamedTuple):
    """A part of a tensor; whole rows only where so many elements were asked for.

    Attributes:
        start: Number of its first element in the flat tensor.
        values: Its elements, flat, in the dtype they are stored in.
    """

    start: int
    values: torch.Tensor


class Stored(Protocol):
    """What a model is compared with.

    Attributes:
        what: What to call it ("checkpoint '/models/qwen'").
        config: The content of its ``config.json``.
        folder: Where its files are; ``None`` where there are none.
    """

    what: str
    config: dict[str, Any]
    folder: Path | None

    def __contains__(self, name: str) -> bool:
        """Whether it holds a tensor of that name in the base model."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, of a 4-bit one that of the packed data."""

    def pieces(self, name: str, multiple: int = 1) -> Iterator[Piece]:
        """A tensor from front to back, each piece but the last a multiple of so many elements."""

    def misfits(self, parts: Parts) -> LoadingReport:
        """Which tensors the model lacks, has in another shape, or has beside them."""

    def packed(self, name: str) -> dict[str, Any] | None:
        """The parts of a weight that is stored in 4 bits, ``None`` for any other.

        Tensors ``weight``, ``absmax``, ``quant_map`` and with double quantization ``nested_absmax`` and
        ``nested_quant_map``; beside them what bitsandbytes keeps as JSON: ``quant_type``, ``blocksize``, ``dtype``,
        ``shape``, and with double quantization ``nested_blocksize``, ``nested_dtype`` and ``nested_offset``.
        """


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: its file, its name in there, its shape."""

    file: Path
    key: str
    shape: tuple[int, ...]


class StoredFolder:
    """A checkpoint's safetensors files; names of before Transformers 4.52 count as today's.

    Args:
        folder: The checkpoint's folder.

    Raises:
        ModelSourceError: A header is not readable.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder: Path | None = folder
        opened: Any = safe_open  # its methods have no annotations
        self._open = cache(lambda file: opened(file, framework="pt"))
        self._four_bit = {in_todays_layout(n) for n, tensor in stored_tensors(folder).items() if tensor.is_4bit}
        self.what = f"checkpoint {str(folder)!r}"
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._places: dict[str, _Place] = {}
        for file in weight_files(folder):
            for key in (content := self._open(file)).keys():  # noqa: SIM118 - a safetensors file is no mapping
                self._places[in_todays_layout(key)] = _Place(file, key, tuple(content.get_slice(key).get_shape()))

    def __contains__(self, name: str) -> bool:
        """See :class:`Stored`."""
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        """See :class:`Stored`."""
        return self._places[name].shape

    def pieces(self, name: str, multiple: int = 1) -> Iterator[Piece]:
        """See :class:`Stored`."""
        place = self._places[name]
        if not place.shape:
            yield Piece(0, self._whole(name).reshape(-1))
            return
        view = self._open(place.file).get_slice(place.key)
        per_row = math.prod(place.shape[1:])
        step = math.lcm(multiple, per_row) // per_row
        step *= max(1, PIECE // (step * per_row))
        for row in range(0, place.shape[0], step):
            yield Piece(row * per_row, view[row : row + step].reshape(-1))

    def misfits(self, parts: Parts) -> LoadingReport:
        """See :class:`Stored`."""
        assert self.folder is not None
        return compared_with(parts.base, self.folder, self.what)

    def packed(self, name: str) -> dict[str, Any] | None:
        """See :class:`Stored`."""
        if name not in self._four_bit:
            return None
        found: dict[str, Any] = {"weight": self._whole(name)}
        for key in self._places:
            if key.startswith(f"{name}{_STATE}"):
                found |= json.loads(bytes(self._whole(key).tolist()))
            elif key.startswith(f"{name}."):
                found[key.removeprefix(f"{name}.")] = self._whole(key)
        return found

    def _whole(self, name: str) -> torch.Tensor:
        place = self._places[name]
        tensor: torch.Tensor = self._open(place.file).get_tensor(place.key)
        return tensor


class StoredSynthetic:
    """Synthetic weights, each drawn again from its own seed when it is asked for.

    Args:
        parts: The model that was built from them.
        drawn: How.
    """

    def __init__(self, parts: Parts, drawn: Drawn) -> None:
        self._parts, self._drawn = parts, drawn
        self._modules = base_modules(parts)
        self.what = f"the synthetic weights of seed {drawn.seed}"
        self.config = drawn.config
        self.folder: Path | None = None

    def __contains__(self, name: str) -> bool:
        """Whether it is a parameter; buffers are computed."""
        module, _, key = name.rpartition(".")
        return key in self._modules[module]._parameters

    def shape(self, name: str) -> tuple[int, ...]:
        """See :class:`Stored`."""
        return self._drawn.tensors[name]

    def pieces(self, name: str, multiple: int = 1) -> Iterator[Piece]:
        """See :class:`Stored`."""
        values = self._draw(name).reshape(-1)
        step = max(1, PIECE // multiple) * multiple
        for start in range(0, values.numel(), step):
            yield Piece(start, values[start : start + step])

    def misfits(self, parts: Parts) -> LoadingReport:
        """See :class:`Stored`."""
        return compared_with_drawn(parts, self._drawn.tensors, f"what was drawn from seed {self._drawn.seed}")

    def packed(self, name: str) -> None:
        """None: synthetic weights are packed while they are built."""

    def _draw(self, name: str) -> torch.Tensor:
        return draw_again(self._parts, self._modules[name.rpartition(".")[0]], name, self._drawn)
