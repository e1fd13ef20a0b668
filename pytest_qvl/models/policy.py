"""Which parts of a model are adapted or trained on purpose; whatever is not named has to stay as it was loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.evidence import InputError
from pytest_qvl.models.anatomy import GROUPS, TOWER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qvl.models.anatomy import Group

TEXT_SIDE: tuple[Group, ...] = ("language", "lm_head", "embeddings")
_FULL = "full"


@dataclass(frozen=True)
class AdapterPolicy:
    """What training may change.

    A class and not a bare list of parts, because an adapter on a part (LoRA, or a trained copy: ``modules_to_save``)
    leaves the part's own weights frozen, and training them does not.

    Attributes:
        adapted: Parts where an adapter or a trained copy may sit. Head and embeddings are among the default because
            no request reaches them but by name.
        trained: Parts whose own weights may be trained too.

    Raises:
        ValueError: A part is unknown, or none is named.
    """

    adapted: tuple[Group, ...] = TEXT_SIDE
    trained: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        """Refuse parts that no model has, with the list of those there are."""
        if not self.adapted:
            raise InputError(f"an adapter policy names at least one part; known: {', '.join(GROUPS)}")
        for group in (*self.adapted, *self.trained):
            if group not in GROUPS:
                raise InputError(f"part {group!r} is unknown; known: {', '.join(GROUPS)}")

    @classmethod
    def parse(cls, text: str) -> AdapterPolicy:
        """From ``"language, vision, merger:full"``: parts to adapt; ``:full`` for their own weights too.

        Raises:
            ValueError: A part is unknown, none is named, or something else than ``full`` follows a colon.
        """
        adapted: list[Group] = []
        trained: list[Group] = []
        for entry in filter(None, (each.strip() for each in text.split(","))):
            name, colon, how = (each.strip() for each in entry.partition(":"))
            if colon and how != _FULL:
                raise InputError(f"{entry!r}: a part is followed by nothing or by ':{_FULL}'")
            adapted.append(name)  # type: ignore[arg-type]  # checked by the class itself
            trained += [name] if colon else []  # type: ignore[list-item]
        return cls(tuple(adapted), tuple(trained))

    def __str__(self) -> str:
        return ", ".join(f"{group}:{_FULL}" if group in self.trained else group for group in self.adapted)

    @property
    def text_only(self) -> bool:
        """Whether no part of vision tower and merger is trained, so that they have to stay as they were loaded."""
        return not {*TOWER} & {*self.adapted, *self.trained}

    def unused(self, groups: Iterable[Group]) -> list[Group]:
        """Parts named beyond the default that are not among those that training changes."""
        found = set(groups)
        return [group for group in self.adapted if group not in TEXT_SIDE and group not in found]
