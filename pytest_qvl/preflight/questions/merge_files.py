"""Question 7 with ``--merged``: is all that the adapter does not add to as it was in the base?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pytest_qvl.models.sources.loading import has_tied_head
from pytest_qvl.preflight import naming
from pytest_qvl.preflight.base import Base
from pytest_qvl.preflight.commands import red
from pytest_qvl.preflight.files.values import FLOATS, dtype_of, read_whole
from pytest_qvl.preflight.findings import Finding, some
from pytest_qvl.preflight.merged import Place, Same, compare, outside_cells
from pytest_qvl.preflight.survey import weight_name
from pytest_qvl.preflight.timing import each_in_a_thread
from pytest_qvl.preflight.weights import Weights

if TYPE_CHECKING:
    import torch

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.preflight.subject import Subject

NUMBER = 7
SERVE = "serve base and adapter unmerged"
UNMERGED = f"{SERVE}, or merge and save in float32"
AGAIN = "merge again onto the 16-bit base with PeftModel.merge_and_unload, and save with save_pretrained"
# Causes that more than one way to judge a merge may find.
NOT_FOUND = "the merge found no weight by the names of the adapter's keys, or the base was saved in its place"
OTHER_FACTOR = "the merge multiplied ΔW by another number than alpha / r"
HARDLY_TRAINED = "the adapter was hardly trained, or its scaling (lora_alpha / r) is not that of the training"
_ADAPTERS = (".lora_", ".base_layer.", "base_model.model.", ".modules_to_save.", ".token_adapter.")
_COMPUTED = ("inv_freq", "position_ids")  # buffers that earlier releases saved


@dataclass(frozen=True)
class Case:
    """A merged checkpoint before the court.

    Attributes:
        subject: Base and adapter.
        checkpoint: The merged checkpoint.
        there: Its tensors.
    """

    subject: Subject
    checkpoint: Base
    there: Weights

    @cached_property
    def parts(self) -> Parts:
        """The merged model without data, as its own configuration describes it."""
        return self.checkpoint.skeleton()

    @property
    def head(self) -> str:
        """Name of the head's weight."""
        return f"{self.subject.parts.roots['lm_head']}.weight"

    @property
    def embeddings(self) -> str:
        """Name of the embeddings' weight."""
        return f"{self.subject.parts.roots['embeddings']}.weight"

    @cached_property
    def was_tied(self) -> bool:
        """Whether the base ties its head to its embeddings."""
        return has_tied_head(self.subject.parts)

    @cached_property
    def is_tied(self) -> bool:
        """Whether the merged checkpoint does, by its configuration."""
        return has_tied_head(self.parts)

    @cached_property
    def expected(self) -> list[str]:
        """The base's tensors, computed buffers left out."""
        return [name for name in self.subject.weights.names() if not name.endswith(_COMPUTED)]

    @cached_property
    def found(self) -> list[str]:
        """The merged checkpoint's."""
        return [name for name in self.there.names() if not name.endswith(_COMPUTED)]

    @cached_property
    def unread(self) -> dict[str, str]:
        """Modules of which some tensors of the adapter are not read, with the reason; they cannot be judged at all."""
        placed = self.subject.placed
        found = {placed[text].module: reason for text, reason in self.subject.updates.beyond.items()}
        return {module: reason for module, reason in found.items() if module}

    @cached_property
    def odd(self) -> list[str]:
        """Tensors that are floating point in the base and here integers, or floating point of 8 bits."""
        shared = [name for name in self.found if name in self.subject.weights and not self.there.is_packed(name)]
        return [n for n in shared if self.subject.weights[n].dtype in FLOATS and self.there[n].dtype not in FLOATS]

    @cached_property
    def touched(self) -> Mapping[str, str]:
        """The base's tensors that the adapter adds to, and the module of each."""
        subject = self.subject
        weights = {name: module for module in subject.updates.pairs if (name := weight_name(subject, module))}
        return weights | {name: name for name in subject.updates.biases}

    def group(self, names: Sequence[str]) -> str:
        """How many of some tensors belong to each part of the model, in words."""
        return self.subject.by_group(names)

    def red(self, name: str, line: str, *, cause: str, fix: str = AGAIN) -> Finding:
        """A red finding."""
        return red(NUMBER, self.subject, name, line, cause=cause, fix=fix)


# Names


def names_of(case: Case) -> Iterator[Finding]:
    """Tensors that were dropped, renamed or added, by the headers."""
    missing = [name for name in case.expected if name not in case.there]
    added = [name for name in case.found if name not in case.subject.weights]
    if case.was_tied:
        added = [name for name in added if name != case.head]
    if beside := [name for name in added if any(mark in f".{name}" for mark in _ADAPTERS)]:
        yield case.red(
            "adapter-beside", f"{len(beside)} tensors of the merged checkpoint are an adapter's: {some(beside)}",
            cause="the adapted model was saved as it stood: ΔW lies beside the weights and is not in them",
        )  # fmt: skip
        missing = [name for name in missing if not any(name.rpartition(".")[0] in other for other in beside)]
        added = [name for name in added if name not in beside]
    renamed = _renamed(missing, added)
    if renamed:
        one, other = next(iter(renamed.items()))
        yield case.red(
            "renamed", f"{len(renamed)} tensors have other names than in the base: {one} is called {other}",
            cause="it was saved by a release or a tool that names modules otherwise; from_pretrained fills what it "
            "does not find with random values",
        )  # fmt: skip
    missing = [name for name in missing if name not in renamed]
    added = [name for name in added if name not in renamed.values()]
    if missing:
        yield case.red(
            "dropped", f"{len(missing)} of {len(case.expected)} tensors of the base are not in the merged checkpoint "
            f"({case.group(missing)}): {some(missing)}",
            cause="only a part of the model was saved, or a shard is missing; from_pretrained fills it at random",
        )  # fmt: skip
    if added:
        yield case.red(
            "added", f"{len(added)} tensors of the merged checkpoint are not in the base: {some(added)}",
            cause="it was saved by another model class, or is a merge of another base",
        )  # fmt: skip


def odd_of(case: Case) -> Iterator[Finding]:
    """Tensors whose stored numbers are not the weights, and nothing says what they are."""
    if odd := case.odd:
        kinds, before = ({where[name].dtype for name in odd} for where in (case.there, case.subject.weights))
        yield case.red(
            "odd-dtype",
            f"{len(odd)} tensors of the merged checkpoint are stored as {', '.join(sorted(kinds))}, the base's in "
            f"{', '.join(sorted(before))} ({case.group(odd)}): {some(odd)}",
            cause="they were quantized or cast, and config.json has no quantization that would undo it: "
            "from_pretrained takes the stored numbers for the weights",
        )  # fmt: skip


def lonely_biases(case: Case) -> Iterator[Finding]:
    """Biases of B that the merged checkpoint has no place for."""
    lonely = [name for name in case.subject.lonely_biases if name not in case.there]
    if lonely:
        yield case.red(
            "biases-lost", f"{len(lonely)} biases of B (lora_bias) are not in the merged checkpoint: {some(lonely)}",
            cause="these layers have no bias that they could be added to; PEFT refuses to merge such an adapter, so "
            "what merged it left them out",
            fix=SERVE,
        )  # fmt: skip


def _renamed(missing: Sequence[str], added: Sequence[str]) -> dict[str, str]:
    """New names of missing tensors, by the end that every layout has."""
    ends = {naming.Key(name, name, "").tail: name for name in added}
    tails = {name: naming.Key(name, name, "").tail for name in missing}
    return {name: ends[tail] for name, tail in tails.items() if tail in ends}


# What the adapter does not add to


@dataclass
class Rest:
    """Tensors that have to be the base's, or a trained copy's."""

    case: Case
    same: list[str] = field(default_factory=list)
    changed: list[Same] = field(default_factory=list)
    cast: list[Same] = field(default_factory=list)
    wider: list[str] = field(default_factory=list)
    unpacked: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Compare all of them."""
        case = self.case
        adapted = {name for name, module in case.touched.items() if name in (module, f"{module}.weight")}
        adapted |= {*case.odd, *(f"{module}.{end}" for module in case.unread for end in ("weight", "bias"))}
        others = [
            name
            for name in [*case.expected, *([case.head] if case.was_tied and case.head in case.there else [])]
            if name in case.there and name not in adapted and not _is_head_update(case, name)
        ]
        for name, (found, kind) in zip(others, each_in_a_thread(self._compared, others), strict=True):
            if found is None:
                self.reshaped.append(name)
            elif kind == "copy":
                (self.copies if found.changed == found.cast else self.lost).append(name)
            elif kind == "packed" and not found.changed:
                self.unpacked.append(name)
            else:
                self._file(found)

    def _compared(self, name: str) -> tuple[Same | None, Literal["copy", "packed", ""]]:
        """How a tensor compares, or ``None`` where the shapes differ; whether with a trained copy, or one in 4 bits."""
        subject, there = self.case.subject, self.case.there
        copy = subject.updates.copies.get(name)
        source = copy or subject.weights[name if name in subject.weights else self.case.embeddings]
        if copy is None and subject.weights.is_packed(name) != there.is_packed(name):
            return self._compared_unpacked(name), "packed"
        if source.shape != there[name].shape:
            return None, ""
        through = dtype_of(subject.weights[name]) if copy is not None and name in subject.weights else None
        return compare(name, source, there[name], self._token_rows(name), through), "" if copy is None else "copy"

    def _compared_unpacked(self, name: str) -> Same | None:
        """Of two, one of them in 4 bits: is the other what it was packed from, or what it is unpacked to?"""
        places = Place(self.case.subject.weights, name), Place(self.case.there, name)
        packed, other = places if places[0].weights.is_packed(name) else places[::-1]
        if packed.weights.shape(name) != other.weights.shape(name):
            return None
        return Same(name, math.prod(packed.weights.shape(name)), False, outside_cells(None, packed, other))

    def _file(self, found: Same) -> None:
        if found.bytes_equal:
            self.same.append(found.name)
        elif not found.changed:
            self.wider.append(found.name)
        elif found.changed == found.cast:
            self.cast.append(found)
        else:
            self.changed.append(found)

    def _token_rows(self, name: str) -> dict[int, torch.Tensor] | None:
        """Trained rows of an embedding, by number."""
        module = name.removesuffix(".weight")
        tensor = self.case.subject.updates.token_rows.get(module)
        asked = getattr(self.case.subject.lora, "trainable_token_indices", None)
        if tensor is None or not asked:
            return None
        by_module = dict.fromkeys([module], asked) if isinstance(asked, list) else asked
        numbers = next((found for end, found in by_module.items() if f".{module}".endswith(f".{end}")), [])
        return dict(zip(numbers, read_whole(tensor).float(), strict=False))

    def findings(self) -> Iterator[Finding]:
        """What is wrong with them."""
        case = self.case
        if self.reshaped:
            yield case.red(
                "reshaped", f"{len(self.reshaped)} tensors have other shapes than in the base: {some(self.reshaped)}",
                cause="the vocabulary was resized, or the base is another size",
                fix="give the base that the adapter was merged into",
            )  # fmt: skip
        if self.changed:
            names = [each.name for each in self.changed]
            share = sum(each.changed for each in self.changed) / sum(each.numel for each in self.changed)
            bad = sum(each.bad for each in self.changed)
            yield case.red(
                "changed-elsewhere",
                f"{len(names)} tensors that the adapter does not touch differ from the base's ({case.group(names)}; "
                f"{share:.0%} of their values{f', {bad:,} are NaN or infinite' if bad else ''}): {some(names)}",
                cause="it was merged into another base or into one that was quantized, or saved after more training",
            )  # fmt: skip
        if self.cast:
            names = [each.name for each in self.cast]
            before, after = case.subject.weights[names[0]].dtype, case.there[names[0]].dtype
            yield case.red(
                "cast", f"{len(names)} tensors were cast from {before} to {after}, which changed "
                f"{sum(each.changed for each in self.cast):,} of their values ({case.group(names)})",
                cause=f"the merge was loaded or saved in {after}",
                fix=f"load the base with dtype of {before} for the merge, and save it so",
            )  # fmt: skip
        if self.lost:
            yield case.red(
                "copy-not-merged",
                f"{len(self.lost)} trained copies (modules_to_save) are not the merged checkpoint's: {some(self.lost)}",
                cause="the merge took A and B only",
            )  # fmt: skip


def _is_head_update(case: Case, name: str) -> bool:
    """Whether a tensor is the head, which the adapter adds to, of a base that stores its embeddings only."""
    return name == case.head and case.subject.parts.roots["lm_head"] in case.subject.updates.pairs
