"""What is wrong with keys that do not land: one finding for each cause, with how many keys have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.released import released_config, released_names
from pytest_qvl.preflight import naming
from pytest_qvl.preflight.base import find_base
from pytest_qvl.preflight.commands import red
from pytest_qvl.preflight.findings import Finding, neutral, some
from pytest_qvl.preflight.naming import LAYOUTS, PREFIX, Key

if TYPE_CHECKING:
    from pytest_qvl.preflight.loading import Loaded, Part
    from pytest_qvl.preflight.subject import Subject

NUMBER = 3
_red = partial(red, NUMBER)
_PLAIN = "save it with PeftModel.save_pretrained, which writes base_model.model.MODULE.lora_A.weight"
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
        yield _other_shapes(subject, loaded, shapes)
    if strange:
        yield _strange(subject, loaded, strange)
    stray = {part for part in loaded.held if part not in loaded.wanted and part.matrix}
    bare = {part for part in loaded.wanted if part not in loaded.held}
    if not shapes and not strange:
        yield from _uncovered(subject, loaded, stray, bare)
    # What is in the file and was expected, but did not arrive: its name is the cause.
    lost = [loaded.held[part] for part in loaded.missing if part in loaded.held and part in loaded.wanted]
    lost = [text for text in lost if text not in shapes]
    if lost:
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
        f"{len(lost)} of {len(loaded.wanted)} tensors of the adapter do not land ({said}): {some(sorted(lost))}",
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
    unusual = {
        "down-and-up-names": any(key.kohya for key in keys)
        and "the matrices are called lora_down and lora_up, as trainers of image models do",
        "wrapper-in-keys": wrapped and f"the keys hold {wrapped!r}, of a wrapper that was not taken off before saving",
        "adapter-name-in-keys": adapter and f"the keys hold the adapter's name {adapter!r}",
        "prefix-missing": any(key.prefixes == 0 for key in keys) and f"the keys lack the prefix {PREFIX}",
        "prefix-doubled": any(key.prefixes > 1 for key in keys)
        and f"the keys have the prefix {PREFIX} twice: the base was wrapped already when it was wrapped",
        f"{layout}-layout": layout and f"the keys name modules {LAYOUTS[layout]}",
    }
    found = ((name, str(why)) for name, why in unusual.items() if why)
    return next(found, ("not-loaded", "the installed PEFT and Transformers have no place for these names"))


def _refused(subject: Subject, loaded: Loaded) -> Finding:
    return _red(
        subject, "not-loaded", f"the installed PEFT does not load the file: {loaded.error}",
        cause="the file and its adapter_config.json do not belong together", fix=_PLAIN,
    )  # fmt: skip


def _other_shapes(subject: Subject, loaded: Loaded, shapes: dict[str, tuple[int, ...]]) -> Finding:
    text, wanted = next(iter(shapes.items()))
    held = loaded.shapes[text]
    part = loaded.keys[text].part
    line = (
        f"{len(shapes)} tensors of the file have other shapes than this model needs: {neutral(text, 160)} is "
        f"{list(held)} and not {list(wanted)}"
    )
    axis = 1 if part in ("lora_B", "lora_embedding_B") else 0
    rank_only = len(held) == len(wanted) == 2 and held[1 - axis] == wanted[1 - axis]
    if part.startswith("lora_") and rank_only:
        return _red(
            subject, "other-rank", line,
            cause=f"the file has rank {held[axis]}, adapter_config.json says {wanted[axis]}",
            fix="put back the r (and rank_pattern) of the training into adapter_config.json",
        )  # fmt: skip
    if not part:
        return _red(
            subject, "other-rows", line,
            cause="the vocabulary was resized for the training, and this base has another",
            fix="give the base as it was trained, with its tokens added, or take the copies out of the adapter",
        )  # fmt: skip
    fitting = _released_that_fit(loaded, [text])
    return _red(
        subject, "other-size", line,
        cause="the adapter belongs to a model of another size" + (f": {some(fitting)}" if fitting else ""),
        fix="give the base that it was trained on",
    )  # fmt: skip


def _released_that_fit(loaded: Loaded, texts: Sequence[str]) -> list[str]:
    """Names of releases whose language backbone is as wide as the A matrices of these keys."""
    found = []
    for text in texts:
        if loaded.keys[text].part == "lora_A" and loaded.keys[text].tail.endswith(("q_proj", "k_proj", "gate_proj")):
            width = loaded.shapes[text][-1]
            configs = ((name, released_config(name)) for name in released_names())
            found += [name for name, config in configs if config.get_text_config().hidden_size == width]
    return found


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
        subject, "unknown-keys", line, cause=f"no module of the model is called so; {_SILENT}", fix=_PLAIN,
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
        yield _dora(subject, loaded, stray, bare)
        return
    if (stray or bare) and all(part.is_bias and part.matrix for part in stray | bare):
        yield _biases(subject, loaded, stray, bare)
        return
    if half := _halves(loaded):
        yield _red(
            subject, "half-pairs", f"{len(half)} modules have only one of the two matrices A and B: {some(half)}",
            cause="the file is not complete", fix="save the adapter again",
        )  # fmt: skip
        return
    if bare:
        names = list(dict.fromkeys(part.module for part in bare))
        ends = Counter(name.rpartition(".")[2] for name in names)
        wanted = {part.module for part in loaded.wanted}
        whole = Counter(name.rpartition(".")[2] for name in wanted)
        dropped = [end for end, count in ends.items() if count >= whole[end]]
        said = f", and no {' and no '.join(sorted(dropped))} at all" if dropped else ""
        yield _red(
            subject, "keys-missing",
            f"{len(names)} of {len(wanted)} modules that adapter_config.json asks for have no tensors in the "
            f"file{said}: {some(sorted(names))}",
            cause=f"they were dropped or frozen when the adapter was made or saved; {_SILENT}",
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


def _halves(loaded: Loaded) -> list[str]:
    sides: dict[str, set[str]] = {}
    for module, matrix, is_bias in loaded.held:
        if matrix in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") and not is_bias:
            sides.setdefault(module, set()).add(matrix)
    return sorted(module for module, parts in sides.items() if len(parts) == 1)


def _dora(subject: Subject, loaded: Loaded, stray: set[Part], bare: set[Part]) -> Finding:
    asked = bool(getattr(subject.lora, "use_dora", False))
    held = sum(part.matrix == "lora_magnitude_vector" for part in loaded.held)
    return _red(
        subject, "dora-differs",
        f"adapter_config.json says use_dora={asked}, and the file has {held} magnitude vectors "
        f"({len(bare)} missing, {len(stray)} too many)",
        cause="configuration and file are of two trainings, or one was edited",
        fix=f"put back use_dora={bool(held)}",
    )  # fmt: skip


def _biases(subject: Subject, loaded: Loaded, stray: set[Part], bare: set[Part]) -> Finding:
    asked = bool(getattr(subject.lora, "lora_bias", False))
    held = sum(part.is_bias and bool(part.matrix) for part in loaded.held)
    return _red(
        subject, "lora-bias-differs",
        f"adapter_config.json says lora_bias={asked}, and the file has {held} biases of B "
        f"({len(bare)} missing, {len(stray)} too many)",
        cause="configuration and file are of two trainings, or one was edited",
        fix=f"put back lora_bias={bool(held)}",
    )  # fmt: skip
