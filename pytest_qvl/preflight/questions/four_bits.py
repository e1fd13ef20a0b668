"""Question 1: which linear layers a skip list leaves to be quantized, in this release of Transformers and in others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.checks.quantization import QuantizationPolicy
from pytest_qvl.models import skip_rules
from pytest_qvl.models.anatomy import GROUPS, TOWER, Group
from pytest_qvl.models.quantized_layers import QuantizedLayers, naming_nothing, parts_of
from pytest_qvl.models.skip_advice import matches, meant_by
from pytest_qvl.models.skips import GENERIC, entries_to_keep, list_to_keep, named_by_path
from pytest_qvl.models.sources.loading import has_tied_head
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.findings import Finding, counted, neutral, numbers, some
from pytest_qvl.preflight.timing import patience

if TYPE_CHECKING:
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.skip_rules import Rule
    from pytest_qvl.preflight.subject import Subject

NUMBER = 1
_red = partial(red, NUMBER)
_DECLARED = "the declaration (qvl_quantized_layers, --quantized-layers)"
_DECLARE_LANGUAGE = "declare the language backbone ('language') or layers of it"
_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


def answer(subject: Subject) -> Iterator[Finding]:
    """A census of what will be in 4 bits, and one finding for each entry that does nothing or too much."""
    parts = subject.parts
    linears = {name: parts.group_of(name) for name, _ in parts.named_linears()}
    given, whose = subject.skip
    entries = skip_rules.DEFAULT if given is None else given
    rule = skip_rules.installed_rule()
    with patience("llm_int8_skip_modules"):
        yield from _names(subject, linears)
        yield from _census(subject, linears, entries, rule, whose if given is not None else f"{whose} (no list)")
        for entry in entries if given is not None else ():
            yield from _entry(subject, linears, entry, rule, whose)


def in_four_bits(linears: Mapping[str, Group], entries: Sequence[str], rule: Rule) -> list[str]:
    """Names of the linear layers that a skip list leaves to be quantized."""
    return [name for name in linears if not any(matches(rule, entry, name) for entry in entries)]


def _census(
    subject: Subject, linears: Mapping[str, Group], entries: Sequence[str], rule: Rule, whose: str
) -> Iterator[Finding]:
    declared = subject.asked.layers or QuantizedLayers()
    policy = QuantizationPolicy(quantized=declared.quantized, kept=declared.all_kept)
    wants = {name: policy.wants_in_4bit(name, group) for name, group in linears.items()}
    kept = policy.kept
    head = subject.parts.roots["lm_head"]
    if has_tied_head(subject.parts) and wants[head]:
        yield _tied(subject, declared)
        kept, wants[head] = (*kept, "lm_head"), False
    packed = in_four_bits(linears, entries, rule)
    leaked = [name for name in packed if wants[name] is False]
    named = [name for name in leaked if policy.names_in_4bit(name) is False]
    wrong = [group for group in parts_of(kept) if any(linears[name] == group for name in {*leaked} - {*named})]
    line = (
        f"with {rule.title}, {_counts(linears, packed)} in 4 bits; skip list {neutral(list(entries), 300)} from {whose}"
    )
    notes = tuple(filter(None, (_elsewhere(linears, entries, packed, other) for other in skip_rules.others())))
    if not any(wants.values()):
        yield _red(
            subject, "nothing-in-four-bits", line,
            cause=f"{_DECLARED} leaves no linear layer in 4 bits ({declared})", fix=_DECLARE_LANGUAGE, notes=notes,
        )  # fmt: skip
        return
    if not any(wants[name] for name in packed):
        what = "the language backbone" if declared.quantized == ("language",) else f"what is declared ({declared})"
        yield _red(
            subject, "nothing-in-four-bits", line,
            cause=f"the skip list keeps every layer of {what} out of the quantization",
            fix=f"take the entry that covers {what} out of llm_int8_skip_modules", notes=notes,
        )  # fmt: skip
        return
    found = []
    wanted = [name for name, in_four in wants.items() if in_four]
    if wrong:
        works = list_to_keep(subject.parts, kept, leaked, wanted)
        found += [_red(
            subject, f"{wrong[0].replace('_', '-')}-in-four-bits", line,
            cause=_cause(subject.parts, wrong, entries),
            fix=f"llm_int8_skip_modules={_mended(works, entries)}", notes=notes,
        )]  # fmt: skip
    if named:
        keep = entries_to_keep(named, wanted)
        found += [_red(
            subject, "kept-layers-in-four-bits",
            f"{counted(len(named), 'linear layer')} that {_DECLARED} keeps in 16 bits will be in 4 with {rule.title}: "
            f"{some(named, 2)}",
            cause=f"no entry of the skip list {neutral(list(entries), 300)} covers them",
            fix=f"add to llm_int8_skip_modules: {some(map(repr, keep), 6)}",
        )]  # fmt: skip
    left = [name for name in wanted if name not in {*packed}]
    if subject.asked.layers is not None and (missed := _unexplained(subject, policy, entries, left)):
        ends = sorted(end for name in missed if not (end := name.rpartition(".")[2]).isdigit())
        other = declared.but([*ends, *missed][:1])
        instead = "" if other is None else f", or declare what is kept on purpose, such as {str(other)!r}"
        found += [_red(
            subject, "quantized-layers-in-16-bits",
            f"{counted(len(missed), 'linear layer')} that {_DECLARED} has in 4 bits will stay in 16 with {rule.title}: "
            f"{some(missed, 2)}",
            cause=f"entries of the skip list {neutral(list(entries), 300)} cover them",
            fix=f"take these entries out of llm_int8_skip_modules{instead}",
        )]  # fmt: skip
    yield from found or [Finding(NUMBER, "census", "green", line, notes=notes, keeps_green=pytest_line(subject))]


def _tied(subject: Subject, declared: QuantizedLayers) -> Finding:
    """A head is declared in 4 bits that cannot be."""
    other = declared.but(["lm_head"])
    return _red(
        subject, "quantized-layers-in-16-bits", f"{_DECLARED} has the head in 4 bits, which is tied to the embeddings",
        cause="embeddings are not quantized, and both are one tensor: a 4-bit head fails in its first forward",
        fix=_DECLARE_LANGUAGE if other is None else f"declare {str(other)!r}",
    )  # fmt: skip


def _unexplained(
    subject: Subject, policy: QuantizationPolicy, entries: Sequence[str], names: Sequence[str]
) -> list[str]:
    """Layers in 16 bits but those that a base saved in 4 bits names in its own list, by their full path."""
    if subject.base.quantization is None:
        return [*names]
    chosen = {*named_by_path(entries, subject.parts, names)}
    return [name for name in names if name not in chosen or policy.names_in_4bit(name)]


def _names(subject: Subject, linears: Mapping[str, Group]) -> Iterator[Finding]:
    """Declared names that no layer of the model has."""
    declared = subject.asked.layers or QuantizedLayers()
    for group in parts_of(declared.quantized):
        if group not in linears.values():
            yield _red(
                subject, "unknown-layers", f"{_DECLARED}: there is no linear layer in {group!r}",
                cause="only linear layers are quantized", fix=f"take {group!r} out of what is declared in 4 bits",
            )  # fmt: skip
    for sentence in naming_nothing((*declared.quantized, *declared.kept), linears):
        yield _red(
            subject, "unknown-layers", f"{_DECLARED}: {sentence}",
            cause="it is misspelled, or of another family", fix="write a name that layers of this model have",
        )  # fmt: skip


def _cause(parts: Parts, wrong: Sequence[Group], entries: Sequence[str]) -> str:
    said = f"no entry of the list keeps {', '.join(wrong)} in 16 bits"
    if "lm_head" in wrong:
        said += "; a list that is given replaces the default, which keeps the head"
        if has_tied_head(parts):
            said += ", and this head is tied to the embeddings: a 4-bit one fails in its first forward"
    if {*TOWER} & set(wrong) and not any("visual" in entry for entry in entries):
        said += "; bitsandbytes quantizes every linear layer that no entry names"
    return said


def _mended(works: Sequence[str], entries: Sequence[str]) -> list[str]:
    """The list with what keeps all that has to be; entries that did nothing for tower and head are left out."""
    own = [entry for entry in entries if entry not in GENERIC and not any(entry in each for each in works)]
    return [*works, *own]


def _counts(linears: Mapping[str, Group], packed: Sequence[str]) -> str:
    rows = []
    for group in GROUPS:
        whole = sum(each == group for each in linears.values())
        if whole:
            rows.append(f"{group} {sum(linears[name] == group for name in packed)} of {whole}")
    return ", ".join(rows)


def _elsewhere(linears: Mapping[str, Group], entries: Sequence[str], here: Sequence[str], other: Rule) -> str:
    """What another release makes of the same list, where that differs; empty where it does not."""
    there = in_four_bits(linears, entries, other)
    if set(there) == set(here):
        return ""
    changed = sorted(set(there) ^ set(here), key=list(linears).index)
    return (
        f"{other.title} differs in {len(changed)} layers ({some(changed, 2)}): {_counts(linears, there)} in 4 bits, "
        f"because it reads an entry as {other.words} ({other.source})"
    )


def _entry(subject: Subject, linears: Mapping[str, Group], entry: str, rule: Rule, whose: str) -> Iterator[Finding]:
    if broken := _no_pattern(entry):
        yield _red(
            subject, "broken-skip-entry", f"skip entry {entry!r} from {whose} is no regular expression: {broken}",
            cause="Transformers 5 reads entries as regular expressions and fails while it loads the model",
            fix="write the module's path",
        )  # fmt: skip
        return
    kept = [name for name in linears if rule.skips(entry, name)]
    wide = [name for name in kept if not _is_inside(entry, name)]
    if not kept:
        yield from _idle(subject, linears, entry, rule, whose)
    elif wide and not _is_pattern(entry):
        yield _wide(subject, entry, kept, wide, rule)


def _no_pattern(entry: str) -> str:
    try:
        re.compile(entry)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return ""


def _is_pattern(entry: str) -> bool:
    """Whether an entry is meant as a regular expression: it has marks that no path has."""
    return re.fullmatch(r"[\w.-]*", entry) is None


def _is_inside(entry: str, name: str) -> bool:
    return f".{entry.strip('.')}." in f".{name}."


def _idle(subject: Subject, linears: Mapping[str, Group], entry: str, rule: Rule, whose: str) -> Iterator[Finding]:
    rest = [other for other in subject.skip[0] or () if other != entry]
    meant = meant_by(entry, subject.parts, rest, rule)
    saved = subject.base.quantization is not None and subject.asked.skip is None
    if not meant.left and (meant.linears or saved or entry in GENERIC):
        return  # what it names is kept by other entries, or no Qwen-VL has it: the list is one for all families
    better = ", ".join(map(repr, meant.instead))
    many = f" (keeps {counted(len(meant.left), 'linear layer')})" if len(meant.modules) > 1 else ""
    yield _red(
        subject,
        "idle-skip-entry",
        f"skip entry {entry!r} from {whose} matches no linear layer with {rule.title}"
        + (f"; {better} would" if better else ""),
        cause=f"{rule.title} takes an entry as {rule.words}",
        fix=f"write {better}{many}" if better else "write the path of a module of this model, or take the entry out",
        notes=tuple(
            f"{other.title} matches {count} layers with it"
            for other in skip_rules.others()
            if (count := sum(matches(other, entry, name) for name in linears))
        ),
    )


def _wide(subject: Subject, entry: str, kept: Sequence[str], wide: Sequence[str], rule: Rule) -> Finding:
    layers = [int(found[1]) for name in wide if (found := _INDEX.search(name))]
    where = f" (layers {numbers(layers)})" if layers and re.search(r"\.\d+$", entry) else ""
    return _red(
        subject,
        "wide-skip-entry",
        f"skip entry {entry!r} keeps {len(kept)} layers in 16 bits with {rule.title}, {len(wide)} of them outside of "
        f"what it names{where}: {some(wide, 2)}",
        cause=f"{rule.title} takes an entry as {rule.words}",
        fix=_narrower(subject.parts, entry),
        notes=tuple(
            f"{other.title} keeps {sum(matches(other, entry, name) for name in kept)} of these layers in 16 bits"
            for other in skip_rules.others()
        ),
    )


def _narrower(parts: Parts, entry: str) -> str:
    """Entries that mean the same in every supported release: the paths of the module's children."""
    path = next((name for name, _ in parts.base.named_modules() if name == entry or name.endswith(f".{entry}")), "")
    children = [name for name, child in parts.base.get_submodule(path).named_children() if any(child.modules())]
    inner = [f"{path}.{name}" for name in children if "norm" not in name]
    if not path or not inner:
        return "write the whole path of the module"
    return f"write {', '.join(map(repr, inner))} in its place, which every supported release reads alike"
