"""Question 6: processor, tokenizer, chat template and generation settings, beside the adapter and in the base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.generation_settings import at_random, unusual
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.families import FAMILIES, Family
from pytest_qvl.models.sources.released import image_sizes
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.findings import Finding, counted, neutral, some
from pytest_qvl.preflight.processor_files import ProcessorFiles, pixel_limits
from pytest_qvl.preflight.templates import END, fault_of
from pytest_qvl.preflight.value_types import SAMPLING, Wrong, flat

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject

NUMBER = 6
# Tokens that the model's configuration has ids of, by the field's name.
_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")
# Steps that every Qwen-VL was trained with; switched off, pixel values are of another size or scale.
_STEPS = ("do_resize", "do_rescale", "do_normalize")
_SCALE = 1 / 255
# JSON keeps 17 digits of a float64; two files of one value differ by roundings of its last at most.
_SAME = 1e-12
_SHOWN = 4  # wrong values in one sentence


@dataclass(frozen=True)
class Beside:
    """What is judged, and what it is compared with.

    Attributes:
        subject: What it is about.
        files: The processor that will be used.
        base: The base's own; ``None`` where the base has no files at hand.
        where: Where :attr:`files` are, in words.
        loaded_apart: Whether these are files of a training beside its adapter without image settings, so that the
            processor is loaded from the base.
    """

    subject: Subject
    files: ProcessorFiles
    base: ProcessorFiles | None
    where: str
    loaded_apart: bool = False

    @property
    def image(self) -> dict[str, Any] | None:
        """Settings of the image processor that will be used."""
        borrowed = self.base.image if self.loaded_apart and self.base is not None else None
        return self.files.image if self.files.image is not None else borrowed

    @property
    def wrong(self) -> tuple[Wrong, ...]:
        """Values that their settings cannot have, in the files that will be used."""
        borrowed = self.base.wrong_image if self.loaded_apart and self.base is not None else ()
        return (*self.files.wrong, *borrowed)

    @property
    def family(self) -> Family:
        """The base's family."""
        return FAMILIES[self.subject.base.family]

    def copy(self, file: str) -> str:
        """The fix of a file that is wrong: the base's, or the release's where it is the base's own."""
        return f"copy {file} of the {'release' if self.base is self.files else 'base'} into that folder"

    def red(self, name: str, line: str, *, cause: str, fix: str) -> Finding:
        """A red finding of this question."""
        return red(NUMBER, self.subject, name, f"{self.where}: {line}", cause=cause, fix=fix)


def answer(subject: Subject) -> Iterator[Finding]:
    """Every setting that decides pixels, tokens and the end of replies, against the base's."""
    own = None if subject.base.folder is None else ProcessorFiles(subject.base.folder)
    yield from _judged(_beside(subject, own))
    if subject.merged is not None and subject.merged.folder is not None:
        files = ProcessorFiles(subject.merged.folder)
        if files.is_empty:
            yield Finding(
                NUMBER, "no-merged-processor", "not judged",
                "the merged checkpoint has no processor and no tokenizer of its own: serve it with the base's",
            )  # fmt: skip
        else:
            yield from _judged(Beside(subject, files, own, "the processor of the merged checkpoint"))


def _judged(beside: Beside) -> Iterator[Finding]:
    wrong = [
        finding
        for judge in (_types, _complete, _image, _tokens, _untrained, _template, _generation)
        for finding in judge(beside)
    ]
    yield from wrong
    if not wrong:
        yield Finding(
            NUMBER, "processor", "green", f"{beside.where}: {_said(beside)}",
            keeps_green=pytest_line(beside.subject), notes=tuple(_notes(beside)),
        )  # fmt: skip


def _beside(subject: Subject, own: ProcessorFiles | None) -> Beside:
    if subject.asked.processor is not None:
        folder = Folder(subject.asked.processor)
        return Beside(subject, ProcessorFiles(folder), own, f"the processor in {neutral(str(folder), 200)}")
    if subject.adapter is not None and subject.adapter.folder is not None:
        files = ProcessorFiles(subject.adapter.folder)
        if not files.is_empty:
            return Beside(subject, files, own, "the processor beside the adapter", loaded_apart=files.image is None)
    if own is None or own.is_empty:
        raise CannotJudge("neither the base nor the adapter has processor files at hand (--processor)")
    return Beside(subject, own, own, "the processor of the base")


def _said(beside: Beside) -> str:
    known = [
        name
        for name, there in (
            ("image settings", beside.image), ("tokenizer", beside.files.has_tokenizer),
            ("chat template", beside.files.template), ("generation settings", beside.files.generation),
        )
        if there
    ]  # fmt: skip
    return f"{', '.join(known)} belong to {beside.family.label}"


def _notes(beside: Beside) -> Iterator[str]:
    if beside.loaded_apart and beside.files.has_tokenizer:
        yield (
            "beside the adapter is a tokenizer only, so AutoProcessor of that folder gives no image processor: load "
            "the processor from the base"
        )
    if beside.base is None or beside.base is beside.files:
        return
    for name, values in pixel_limits(beside.files.image or {}).items():
        theirs = pixel_limits(beside.base.image or {})[name]
        if values and theirs and values != theirs:
            yield f"{name} is {neutral(values[0], 40)}, the base's {neutral(theirs[0], 40)}: train and serve alike"
    if beside.files.template and beside.base.template and beside.files.template != beside.base.template:
        yield "the chat template is not the base's: train and serve with the same"
    if found := unusual(SimpleNamespace(**(beside.files.generation or {}))):
        yield f"generation settings that change greedy replies: {some(found)}"


def _types(beside: Beside) -> Iterator[Finding]:
    wrong = beside.wrong
    if not wrong:
        return
    said = [
        f"{each.inside}{'.' if each.inside else ''}{neutral(each.key, 80)} of {each.file} is "
        f"{neutral(json.dumps(each.value), 80)} and has to be {each.expected}"
        for each in wrong[:_SHOWN]
    ]
    if len(wrong) > _SHOWN:
        said.append(f"and {len(wrong) - _SHOWN} more")
    files = ", ".join(dict.fromkeys(each.file for each in wrong))
    yield beside.red(
        "wrong-types", "; ".join(said),
        cause="Transformers raises an error at such a value, or acts on another one than was meant",
        fix=f"write what is expected, or {beside.copy(files)}",
    )  # fmt: skip


def _complete(beside: Beside) -> Iterator[Finding]:
    files = beside.files
    if files.has_tokenizer and files.image is None and not beside.loaded_apart:
        yield beside.red(
            "no-image-processor", "a tokenizer without preprocessor_config.json",
            cause="only the tokenizer was saved: AutoProcessor gives a bare tokenizer then, which takes no images",
            fix="processor.save_pretrained(FOLDER)",
        )  # fmt: skip
    if files.image is not None and not files.has_tokenizer:
        yield beside.red(
            "no-tokenizer", "image settings without a tokenizer", cause="only the image processor was saved",
            fix="processor.save_pretrained(FOLDER)",
        )  # fmt: skip
    if files.has_tokenizer and files.template is None:
        yield beside.red(
            "no-template", "no chat template", cause="it was not saved with the tokenizer, so no prompt can be written",
            fix=beside.copy("chat_template.jinja (or .json)"),
        )  # fmt: skip


def _image(beside: Beside) -> Iterator[Finding]:
    image, vision = beside.image, beside.subject.base.config.vision_config
    if image is None:
        return
    wanted = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    off = {name: image[name] for name, value in wanted.items() if name in image and image[name] != value}
    if off:
        said = ", ".join(f"{name} {neutral(value, 40)} instead of {wanted[name]}" for name, value in off.items())
        yield beside.red(
            "other-patches", said, cause="these are the settings of another model's processor",
            fix=beside.copy("preprocessor_config.json"),
        )  # fmt: skip
    scales = {"image_mean": beside.family.image_mean, "image_std": beside.family.image_std}
    shifted = [name for name, value in scales.items() if name in image and not _same(image[name], value)]
    dark = [name for name in _STEPS if image.get(name) is False]
    if "rescale_factor" in image and not _same(image["rescale_factor"], [_SCALE]):
        dark.append("rescale_factor")
    if shifted or dark:
        said = ", ".join(f"{name} {neutral(image[name], 80)}" for name in [*shifted, *dark])
        yield beside.red(
            "other-scale", f"{said}, which {beside.family.label} was not trained with",
            cause="pixel values reach the tower shifted or on another scale",
            fix=beside.copy("preprocessor_config.json"),
        )  # fmt: skip
    yield from _limits(beside, image)
    name = beside.files.processor_class
    classes = {family.processor_class for family in FAMILIES.values()}
    if name in classes - {beside.family.processor_class}:
        yield beside.red(
            "other-processor", f"processor_class is {neutral(name, 80)}, of another family",
            cause="it was saved for another model", fix=f"use {beside.family.processor_class}",
        )  # fmt: skip


def _same(value: Any, wanted: Any) -> bool:
    """Whether numbers are those that are wanted, one by one; a number alone stands for all."""
    values = value if isinstance(value, list) else [value] * len(wanted)
    return len(values) == len(wanted) and all(abs(v - w) <= _SAME for v, w in zip(values, wanted, strict=True))


def _limits(beside: Beside, image: Mapping[str, Any]) -> Iterator[Finding]:
    limits = pixel_limits(image)
    twice = {name: values for name, values in limits.items() if len(values) > 1}
    if twice:
        said = ", ".join(f"{name} is {' and '.join(neutral(v, 40) for v in values)}" for name, values in twice.items())
        yield beside.red(
            "limits-contradict", f"{said}: given twice, as a field and in size",
            cause="one was set without the other, and which of them counts depends on the release and the class",
            fix="write the same number into min_pixels or max_pixels and into size",
        )  # fmt: skip
        return
    least, most = (values[0] if values else None for values in limits.values())
    sizes = image_sizes(beside.family.typical)
    cell = (sizes.patch_size * sizes.merge_size) ** 2
    wrong = [v for v in (least, most) if v is not None and v < 1]
    if wrong or (most is not None and (most < cell or (least is not None and least > most))):
        yield beside.red(
            "limits-impossible", f"min_pixels {neutral(least, 40)}, max_pixels {neutral(most, 40)}",
            cause="limits are numbers of pixels, 1 or above" if wrong else
            f"an image has at least one visual token of {cell} pixels, and least must not be above most",
            fix=beside.copy("preprocessor_config.json"),
        )  # fmt: skip


def _tokens(beside: Beside) -> Iterator[Finding]:
    files, config = beside.files, beside.subject.base.config
    added, special = files.added, files.special
    off = {
        name: added[text]
        for name, text in _TOKENS.items()
        if text in added and isinstance(getattr(config, name, None), int) and added[text] != getattr(config, name)
    }
    if off:
        said = ", ".join(f"{_TOKENS[n]} is {v}, {n} of the model {getattr(config, n)}" for n, v in off.items())
        yield beside.red(
            "other-ids", said, cause="tokens were added in front of them, or it is another model's tokenizer",
            fix="use the base's tokenizer",
        )  # fmt: skip
    rows = config.get_text_config().vocab_size
    beyond = sorted(text for text, index in added.items() if index >= rows)
    if beyond:
        yield beside.red(
            "beyond-embeddings", f"{counted(len(beyond), 'token')} with ids of {rows} and above: {some(beyond)}",
            cause=f"the embeddings of {beside.subject.base.label} have {rows} rows: tokens were added, they were not "
            "resized, or the base is not the one that was trained",
            fix="model.resize_token_embeddings(len(tokenizer)) before training; save them with the adapter",
        )  # fmt: skip
    if files.has_no_pad:
        yield beside.red(
            "no-pad", "pad_token is null",
            cause="a batch of prompts of different lengths cannot be padded: the tokenizer raises ValueError",
            fix='pad_token "<|endoftext|>"',
        )  # fmt: skip
    if special.get("pad_token") in _PLACEHOLDERS:
        yield beside.red(
            "pad-is-image", f"pad_token is {neutral(special['pad_token'], 40)}",
            cause="padding counts as places of images then, which have no pixels", fix='pad_token "<|endoftext|>"',
        )  # fmt: skip
    if "eos_token" in special and special["eos_token"] == special.get("pad_token"):
        yield beside.red(
            "pad-is-eos", f"pad_token and eos_token both are {neutral(special['eos_token'], 40)}",
            cause="collators take padding out of the loss, so the end of replies is not learned",
            fix='pad_token "<|endoftext|>", eos_token "<|im_end|>"',
        )  # fmt: skip


def _untrained(beside: Beside) -> Iterator[Finding]:
    """Tokens that the base's tokenizer lacks, whose rows nobody trains."""
    subject = beside.subject
    if beside.base is None or subject.adapter is None or beside.base is beside.files or not beside.base.added:
        return
    rows = subject.base.config.get_text_config().vocab_size
    new = [text for text, index in beside.files.added.items() if text not in beside.base.added and index < rows]
    fields = subject.adapter.fields
    targets = fields.get("target_modules")
    named = [*(fields.get("modules_to_save") or ()), *(targets if isinstance(targets, list) else [str(targets)])]
    trained = fields.get("trainable_token_indices") or any("embed_tokens" in str(name) for name in named)
    if new and not trained:
        yield beside.red(
            "untrained-tokens", f"{counted(len(new), 'token')} that the base does not have: {some(new)}",
            cause="nobody trained their rows of the embeddings, and this adapter does not either",
            fix='modules_to_save=["embed_tokens", "lm_head"] or trainable_token_indices, or leave the tokens out',
        )  # fmt: skip


def _template(beside: Beside) -> Iterator[Finding]:
    template = beside.files.template
    fault = None if template is None else fault_of(template)
    if fault is not None:
        yield beside.red(
            fault.name,
            f"the chat template {fault.words}",
            cause=fault.cause,
            fix=beside.copy("chat_template.jinja (or .json)"),
        )


def _generation(beside: Beside) -> Iterator[Finding]:
    """What makes replies random, endless, or cut, where the base's own settings do not."""
    settings = beside.files.generation
    if settings is None:
        return
    wrong = {each.key for each in beside.files.wrong_generation}
    eos = settings.get("eos_token_id")
    end = beside.files.added.get(END, beside.base.added.get(END) if beside.base else None)
    if end is not None and "eos_token_id" not in wrong and end not in flat(eos):
        yield beside.red(
            "never-ends", f"eos_token_id of generation_config.json is {neutral(eos, 60)}, and {END} is {end}",
            cause="a reply ends with that token, and generate() does not stop at it",
            fix=f"put {end} into eos_token_id",
        )  # fmt: skip
    drawn = "" if wrong & SAMPLING else at_random(SimpleNamespace(**settings), beside.subject.base.family)
    if drawn:
        yield beside.red("drawn-replies", drawn, cause="answers differ from run to run", fix="do_sample=False")
