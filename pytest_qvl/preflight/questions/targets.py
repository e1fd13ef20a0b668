"""Question 2: which modules the installed PEFT gives an adapter, on the real model class without data."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.lora_request import adaptable_modules, bare_mixers, expected_size, requested_modules
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.adapters import adapted_layers, auxiliary_layers
from pytest_qvl.models.anatomy import GROUPS, TOWER, Group, anatomy
from pytest_qvl.models.attaching import why_not_attached
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.findings import Finding, neutral, numbers, some
from pytest_qvl.preflight.refusals import UnsafeFileError
from pytest_qvl.preflight.timing import patience

if TYPE_CHECKING:
    from torch import nn

    from pytest_qvl.preflight.subject import Subject

NUMBER = 2
_red = partial(red, NUMBER)
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXCLUDED = re.compile(r"\(\?<?![^)]*\)")  # negative look-around: what the expression does not mean
_HOW_PEFT_MATCHES = "PEFT matches a list by the end of a module's name, and a text as an expression of the whole name"
_LANGUAGE = r".*{}.*\.({})"
# Words by which a regular expression says that it means the vision tower.
_MEANS_VISION = re.compile(r"vis(ion|ual)|image|patch|merger|blocks|qkv|fc[12]", re.IGNORECASE)


@dataclass(frozen=True)
class Placement:
    """Where the installed PEFT puts the adapter.

    Attributes:
        subject: What it is about.
        modules: Every module that LoRA can adapt, by name.
        actual: Those that PEFT gave an adapter.
        expected: Those that the configuration asks for, worked out without PEFT.
    """

    subject: Subject
    modules: Mapping[str, nn.Module]
    actual: frozenset[str]
    expected: frozenset[str]

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The part of the model that each module belongs to."""
        return {name: self.subject.parts.group_of(name) for name in self.modules}

    def of(self, group: Group) -> list[str]:
        """The adapted modules of one part, in the model's order."""
        return [name for name in self.modules if name in self.actual and self.groups[name] == group]


def answer(subject: Subject) -> Iterator[Finding]:
    """The exact count by part of the model, leaks, layers without an adapter, entries that match nothing."""
    if subject.adapter is None:
        raise CannotJudge("no adapter and no --lora was given" if subject.asked.adapter is None else subject.no_adapter)
    config = subject.lora
    if not config.target_modules and not _parameters(config):
        yield _no_targets(subject)
        return
    try:
        adapted = anatomy(subject.adapted)
    except UnsafeFileError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        yield _refused(subject, config, error)
        return
    with patience("target_modules of the adapter"):
        modules = adaptable_modules(subject.parts)
        expected = frozenset(_asked_for(subject, config, modules))
    # What holds trained rows of embeddings is a tuner layer inside of one that stands for them (not a target).
    inside = tuple(f"{name}." for name in auxiliary_layers(adapted))
    actual = frozenset(name for name in adapted_layers(adapted) if not name.startswith(inside))
    placement = Placement(subject, modules, actual, expected)
    yield _census(placement, config)
    yield from _leaks(placement, config)
    yield from _idle_entries(placement, config)
    yield from _bare_layers(placement, config)
    if subject.plan is not None and subject.plan is not subject.adapter:
        yield from _unlike_the_plan(placement, config, subject.plan.lora_config())


def _parameters(config: Any) -> list[str]:
    """``target_parameters``, which PEFT has since 0.17."""
    return sorted(getattr(config, "target_parameters", None) or ())


def _asked_for(subject: Subject, config: Any, modules: Mapping[str, nn.Module]) -> set[str]:
    """The modules that the configuration asks for, by ``target_modules`` and by a parameter of theirs."""
    asked = requested_modules(subject.parts, config, modules) if config.target_modules else set()
    by_parameter = {name for name, module in modules.items() if _entries_of(_parameters(config), name, module)}
    return asked | by_parameter


def _entries_of(entries: Sequence[str], name: str, module: nn.Module) -> list[str]:
    """Entries of ``target_parameters`` that mean a parameter of a module: by the end of its name, or all of it."""
    own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
    return [entry for entry in entries if any(_ends_with(parameter, entry) for parameter in own)]


def _no_targets(subject: Subject) -> Finding:
    assert subject.adapter is not None
    given = subject.adapter.fields.get("target_modules")
    adapted = {each.module.rpartition(".")[2] for each in subject.placed.values() if each.key.part.startswith("lora_")}
    ends = sorted(adapted - {""})
    example = (
        f"the file has tensors for {some(ends, 8)}" if ends else _LANGUAGE.format("language_model", "q_proj|v_proj")
    )
    return _red(
        subject, "no-target",
        f"target_modules is {json.dumps(given)}: the configuration names no module to adapt",
        cause="it was emptied or left out when the configuration was written, and PEFT has no default for this family",
        fix=f"write the target_modules of the training ({example})",
    )  # fmt: skip


def _refused(subject: Subject, config: Any, error: Exception) -> Finding:
    """PEFT puts no adapter on the model."""
    words = why_not_attached(error, config, None)
    nothing = "not found in the base model" in words or "No modules were targeted" in words
    root = subject.parts.roots["language"].rpartition(".")[2]
    targets = config.target_modules
    if nothing:
        return _red(
            subject, "no-target", f"target_modules {_short(targets)} match no module of {subject.base.label}",
            cause=_old_names(targets) or _HOW_PEFT_MATCHES,
            fix=f'name modules of this model, such as target_modules=r"{_LANGUAGE.format(root, "q_proj|v_proj")}"',
        )  # fmt: skip
    return _red(
        subject, "peft-refuses", f"PEFT puts no such adapter on {subject.base.label}: {neutral(words, 400)}",
        cause="the LoRA configuration asks for what the installed PEFT cannot do", fix="correct adapter_config.json",
    )  # fmt: skip


def _old_names(targets: Any) -> str:
    text = targets if isinstance(targets, str) else " ".join(map(str, targets))
    if re.search(r"(^|[^\w.])(model\\?\.layers|visual\\?\.)", text):
        return "these are names of before Transformers 4.52: model.language_model.layers was called model.layers"
    return ""


def _census(placement: Placement, config: Any) -> Finding:
    subject = placement.subject
    counts = [f"{group} {len(found)}" for group in GROUPS if (found := placement.of(group))]
    size = sum(expected_size(config, name, placement.modules[name]) for name in placement.actual)
    line = (
        f"{len(placement.actual)} modules get an adapter of rank {config.r}: {', '.join(counts)}; "
        f"{size:,} parameters beside the base"
    )
    if config.modules_to_save:
        line += f", and whole copies of {some(sorted(config.modules_to_save))}"
    if placement.actual != placement.expected:
        missing, surplus = placement.expected - placement.actual, placement.actual - placement.expected
        return _red(
            subject, "peft-differs",
            f"{line}; the configuration asks for {len(placement.expected)}: "
            f"{len(missing)} have none ({some(sorted(missing))}), {len(surplus)} were not asked for "
            f"({some(sorted(surplus))})",
            cause="the installed PEFT does not do what its documentation says of this configuration",
            fix="write target_modules as one regular expression of whole names",
        )  # fmt: skip
    if not any(placement.of(group) for group in ("language", "lm_head", "embeddings")):
        return _red(
            subject, "text-side-bare", line,
            cause=f"target_modules {_short(config.target_modules)} match nothing in the language backbone",
            fix="name the language backbone's layers (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj)",
        )  # fmt: skip
    with patience("exclude_modules of the adapter"):
        bare = bare_mixers(subject.parts, config, placement.modules, placement.actual)
    return Finding(NUMBER, "census", "green", line, keeps_green=pytest_line(subject), notes=(bare,) if bare else ())


def _leaks(placement: Placement, config: Any) -> Iterator[Finding]:
    leaked = [name for group in TOWER for name in placement.of(group) if not _on_purpose(placement, config, name)]
    if not leaked:
        return
    counts = Counter(placement.groups[name] for name in leaked)
    said = ", ".join(f"{group} {count}" for group, count in counts.items())
    root = placement.subject.parts.roots["language"].rpartition(".")[2]
    ends = "|".join(sorted({name.rpartition(".")[2] for name in placement.of("language")})) or "q_proj|v_proj"
    by_parameter = any(_entries_of(_parameters(config), name, placement.modules[name]) for name in leaked)
    field = "target_parameters" if by_parameter else "target_modules"
    yield _red(
        placement.subject,
        "leak",
        f"{len(leaked)} modules of the vision side get an adapter too ({said}): {some(leaked)}",
        cause=f"{field} {_short(getattr(config, field))} match by name, and the vision side has such layers too",
        fix=f'target_modules=r"{_LANGUAGE.format(root, ends)}"; if the vision side is adapted on purpose, say so by an '
        "expression that names it, or declare it (--adapter-policy language,vision)",
    )


def _on_purpose(placement: Placement, config: Any, name: str) -> bool:
    """Whether a module of the vision side is adapted because the configuration means it.

    A declared policy says so; a list does by an entry that matches the vision side only, a regular expression by a
    word for it.
    """
    policy, targets = placement.subject.asked.policy, config.target_modules or ()
    if policy is not None and placement.groups[name] in policy.adapted:
        return True
    modules, language = placement.modules, placement.of("language")
    for entry in _entries_of(_parameters(config), name, modules[name]):
        return not any(_entries_of([entry], other, modules[other]) for other in language)
    if isinstance(targets, str):
        return targets.lower() != "all-linear" and _MEANS_VISION.search(_EXCLUDED.sub("", targets)) is not None
    entries = [entry for entry in targets if _ends_with(name, entry)]
    return any(not any(_ends_with(other, entry) for other in language) for entry in entries)


def _ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _idle_entries(placement: Placement, config: Any) -> Iterator[Finding]:
    """Entries of the list that no module has, and modules_to_save that the model lacks."""
    targets, base = config.target_modules or (), placement.subject.parts.base
    pools: dict[str, Sequence[str]] = {
        "target_modules": list(placement.modules),
        "target_parameters": [name for name, _ in base.named_parameters()],
        "modules_to_save": [name for name, _ in base.named_modules() if name],
    }
    asked = [("target_modules", entry) for entry in (() if isinstance(targets, str) else sorted(targets))]
    asked += [("target_parameters", entry) for entry in _parameters(config)]
    asked += [("modules_to_save", entry) for entry in config.modules_to_save or ()]
    for what, entry in asked:
        pool = pools[what]
        if any(_ends_with(name, entry) for name in pool):
            continue
        near = get_close_matches(entry.lower(), {name.rpartition(".")[2] for name in pool}, 1, 0.6)
        yield _red(
            placement.subject,
            "idle-target",
            f"{what} names {entry!r}, and no module of {placement.subject.base.label} has that name",
            cause="PEFT passes over entries that match nothing as long as one of the list does",
            fix=f"write {near[0]!r}" if near else "take it out, or give the base that has it",
        )


def _bare_layers(placement: Placement, config: Any) -> Iterator[Finding]:
    """Layers of the language backbone that get fewer adapters than their siblings, without having been left out.

    Those of linear attention have other linears than those of full attention: each is held to its own.
    """
    parts = placement.subject.parts
    count = parts.text_config.num_hidden_layers
    have: dict[int, set[str]] = {index: set() for index in range(count)}
    own: dict[int, set[str]] = {index: set() for index in range(count)}
    linears = [name for name, _ in parts.named_linears() if parts.group_of(name) == "language"]
    for kept, names in ((have, placement.of("language")), (own, linears)):
        for name in names:
            if found := _LAYER.search(name):
                kept[int(found[1])].add(name[found.end() :])
    whole = set().union(*have.values())
    bare = [index for index, ends in have.items() if not ends and whole & own[index]]
    uneven = [index for index, ends in have.items() if ends and whole & own[index] - ends]
    if not whole or not (bare or uneven) or config.layers_to_transform not in (None, []):
        return
    missing = f"layers {numbers(bare)} get none" if bare else f"layers {numbers(uneven)} get fewer than the others"
    yield _red(
        placement.subject,
        "bare-layers",
        f"{len(bare) + len(uneven)} of {count} layers of the language backbone are not adapted as the others are: "
        f"{missing}",
        cause=f"target_modules {_short(config.target_modules)} match some layers only",
        fix="let the expression match every layer, or say which are meant with layers_to_transform",
    )


def _unlike_the_plan(placement: Placement, config: Any, plan: Any) -> Iterator[Finding]:
    """What of ``--lora`` the adapter does not have: modules that a trainer dropped, another rank or scaling."""
    with patience("target_modules of --lora"):
        asked = _asked_for(placement.subject, plan, placement.modules)
    dropped = [name for name in placement.modules if name in asked - placement.actual]
    added = [name for name in placement.modules if name in placement.actual - asked]
    fields = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    pairs = {name: (getattr(plan, name, None), getattr(config, name, None)) for name in fields}
    said = [f"{len(dropped)} modules asked for are not adapted ({some(dropped)})"] if dropped else []
    said += [f"{len(added)} modules are adapted that were not asked for ({some(added)})"] if added else []
    said += [f"{name} is {has} and not {wanted}" for name, (wanted, has) in pairs.items() if wanted != has]
    if not said:
        yield Finding(
            NUMBER, "as-planned", "green", f"the adapter is as --lora asks: {len(asked)} modules, r={config.r}"
        )
        return
    yield _red(
        placement.subject,
        "unlike-the-plan",
        f"the adapter is not as --lora asks: {'; '.join(said)}",
        cause="the trainer dropped or replaced what it was asked for, or this is another training's adapter",
        fix="look for what filters target_modules (Unsloth leaves lm_head and embed_tokens out), or correct the plan",
    )


def _short(targets: Any) -> str:
    shown: Sequence[str] | str = targets if isinstance(targets, str) else sorted(map(str, targets or ()))
    return neutral(repr(shown), 200)
