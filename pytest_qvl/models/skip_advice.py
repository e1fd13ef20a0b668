"""What to write for an entry of ``llm_int8_skip_modules`` that matches nothing in this release of Transformers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.renamed import in_todays_layout
from pytest_qvl.models.skip_rules import others

if TYPE_CHECKING:
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.skip_rules import Rule


@dataclass(frozen=True)
class Meant:
    """What an idle entry was meant to name.

    Attributes:
        name: The end that the paths of its modules have in common, or the path of the only one; of a misspelled entry
            the name that is nearest to it.
        modules: Those that the rest of the list does not keep.
        linears: Every linear layer in a module of that name.
        left: Those of them that the rest of the list does not keep.
        instead: What to write for the entry; empty where nothing is left, or no entry keeps just that.
    """

    name: str
    modules: Sequence[str]
    linears: Sequence[str]
    left: Sequence[str]
    instead: Sequence[str]


def meant_by(entry: str, parts: Parts, rest: Sequence[str], rule: Rule) -> Meant:
    """What an entry of a skip list was meant to name, and what to write for it.

    Args:
        entry: The entry, which matches no linear layer.
        parts: The model, wrapped or not.
        rest: The other entries of the list.
        rule: How the installed Transformers reads them.
    """
    modules = [name for name in base_modules(parts) if name]
    linears = [name for name, _ in parts.named_linears()]
    today = in_todays_layout(f"{entry.strip('.')}.").rstrip(".")
    plain = entry.strip(".*\\^$").replace("\\.", ".")
    fitting = [name for name in modules if name in (today, plain) or name.endswith(f".{plain}")]
    if not fitting and (near := get_close_matches(plain, {name.rpartition(".")[2] for name in modules}, 1, 0.75)):
        plain = near[0]
        fitting = [name for name in modules if name.rpartition(".")[2] == plain]
    within = [name for name in linears if any(_is_within(name, module) for module in fitting)]
    left = [name for name in within if not any(matches(rule, other, name) for other in rest)]
    open_ones = [module for module in fitting if any(_is_within(name, module) for name in left)]
    instead = _entries_that_keep(plain, open_ones, within, left, linears=linears, rest=rest, rule=rule) if left else []
    return Meant(plain, open_ones, within, left, instead)


def matches(rule: Rule, entry: str, name: str) -> bool:
    """Whether an entry keeps a module in 16 bits; one that is no regular expression keeps none."""
    try:
        return rule.skips(entry, name)
    except re.error:  # Transformers would raise it too
        return False


def _entries_that_keep(
    end: str,
    modules: Sequence[str],
    within: Collection[str],
    left: Sequence[str],
    *,
    linears: Sequence[str],
    rest: Sequence[str],
    rule: Rule,
) -> Sequence[str]:
    """What keeps all that was meant and nothing else that the rest of the list does not keep.

    Entries that every supported release reads alike come first; a list of ends is also what other readers of a saved
    configuration understand.
    """

    def is_exact(entries: Sequence[str], rule: Rule) -> bool:
        kept = {name for name in linears if any(matches(rule, entry, name) for entry in entries)}
        return all(any(matches(rule, other, name) for other in rest) for name in kept ^ set(within))

    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in left))
    plain = [ends]
    if len(modules) == 1:
        depth = modules[0].count(".") + 2
        children = list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in left))
        plain = [[*modules], children, ends]
    for entries in plain:
        if all(is_exact(entries, each) for each in (rule, *others())):
            return entries
    # A backslash would be doubled where the entry is shown as Python writes it.
    anywhere = f".*[.]{end.replace('.', '[.]')}"
    patterns = [[anywhere], [f"{anywhere}([.]|$)"]]
    return next(
        (entries for entries in (*plain[:-1], *patterns, ends, [end], [*modules]) if is_exact(entries, rule)), ()
    )


def _is_within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")
