"""A vocabulary that has other rows in memory than in the checkpoint: it was resized after the load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.config_values import Facts
from pytest_qvl.checks.support.wording import listed
from pytest_qvl.models.adapters import adapted_layers, adapter_configs, auxiliary_layers
from pytest_qvl.models.sources.loading import has_tied_head

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_qvl.models.anatomy import Group, Parts
    from pytest_qvl.models.sources.loading import LoadingReport

_TABLES: tuple[Group, ...] = ("embeddings", "lm_head")
_WORDS = {"embeddings": "embeddings", "lm_head": "head"}


@dataclass(frozen=True)
class Resized:
    """Embeddings or head with other rows in memory than in the checkpoint.

    Attributes:
        table: ``"embeddings"`` or ``"lm_head"``; of tied ones the one that the checkpoint holds.
        stored: Rows in the checkpoint.
        rows: Rows in memory.
        kept_by: What in the adapter's configuration makes it hold the rows that were added, or the whole table; of tied
            ones for both sides.
    """

    table: Group
    stored: int
    rows: int
    kept_by: str

    @property
    def common(self) -> int:
        """The rows that both have, from the first on."""
        return min(self.stored, self.rows)


def resized_vocabulary(parts: Parts, report: LoadingReport, config: Mapping[str, Any]) -> dict[str, Resized]:
    """Which tables were resized in memory, by their tensors' names in the checkpoint.

    Not those whose checkpoint contradicts its own ``config.json``: there the load made other rows.

    Args:
        parts: The model.
        report: What of it does not fit the checkpoint.
        config: The content of the checkpoint's ``config.json``.
    """
    tables = {f"{parts.roots[group]}.weight": group for group in _TABLES}
    return {
        name: Resized(tables[name], stored[0], wanted[0], _kept_by(parts, tables[name], range(stored[0], wanted[0])))
        for name, stored, wanted in report.mismatched
        if name in tables and stored[1:] == wanted[1:] and stored[0] == Facts(config).text("vocab_size")
    }


def _kept_by(parts: Parts, table: Group, added: range) -> str:
    """How an adapter holds all added rows of a table; empty where none does.

    Of a tied one both sides have to be held: a copy or the tokens of one side leave the other one what the base has.
    A table that PEFT saves beside its LoRA is that of both sides.
    """
    held = [_held_by(parts, side, added) for side in (_TABLES if has_tied_head(parts) else (table,))]
    if "target_modules" in held:
        return "target_modules"
    return next(filter(None, held), "") if all(held) or not added else ""


def _held_by(parts: Parts, side: Group, added: range) -> str:
    """How an adapter holds all added rows of one side, if any were added, or else that side as a whole."""
    place = parts.roots[side]
    wrapper = auxiliary_layers(parts).get(place)
    if getattr(wrapper, "modules_to_save", None):
        return "modules_to_save"
    tokens = getattr(getattr(wrapper, "token_adapter", None), "token_indices", {})
    if added and any({*added} <= {*indices} for indices in tokens.values()):
        return "trainable_token_indices"
    saved = any(_saves_tables(parts, config) for config in adapter_configs(parts).values())
    return "target_modules" if saved and place in adapted_layers(parts) else ""


def _saves_tables(parts: Parts, config: Any) -> bool:
    """Whether PEFT saves a table beside its LoRA, as it decides itself (``save_embedding_layers="auto"``).

    Not where tokens are trained too, nor where a list names the table by its path.
    """
    named = getattr(config, "target_modules", None) or ()
    ends = [parts.roots[side].rpartition(".")[2] for side in _TABLES]
    listed = isinstance(named, str) or any(end in named for end in ends)
    return listed and getattr(config, "trainable_token_indices", None) is None


def lost_rows(parts: Parts, lost: Sequence[Resized], *, as_stored: bool, what: str) -> str:
    """The finding about rows that were added and that no file holds: what happened, and what to do.

    Args:
        parts: The model.
        lost: Tables with such rows.
        as_stored: Whether their other rows are as stored.
        what: What to call the checkpoint.
    """
    said = [
        f"{_who(parts, tables)} {first.rows} rows in memory and {first.stored} in {what}"
        for first, tables in _alike(lost)
    ]
    stored = max((each.stored for each in lost), default=0)
    ends = ", ".join(f'"{parts.roots[each.table].rpartition(".")[2]}"' for each in lost)
    tying = ", ensure_weight_tying=True" if has_tied_head(parts) else ""
    return (
        f"{'; '.join(said)}: the vocabulary was grown after the load (resize_token_embeddings)"
        f"{f', its first {stored} rows are as stored' if as_stored else ''}, and no file holds those that were added: "
        "every resize draws them anew, and LoRA alone does not save them; resize the 16-bit base once, save it with "
        f"its processor and load that, or train them (modules_to_save=[{ends}]{tying}, or trainable_token_indices), or "
        f"do not resize for a tokenizer of at most {stored} tokens"
    )


def resizing_notes(parts: Parts, resized: Sequence[Resized]) -> list[str]:
    """What a trimmed vocabulary, or a grown one that the adapter holds, means; a sentence each."""
    said = []
    for first, tables in _alike(resized):
        who, cut = _who(parts, tables), first.rows < first.stored
        if cut:
            said.append(
                f"{who} the first {first.rows} of the checkpoint's {first.stored} rows: the vocabulary was trimmed "
                "after the load (resize_token_embeddings)"
            )
        elif first.kept_by:
            said.append(
                f"{who} {first.rows - first.stored} rows that were added after the load (resize_token_embeddings)"
            )
        if first.kept_by:
            said[-1] += (
                f"; the adapter holds {'what is left' if cut else 'them'} ({first.kept_by}), and fits a base that is "
                f"resized to {first.rows} rows only"
            )
    return said


def _alike(resized: Sequence[Resized]) -> list[tuple[Resized, list[Resized]]]:
    """Tables that were resized alike and are held alike, each group with its first."""
    groups: dict[Resized, list[Resized]] = {}
    for each in resized:
        groups.setdefault(replace(each, table="embeddings"), []).append(each)
    return [*groups.items()]


def _who(parts: Parts, resized: Sequence[Resized]) -> str:
    if has_tied_head(parts):
        return "embeddings and head, which are tied, have"
    words = [_WORDS[each.table] for each in resized]
    return f"{listed(words)} {'has' if words == ['head'] else 'have'}"
