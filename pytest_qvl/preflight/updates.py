"""What an adapter adds to each weight: its matrices by the module they mean, and the numbers they have together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.lora_request import patterned
from pytest_qvl.oracles.lora import scaling_of
from pytest_qvl.preflight.files.values import FLOATS, NARROW_FLOATS, read_whole
from pytest_qvl.preflight.starts import LARGE_START, Start, start_of, taking
from pytest_qvl.preflight.timing import patience

if TYPE_CHECKING:
    import torch

    from pytest_qvl.models.anatomy import Group
    from pytest_qvl.preflight.files.headers import Tensor
    from pytest_qvl.preflight.subject import Subject

_PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


@dataclass(frozen=True)
class Factors:
    """An update as a product: ``scaling * left @ right`` is what is added, before DoRA.

    Attributes:
        left: ``(rows of the weight, rank)`` float32.
        right: ``(rank, columns)`` float32.
        scaling: By which the product is multiplied.
        magnitude: DoRA's row norms, ``(rows,)`` float32, or None.
        taken: How many of the last columns of `left` and rows of `right` are what the start took out of the base.
        taken_error: How far an element of that may be off.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    taken: int = 0
    taken_error: float = 0.0

    @property
    def own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B and A alone, without what the start took out."""
        rank = len(self.right) - self.taken
        return self.left[:, :rank], self.right[:rank]

    def rows(self, weight: torch.Tensor, start: int) -> torch.Tensor:
        """What is added to rows of the weight from `start` on.

        DoRA (Liu et al. 2024): ``m / norm(W + s B A) * (W + s B A) - W``, norms by row.

        Args:
            weight: Rows of the base weight, ``(n, columns)`` float32.
            start: Number of the first of them.
        """
        import torch

        added: torch.Tensor = (self.left[start : start + len(weight)] * self.scaling) @ self.right
        if self.magnitude is None:
            return added
        whole: torch.Tensor = weight + added
        gain: torch.Tensor = self.magnitude[start : start + len(weight)] / torch.linalg.vector_norm(whole, dim=1)
        return whole * gain[:, None] - weight

    @cached_property
    def squared_norm(self) -> float:
        """Of ``scaling * left @ right``, by Frobenius: the trace of the product of both Gram matrices."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum()) * self.scaling**2

    def singular_values(self) -> torch.Tensor:
        """Of ``scaling * left @ right``, largest first, ``(rank,)`` float64: those of ``R1 @ R2.T`` of two QR steps."""
        import torch

        first = torch.linalg.qr(self.left.double(), mode="r")[1]
        second = torch.linalg.qr(self.right.double().T, mode="r")[1]
        found: torch.Tensor = torch.linalg.svdvals(first @ second.T)
        return found * abs(self.scaling)


@dataclass(frozen=True)
class Update:
    """What the adapter adds to one weight.

    Attributes:
        module: The module's name in the model.
        group: The part of the model it belongs to.
        down: A, by its header.
        up: B, by its header.
        scaling: ``alpha / r`` of this module (rsLoRA: ``alpha / sqrt(r)``).
        rank: ``r`` of this module, by the configuration.
        magnitude: DoRA's magnitudes, by their header, or None.
        embedding: Whether rows of the weight are tokens, so that the product is transposed.
        start: What its start took out of the base's weight, or None.
        unknown: Why what it adds cannot be told from the files; empty if it can.
    """

    module: str
    group: Group
    down: Tensor
    up: Tensor
    scaling: float
    rank: int
    magnitude: Tensor | None = None
    embedding: bool = False
    start: Start | None = None
    unknown: str = ""

    @property
    def not_at_hand(self) -> str:
        """Why what it adds is not told without reading the base's weight whole; empty if it is."""
        large = self.start is not None and not self.start.is_small
        return self.unknown or (LARGE_START if large else "")

    def factors(self) -> Factors:
        """Its matrices, read from the file.

        Raises:
            UnsafeFileError: One is larger than any real one.
            ModelSourceError: The file has become shorter.
        """
        down, up = read_whole(self.down).float().flatten(1), read_whole(self.up).float().flatten(1)
        left, right = (down.T.contiguous(), up.T.contiguous()) if self.embedding else (up, down)
        magnitude = None if self.magnitude is None else read_whole(self.magnitude).float().flatten()
        if self.start is None:
            return Factors(left, right, self.scaling, magnitude)
        import torch

        taken = self.start.taken
        both = torch.cat((left, taken.left / -self.scaling), 1), torch.cat((right, taken.right))
        return Factors(*both, self.scaling, magnitude, len(taken.right), taken.error)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight that it belongs to, by the headers."""
        rows, columns = self.up.shape[0], math.prod(self.down.shape[1:])
        return (columns, rows) if self.embedding else (rows, columns)


class BiasUpdate(Update):
    """What the bias of B (``lora_bias``) adds to a layer's bias, ``scaling * b``: a weight of one column.

    ``module`` is the name of the layer's bias; ``down`` and ``up`` are b.
    """

    def factors(self) -> Factors:
        """B's bias as a column, times one."""
        import torch

        return Factors(read_whole(self.up).float().view(-1, 1), torch.ones(1, 1), self.scaling)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the layer, and one column."""
        return self.up.numel, 1


@dataclass(frozen=True)
class Updates:
    """Everything that the adapter's file holds, by what it means.

    Attributes:
        pairs: What A and B add, by the module's name.
        biases: What biases of B add, by the name of the layer's bias.
        copies: Tensors that stand in place of the base's (``modules_to_save``, trained biases), by the tensor's name.
        token_rows: Rows that stand in place of the embedding's (``trainable_token_indices``), by the module's name.
        beyond: Keys that are not judged here, with the reason.
    """

    pairs: Mapping[str, Update]
    biases: Mapping[str, BiasUpdate]
    copies: Mapping[str, Tensor]
    token_rows: Mapping[str, Tensor]
    beyond: Mapping[str, str]

    @cached_property
    def not_at_hand(self) -> dict[str, list[str]]:
        """Modules of which it is not told here what is added, by the reason."""
        found: dict[str, list[str]] = {}
        for module, update in self.pairs.items():
            if update.not_at_hand:
                found.setdefault(update.not_at_hand, []).append(module)
        return found


def find_updates(subject: Subject) -> Updates:
    """What the tensors of the adapter's file mean, by their headers.

    Raises:
        ModelSourceError: No LoRA configuration can be made of the adapter's fields.
    """
    adapter = subject.adapter
    assert adapter is not None
    halves: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    token_rows: dict[str, Tensor] = {}
    beyond: dict[str, str] = {}
    of_b: dict[str, Tensor] = {}
    for text, (key, module, _) in subject.placed.items():
        tensor = adapter.tensors[text]
        if not module:
            beyond[text] = "it names no module of this model"
        elif tensor.dtype not in (*FLOATS, *NARROW_FLOATS):
            beyond[text] = f"it is stored as {tensor.dtype}"
        elif key.part == "rows":
            token_rows[module] = tensor
        elif key.part and key.is_bias:
            of_b[module] = tensor
        elif key.part:
            halves.setdefault(module, {})[key.part] = tensor
        else:
            copies[f"{module}.{'bias' if key.is_bias else 'weight'}"] = tensor
    pairs: dict[str, Update] = {}
    with patience("rank_pattern and alpha_pattern of the adapter"):
        for module, parts in halves.items():
            update = _pair(subject, module, parts)
            if isinstance(update, str):
                beyond |= {tensor.name: update for tensor in parts.values()}
            else:
                pairs[module] = update
    fitting = {module: tensor for module, tensor in of_b.items() if _fits(tensor, pairs.get(module))}
    biases = {f"{module}.bias": _bias(pairs[module], tensor) for module, tensor in fitting.items()}
    lonely = of_b.keys() - fitting.keys()
    beyond |= {of_b[module].name: "no B is there of the size of its bias" for module in lonely}
    return Updates(pairs, biases, copies, token_rows, beyond)


def _fits(bias: Tensor, pair: Update | None) -> bool:
    return pair is not None and not pair.embedding and bias.numel == pair.shape[0]


def _bias(pair: Update, tensor: Tensor) -> BiasUpdate:
    return BiasUpdate(f"{pair.module}.bias", pair.group, tensor, tensor, pair.scaling, pair.rank)


def _pair(subject: Subject, module: str, parts: Mapping[str, Tensor]) -> Update | str:
    """An update, or why there is none to judge."""
    config: Any = subject.lora
    kind = next((down for down, up in _PAIRS.items() if {down, up} <= parts.keys()), "")
    if not kind:
        return "one of A and B is missing"
    down, up, magnitude = parts[kind], parts[_PAIRS[kind]], parts.get("lora_magnitude_vector")
    embedding = kind == "lora_embedding_A"
    if len(down.shape) < 2 or len(up.shape) < 2 or math.prod(up.shape[1:]) != down.shape[0] or not down.numel:
        return f"A of {list(down.shape)} and B of {list(up.shape)} cannot be multiplied"
    found = subject.parts.base.get_submodule(module)
    rank = patterned(config.rank_pattern or {}, module, config.r)
    alpha = patterned(config.alpha_pattern or {}, module, config.lora_alpha)
    scaling = scaling_of(alpha, rank, rank_stabilised=bool(config.use_rslora)) if rank > 0 else 0.0
    update = Update(module, subject.parts.group_of(module), down, up, scaling, rank, magnitude, embedding)
    weight = getattr(found, "weight", None)
    if weight is None or update.shape != (weight.shape[0], math.prod(weight.shape[1:])):
        return "its matrices are not of this module's size"
    if magnitude is not None and (embedding or len(weight.shape) > 2 or magnitude.numel != weight.shape[0]):
        return "DoRA is judged on linear layers"
    return _started(subject, update, found)


def _started(subject: Subject, update: Update, module: Any) -> Update:
    """With what its start took out of the base."""
    assert subject.adapter is not None
    init = subject.adapter.init
    if taking(init) is None:
        return update
    name = f"{update.module}.weight"
    place = subject.weights, name if name in subject.weights else ""
    start = start_of(str(init), place, module, update.down.shape[0], update.scaling)
    return replace(update, unknown=start) if isinstance(start, str) else replace(update, start=start)
