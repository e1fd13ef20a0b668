"""What is wrong with keys that do not land: one finding for each cause, with how many keys have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.preflight import naming
from pytest_qvl.preflight.base import find_base
from pytest_qvl.preflight.commands import red
from pytest_qvl.preflight.findings import Finding, neutral, some
from pytest_qvl.preflight.naming import LAYOUTS, PREFIX, Key
from pytest_qvl.preflight.questions.misshapen import misshapen

if TYPE_CHECKING:
    from pytest_qvl.preflight.loading import Loaded, Part
    from pytest_qvl.preflight.subject import Subject

NUMBER = 3
_red = partial(red, NUMBER)
_PLAIN = "save it with PeftModel.save_pretrained, which writes base_model.model.MODULE.lora_A.weight"
_TIMES = {2: "twice", 3: "three times"}
_SILENT = "PEFT loads what it finds, warns of the rest, and the model answers as the base does"


def misfits(subject: Subject, loaded: Loaded) -> Iterator[Finding]:
    """One red finding for each cause by which keys and modules miss each other."""
    strange = [text for text, place in loaded.places.items() if not place]
    shapes = {
        text: loaded.wanted[part]
        for part, text in loaded.held.items()
        if part in loaded.wanted and loaded.shapes[text] != loaded.wanted[part]
    }
    if shapes:
        yield from misshapen(subject, loaded, shapes)
    if strange:
        yield _strange(subject, loaded, strange)
    stray = {part for part in loaded.held if part not in loaded.wanted and part.matrix}
    bare = {part for part in loaded.wanted if part not in loaded.held}
    if not shapes and not strange:
        yield from _uncovered(subject, loaded, stray, bare)
    # What is in the file and was expected, but did not arrive: its name is the cause.
    lost = [loaded.held[part] for part in loaded.missing if part in loaded.held and part in loaded.wanted]
    lost = [text for text in lost if text not in shapes]
    if lost and not (loaded.error and bare):  # else PEFT stops at what is missing, which has been said
        yield _lost(subject, loaded, lost)
    elif loaded.error and not (shapes or strange or stray or bare):
        yield _refused(subject, loaded)


def _lost(subject: Subject, loaded: Loaded, lost: Sequence[str]) -> Finding:
    name, why = _name_at_fault([loaded.keys[text] for text in lost], [loaded.layouts[text] for text in lost])
    groups = Counter(subject.parts.group_of(loaded.places[text]) for text in lost)
    whole = Counter(subject.parts.group_of(part.module) for part in loaded.wanted)
    said = ", ".join(f"{group} {count} of {whole[group]}" for group, count in groups.items())
    return _red(
        subject,
        name,
        f"{len(lost)} of {len(loaded.wanted)} tensors of the adapter do not land ({said}): {some(sorted(lost), 1)}",
        cause=f"{why}; {loaded.error or _SILENT}",
        fix=_FIXES.get(name, _PLAIN),
    )


_FIXES = {
    "old-layout": "load it where its names are known and save it again, or rename the keys: model.layers to "
    "model.language_model.layers, visual to model.visual",
    "adapter-name-in-keys": "take the adapter's name out of the keys (lora_A.default.weight to lora_A.weight): save it "
    "with PeftModel.save_pretrained, not by torch.save of the state_dict",
}


def _name_at_fault(keys: Sequence[Key], layouts: Sequence[str]) -> tuple[str, str]:
    """The first thing that is unusual about keys, by a name and in words."""
    wrapped = next((key.wrapped for key in keys if key.wrapped), "")
    adapter = neutral(next((key.adapter for key in keys if key.adapter), ""), 80)
    layout = next((layout for layout in layouts if layout), "")
    times = max((key.prefixes for key in keys), default=1)
    unusual = {
        "down-and-up-names": any(key.kohya for key in keys)
        and "the matrices are called lora_down and lora_up, as trainers of image models do",
        "wrapper-in-keys": wrapped and f"the keys hold {wrapped!r}, of a wrapper that was not taken off before saving",
        "adapter-name-in-keys": adapter and f"the keys hold the adapter's name {adapter!r}",
        "prefix-missing": any(key.prefixes == 0 for key in keys) and f"the keys lack the prefix {PREFIX}",
        "prefix-doubled": times > 1
        and f"the keys have the prefix {PREFIX} {_TIMES.get(times, f'{times} times')}: the model was wrapped already",
        f"{layout}-layout": layout and f"the keys name modules {LAYOUTS[layout]}",
    }
    found = ((name, str(why)) for name, why in unusual.items() if why)
    return next(found, ("not-loaded", "the installed PEFT and Transformers have no place for these names"))


def _refused(subject: Subject, loaded: Loaded) -> Finding:
    return _red(
        subject, "not-loaded", f"the installed PEFT does not load the file: {loaded.error}",
        cause="the file and its adapter_config.json do not belong together", fix=_PLAIN,
    )  # fmt: skip


def _strange(subject: Subject, loaded: Loaded, strange: Sequence[str]) -> Finding:
    """Keys of modules that this model does not have."""
    who = subject.base.label
    line = f"{len(strange)} of {len(loaded.keys)} keys name modules that {who} does not have: {some(strange)}"
    tails = {loaded.keys[text].tail for text in strange}
    family = _family_that_has(tails, subject.base.family)
    if family:
        return _red(
            subject, "other-family", line, cause=f"these are modules of {family}",
            fix="give the base that the adapter was trained on",
        )  # fmt: skip
    depth = subject.parts.text_config.num_hidden_layers
    beyond = [tail for tail in tails if tail.startswith("layers.") and int(tail.split(".")[1]) >= depth]
    if beyond and len(beyond) == len(tails):
        return _red(
            subject, "other-size", line, cause=f"the model has {depth} layers, and the keys name more",
            fix="give the base that the adapter was trained on",
        )  # fmt: skip
    return _red(
        subject, "unknown-keys", line, cause=f"no module of the model has such a name; {_SILENT}", fix=_PLAIN,
    )  # fmt: skip


def _family_that_has(wanted: set[str], own: str) -> str:
    """The family whose typical model has all modules of these names, by the end that every layout has."""
    for kind, family in FAMILIES.items():
        if kind != own:
            model = find_base(family.typical).skeleton().base
            if wanted <= naming.tails([name for name, _ in model.named_modules() if name]).keys():
                return family.label
    return ""


def _uncovered(subject: Subject, loaded: Loaded, stray: set[Part], bare: set[Part]) -> Iterator[Finding]:
    """Modules with tensors that the configuration does not ask for, and modules that it asks for without."""
    if {"lora_magnitude_vector"} in ({part.matrix for part in stray}, {part.matrix for part in bare}):
        held = sum(part.matrix == "lora_magnitude_vector" for part in loaded.held)
        yield _switched(subject, "use_dora", held, stray, bare)
        return
    if bare and not stray and all(part.is_bias and not part.matrix for part in bare):
        yield _trained_biases(subject, bare)
        return
    if (stray or bare) and all(part.is_bias and part.matrix for part in stray | bare):
        held = sum(part.is_bias and bool(part.matrix) for part in loaded.held)
        yield _switched(subject, "lora_bias", held, stray, bare)
        return
    if half := _halves(loaded):
        yield _red(
            subject, "half-pairs", f"{len(half)} modules have only one of the two matrices A and B: {some(half)}",
            cause="the file is not complete", fix="save the adapter again",
        )  # fmt: skip
        return
    if bare:
        names = list(dict.fromkeys(part.module for part in bare))
        ends = Counter(map(_end, names))
        wanted = {part.module for part in loaded.wanted}
        whole = Counter(map(_end, wanted))
        dropped = [end for end, count in ends.items() if count >= whole[end]]
        said = f" (every {', every '.join(sorted(dropped))})" if dropped else ""
        yield _red(
            subject, "keys-missing",
            f"the file has no tensors for {len(names)} of the {len(wanted)} modules that adapter_config.json asks "
            f"for{said}: {some(sorted(names))}",
            cause="they were dropped or frozen when the adapter was made or saved; "
            + ("PEFT does not load such a file" if loaded.error else _SILENT),
            fix="train and save it with all of its targets, or take those that it lacks out of adapter_config.json",
        )  # fmt: skip
    if stray:
        names = sorted({part.module for part in stray})
        yield _red(
            subject, "keys-beyond-targets",
            f"{len(names)} modules have tensors in the file that adapter_config.json does not ask for: {some(names)}",
            cause=f"adapter_config.json names other targets than the training had; {_SILENT}",
            fix="put back the target_modules of the training",
        )  # fmt: skip


def _end(name: str) -> str:
    """The last part of a module's name that says anything: ``q_proj``, ``mlp.0``."""
    parts = name.split(".")
    return parts[-1] if not parts[-1].isdigit() else ".".join(parts[-2:])


def _halves(loaded: Loaded) -> list[str]:
    sides: dict[str, set[str]] = {}
    for module, matrix, is_bias in loaded.held:
        if matrix in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") and not is_bias:
            sides.setdefault(module, set()).add(matrix)
    return sorted(module for module, parts in sides.items() if len(parts) == 1)


# Switches of the configuration: the finding's name, and the tensors that they ask for.
_SWITCHES = {"use_dora": ("dora-differs", "magnitude vectors"), "lora_bias": ("lora-bias-differs", "biases of B")}


def _switched(subject: Subject, switch: str, held: int, stray: set[Part], bare: set[Part]) -> Finding:
    """A switch says otherwise than the file, which holds so many of its tensors."""
    name, tensors = _SWITCHES[switch]
    return _red(
        subject, name,
        f"adapter_config.json says {switch}={bool(getattr(subject.lora, switch, False))}, and the file has {held} "
        f"{tensors} ({len(bare)} missing, {len(stray)} too many)",
        cause="configuration and file are of two trainings, or one was edited",
        fix=f"put back {switch}={bool(held)}",
    )  # fmt: skip


def _trained_biases(subject: Subject, bare: set[Part]) -> Finding:
    return _red(
        subject, "bias-differs",
        f"adapter_config.json says bias={subject.lora.bias!r}, and the file lacks {len(bare)} trained biases: "
        f"{some(sorted(part.module for part in bare))}",
        cause="the training had another bias, or they were not saved",
        fix='put back the bias of the training ("none", if the file has no bias)',
    )  # fmt: skip
