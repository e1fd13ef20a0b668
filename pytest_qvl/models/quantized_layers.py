"""Which linear layers are in 4 bits on purpose, as a user says it: parts of the model, and names of layers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pytest_qvl.evidence import InputError
from pytest_qvl.models.anatomy import GROUPS, Group

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_KEPT = "16bit"
_PIECE = r"(?:[\w*?-]|\[!?[\w-]+\])+"
_LAYER_NAME = re.compile(rf"{_PIECE}(?:\.{_PIECE})*")


@dataclass(frozen=True)
class QuantizedLayers:
    """Which linear layers are in 4 bits; all others stay in 16 bits.

    An entry is a part of the model (``"language"``) or a name of layers: the end of a layer's path (``"in_proj_a"``,
    ``"layers.0.mlp.up_proj"``) or of a module's that it is in (``"linear_attn"``), with the wildcards of
    :mod:`fnmatch` (``"in_proj_[ab]"``; ``*`` goes over dots).

    Attributes:
        quantized: What is in 4 bits; a name counts more than a part.
        kept: What is not, of that; a name here counts most.

    Raises:
        ValueError: An entry is neither a part nor a name, is in both, or nothing is in 4 bits.
    """

    quantized: tuple[str, ...] = ("language",)
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what can name nothing."""
        check_entries(self.quantized, self.kept)
        if not self.quantized:
            text = ", ".join(("language", *_said_kept(entry for entry in self.kept if entry != "language")))
            raise InputError(f"nothing is said to be in 4 bits: write {text!r} for the language backbone")

    @classmethod
    def parse(cls, text: str) -> QuantizedLayers:
        """From ``"language, in_proj_a:16bit"``: parts and layers in 4 bits; ``:16bit`` for those that are not.

        Raises:
            ValueError: As of the class, or something else than ``16bit`` follows a colon.
        """
        quantized: list[str] = []
        kept: list[str] = []
        for entry in filter(None, (each.strip() for each in text.split(","))):
            name, colon, how = (each.strip() for each in entry.partition(":"))
            if colon and how != _KEPT:
                raise InputError(f"{entry!r}: a part or a layer is followed by nothing or by ':{_KEPT}'")
            (kept if colon else quantized).append(name)
        return cls(tuple(quantized), tuple(kept))

    def __str__(self) -> str:
        return ", ".join((*self.quantized, *_said_kept(self.kept)))

    @property
    def all_kept(self) -> tuple[str, ...]:
        """Everything that stays in 16 bits: the parts that nobody named, too."""
        parts = (group for group in GROUPS if group != "other" and group not in self.quantized)
        return tuple(dict.fromkeys((*parts, *self.kept)))

    def but(self, names: Collection[str]) -> QuantizedLayers | None:
        """The same with more names that stay in 16 bits; None where nothing would be left in 4 bits."""
        quantized = tuple(entry for entry in self.quantized if entry not in names)
        return QuantizedLayers(quantized, tuple(dict.fromkeys((*self.kept, *names)))) if quantized else None


def _said_kept(entries: Iterable[str]) -> list[str]:
    return [f"{entry}:{_KEPT}" for entry in entries]


def parts_of(entries: Iterable[str]) -> list[Group]:
    """Those of the entries that are parts of the model."""
    return [group for group in GROUPS if group in set(entries)]


def check_entries(quantized: Collection[str], kept: Collection[str]) -> None:
    """Refuse entries that can name nothing, or that are said both ways.

    Raises:
        ValueError: Names the entry and what it may be, or what is no collection of them.
    """
    for name, entries in (("quantized", quantized), ("kept", kept)):
        # The letters of a text would be names of layers.
        if not isinstance(entries, tuple | list | set | frozenset) or any(not isinstance(e, str) for e in entries):
            raise InputError(
                f"{name} is a tuple of parts and names, such as ('language', 'in_proj_a'), got {entries!r}"
            )
    for entry in (*quantized, *kept):
        if entry in GROUPS or _LAYER_NAME.fullmatch(entry):
            continue
        plain = entry.replace("\\", "").strip(".*^$")
        meant = f"; did you mean {plain!r}?" if _LAYER_NAME.fullmatch(plain) else ""
        raise InputError(
            f"{entry!r} is neither a part ({', '.join(GROUPS)}) nor a name of layers, such as in_proj_a or "
            f"layers.0.mlp, with the wildcards *, ? and [ab] (it is no regular expression){meant}"
        )
    if both := set(quantized) & set(kept):
        raise InputError(f"{', '.join(sorted(both))}: either quantized or kept, not both")


def is_named(entries: Iterable[str], name: str) -> bool:
    """Whether one of the entries means a layer by its name, as :class:`QuantizedLayers` says.

    Args:
        entries: Parts and names.
        name: The layer's dotted name in the base model.
    """
    pieces = name.split(".")
    paths = [".".join(pieces[: end + 1]) for end in range(len(pieces))]
    return any(
        fnmatchcase(path, entry) or fnmatchcase(path, f"*.{entry}")
        for entry in entries
        if entry not in GROUPS
        for path in paths
    )


def naming_nothing(entries: Iterable[str], linears: Collection[str]) -> list[str]:
    """What is wrong with entries that mean no linear layer of a model, a sentence each.

    Args:
        entries: Parts and names.
        linears: Dotted names of the model's linear layers.
    """
    modules = {piece for name in linears for piece in name.split(".") if not piece.isdigit()}
    own = sorted({name.rpartition(".")[2] for name in linears} & modules)
    said = []
    for entry in entries:
        if entry in GROUPS or any(is_named([entry], name) for name in linears):
            continue
        near = get_close_matches(entry.rpartition(".")[2], [*GROUPS, *sorted(modules)], 1, 0.75)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(own)}"
        said.append(f"{entry!r} is no part ({', '.join(GROUPS)}) and names no linear layer of this model: {meant}")
    return said
