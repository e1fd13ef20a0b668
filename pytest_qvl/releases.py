"""What is installed: releases known to be broken, and those that this package does not work with.

Nothing is read before somebody asks, at the start of a session that uses the suite or fixtures, or when a check fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from packaging.requirements import Requirement

THIS = "pytest-qvl"
STACK = ("transformers", "peft", "bitsandbytes", "torch", "accelerate")
_TITLES = {"transformers": "Transformers", "peft": "PEFT", "trl": "TRL", "unsloth_zoo": "Unsloth Zoo"}


@dataclass(frozen=True)
class Defect:
    """What is broken in some releases of a package.

    Attributes:
        package: Its name in the package index.
        versions: The broken releases, as a specifier (``">=5.2,<5.4"``).
        what: What goes wrong, in a few words.
        fixed_in: The first release without it; empty where there is none yet.
        thread: Where it was reported.
        checks: The checks that it breaks.
        met: What has to be used to meet it; empty where every session does that uses a model.
    """

    package: str
    versions: str
    what: str
    fixed_in: str
    thread: str
    checks: tuple[str, ...]
    met: str = ""

    @property
    def summary(self) -> str:
        """What goes wrong, behind what has to be used to meet it."""
        return f"{self.met}: {self.what}" if self.met else self.what


# Run at both ends: the last broken release turns these checks red, the first one without the defect does not.
DEFECTS = (
    Defect(
        "transformers",
        ">=4.54,<4.57",
        "text positions of left-padded rows count the padding while decoding",
        "4.57.1",
        "https://github.com/huggingface/transformers/issues/41180",
        ("decode_positions",),
    ),
    Defect(
        "transformers",
        ">=5.2,<5.4",
        "rope_deltas that generate() left behind are used for a later batch without images",
        "5.4.0",
        "https://github.com/huggingface/transformers/issues/44873",
        ("position_state",),
    ),
    Defect(
        "transformers",
        ">=5.3,<5.5.4",
        "temporal positions of images are multiplied by tokens_per_second, which is meant for videos",
        "5.5.4",
        "https://github.com/huggingface/transformers/issues/45325",
        ("mrope_positions", "decode_positions"),
    ),
    Defect(
        "transformers",
        ">=4.54,<4.57",
        "an image's positions are taken for the starts of packed samples, so that its tokens see nothing before them",
        "4.57.0",
        "https://github.com/huggingface/transformers/issues/40154",
        ("layer_arithmetic",),
        "batches without attention_mask",
    ),
    Defect(
        "transformers",
        ">=4.52,<4.56",
        "the loss cuts its logits by the old size, and crashes",
        "4.56.0",
        "https://github.com/huggingface/transformers/pull/40130",
        ("loss_arithmetic",),
        "a resized vocabulary",
    ),
    Defect(
        "transformers",
        ">=4.52,<4.56",
        "num_items_in_batch does not reach the loss, so that it grows with the number of micro-batches",
        "4.56.0",
        "https://github.com/huggingface/transformers/pull/40333",
        ("loss_arithmetic",),
        "a Trainer that accumulates gradients",
    ),
    Defect(
        "transformers",
        ">=5.2,<5.5.4",
        "Accelerate divides by gradient_accumulation_steps a second time, so that gradients are too small",
        "5.5.4",
        "https://github.com/huggingface/transformers/issues/45305",
        ("loss_arithmetic",),
        "a Trainer that accumulates gradients",
    ),
    Defect(
        "transformers",
        ">=5.0",
        "entries are matched from the start of a module's name, so that visual keeps nothing in 16 bits, silently",
        "",
        "https://github.com/huggingface/transformers/pull/42455",
        ("quantization_census",),
        "llm_int8_skip_modules",
    ),
    Defect(
        "transformers",
        ">=4.49,<5.0",
        "no gradient reaches the tower, since its patches do not require any",
        "5.0.0",
        "https://github.com/huggingface/transformers/issues/41993",
        ("training_step",),
        "LoRA on the vision tower under reentrant checkpointing",
    ),
    Defect(
        "transformers",
        ">=5.0,<5.6",
        "load_adapter leaves its vision part as initialised, or crashes",
        "5.6.0",
        "https://github.com/huggingface/transformers/pull/46766",
        ("adapter_roundtrip",),
        "an adapter saved before 4.52",
    ),
    Defect(
        "transformers",
        ">=4.57,<5.0",
        "it is ignored where the checkpoint gives its limits as size, and larger images stay as they are",
        "5.0.0",
        "https://github.com/huggingface/transformers/issues/41955",
        ("image_preprocessing",),
        "max_pixels without min_pixels, when a processor is loaded beside torchvision",
    ),
    Defect(
        "transformers",
        ">=5.4",
        "its vision part stays as initialised, in later releases all of it",
        "",
        "https://github.com/illuin-tech/colpali/issues/424",
        ("adapter_roundtrip",),
        "PeftModel.from_pretrained on an adapter saved before 4.52",
    ),
    Defect(
        "peft",
        ">=0.18,<0.20",
        "saving the one writes the other into its file, too",
        "0.20.0",
        "https://github.com/huggingface/peft/pull/3282",
        ("adapter_roundtrip",),
        "two adapters, the name of one part of the other's",
    ),
    Defect(
        "peft",
        ">=0.18,<0.21",
        "the one that is trained is frozen, too",
        "0.21.0",
        "https://github.com/huggingface/peft/issues/3487",
        ("adapter_census",),
        "an adapter loaded for inference beside one that is trained",
    ),
    Defect(
        "trl",
        ">=0.22,<0.29.1",
        "mm_token_type_ids keep the prompt's length",
        "0.29.1",
        "https://github.com/huggingface/trl/pull/5178",
        ("batch",),
        "SFT on prompts with images and their completions",
    ),
    Defect(
        "trl",
        "==0.29.0",
        "mm_token_type_ids keep the prompt's length, and do not reach the model",
        "0.29.1",
        "https://github.com/huggingface/trl/pull/5279",
        ("batch",),
        "DPO on prompts with images",
    ),
    Defect(
        "unsloth_zoo",
        ">=2025.9.3,<2025.9.14",
        "a completion is rendered by itself, so that the header of its turn is learned",
        "2025.11.1",
        "https://github.com/unslothai/unsloth-zoo/pull/342",
        ("batch",),
        "completion_only_loss of UnslothVisionDataCollator",
    ),
    Defect(
        "unsloth_zoo",
        ">=2025.9.3,<2026.6.3",
        "mm_token_type_ids keep the prompt's length",
        "2026.6.3",
        "https://github.com/unslothai/unsloth-zoo/pull/756",
        ("batch",),
        "UnslothVisionDataCollator on prompts with images and their completions",
    ),
)


def known_defects(check: str | None = None) -> list[str]:
    """A sentence for each known defect of what is installed: what every session meets, or what breaks a check."""
    return [
        f"{_title(defect.package)} {version} has this defect: {defect.what}{f' ({defect.met})' if defect.met else ''}; "
        f"{_mended(defect)}: {defect.thread}"
        for defect, version in _installed_defects()
        if (check in defect.checks if check else not defect.met)
    ]


def defects_where_met() -> list[str]:
    """One line per installed package of what goes wrong in it where certain things are used."""
    lines: dict[str, list[str]] = {}
    for defect, version in _installed_defects():
        if defect.met:
            lines.setdefault(f"{_title(defect.package)} {version}", []).append(defect.summary)
    return [f"{name}, known to go wrong with {'; with '.join(found)}" for name, found in lines.items()]


def _installed_defects() -> Iterator[tuple[Defect, str]]:
    for defect in DEFECTS:
        version = installed(defect.package)
        if version is not None and _within(version, defect.versions):
            yield defect, version


def _mended(defect: Defect) -> str:
    """The release without this defect, and the first one without any that every session meets, where that is later."""
    if not defect.fixed_in:
        return "no release has it fixed yet"
    sound = defect.fixed_in
    always = [d for d in DEFECTS if d.package == defect.package and not d.met]
    while others := [d.fixed_in for d in always if _within(sound, d.versions)]:
        sound = others[0]
    later = f" (take {sound}: until then there is another)" if sound != defect.fixed_in else ""
    return f"fixed in {defect.fixed_in}{later}"


def out_of_range() -> str:
    """Why this package does not work with what is installed, by the ranges of its own metadata; empty if it does.

    Packages without metadata are passed over: importing them tells.
    """
    wrong, wanted = [], []
    for package, versions in _requirements():
        version = installed(package)
        if version is not None and not _within(version, versions):
            wrong.append(f"{_title(package)} {version}")
            wanted.append(f"{package}{versions}")
    if not wrong:
        return ""
    command = " ".join(f"'{requirement}'" for requirement in wanted)
    return f"{THIS} does not work with {' and '.join(wrong)}, which is outside its range: pip install {command}"


def stack() -> str:
    """The versions of what a QLoRA model is made with: ``"transformers 5.17.0, peft 0.21.2, ..."``."""
    return ", ".join(f"{package} {version}" for package in STACK[:4] if (version := installed(package)) is not None)


@cache
def installed(package: str) -> str | None:
    """Version of an installed package by its metadata, ``None`` if it has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def is_before(package: str, version: str) -> bool:
    """Whether what is installed of a package is older than a release; not if it has no metadata."""
    found = installed(package)
    return found is not None and _within(found, f"<{version}")


def install_extra(extra: str) -> str:
    """The command that installs what an extra of this package adds, by the names of those packages themselves.

    So it works wherever this package came from.
    """
    wanted = [
        f"'{requirement.name}{requirement.specifier}'"
        for requirement in _metadata()
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": extra})
        and not requirement.marker.evaluate({"extra": ""})
    ]
    return f"pip install {' '.join(wanted)}" if wanted else f"install what {THIS}'s extra {extra!r} lists"


def _metadata() -> Iterator[Requirement]:
    """The requirements of this package, those of its extras included."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        texts = requires(THIS) or []
    except PackageNotFoundError:  # run from a source tree that was not installed
        texts = []
    yield from map(Requirement, texts)


def _requirements() -> Iterator[tuple[str, str]]:
    """Packages of the stack with their ranges, as this package's metadata has them."""
    for requirement in _metadata():
        if requirement.name in STACK and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            yield requirement.name, str(requirement.specifier)


def _within(version: str, versions: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(versions).contains(version, prereleases=True)


def _title(package: str) -> str:
    return _TITLES.get(package, package)
