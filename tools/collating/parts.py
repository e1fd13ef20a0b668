"""Processor, configuration and model of one family, and the rows that collators are given."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collating.frameworks import RELEASES
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.models.sources.released import released_config
from pytest_qvl.models.sources.synthetic_processor import write_processor
from pytest_qvl.samples import Sample, scenes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

TOKENS_PER_CELL = 3  # per side: images that neither the processors nor qwen_vl_utils resize, in some 100 visual tokens
# Cuts the image of every row: the text before it is below 50 tokens with any system prompt, the image has 81 or more.
CUT = 72


class Unsupported(Exception):
    """A framework does not offer what a property is about; the message says so in words."""


class Refused(Exception):
    """A framework takes out a row that is too long, and says so; the message says how."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a framework.

    Attributes:
        set_up: One of the adapter's.
        limit: Of tokens in a row; None for none.
        packed: Several samples in one row.
        side: On which rows are padded.
    """

    set_up: str
    limit: int | None = None
    packed: bool = False
    side: str = "right"


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        sample: The sample that it was made of, with what ``checks.batch`` compares.
        turns: Questions and answers, in order.
        frames: Of a video, which then stands in place of images.
    """

    sample: Sample
    turns: tuple[tuple[str, str], ...]
    frames: tuple[Image, ...] = ()

    @property
    def images(self) -> list[Image]:
        """Copies, since collators may change what they are given."""
        return [] if self.frames else [image.copy() for image in self.sample.images]

    def media(self) -> list[dict[str, Any]]:
        """Parts of the first question that are no text."""
        if self.frames:
            return [{"type": "video", "video": [frame.copy() for frame in self.frames]}]
        return [{"type": "image", "image": image} for image in self.images]

    def compared(self) -> dict[str, Any]:
        """What ``checks.batch`` compares a row of the batch with."""
        return {"messages": self.messages(bare=True), "images": self.images}

    def messages(self, *, bare: bool = False) -> list[dict[str, Any]]:
        """The conversation in the layout of Transformers; `bare` leaves the images themselves out of it."""
        made: list[dict[str, Any]] = []
        media = [{"type": part["type"]} for part in self.media()] if bare else self.media()
        for number, (question, answer) in enumerate(self.turns):
            content = [*(media if number == 0 else []), {"type": "text", "text": question}]
            made.append({"role": "user", "content": content})
            made.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return made

    def tagged(self) -> list[dict[str, str]]:
        """The conversation as text, with a tag for each image, or one for the video, before the first question."""
        tags = "<video>" if self.frames else "<image>" * len(self.sample.images)
        return [
            {"role": role, "content": (tags if number == 0 and role == "user" else "") + text}
            for number, turn in enumerate(self.turns)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]


@dataclass(frozen=True)
class Parts:
    """What a family's collators are made with.

    Attributes:
        model_type: Of the configuration.
        folder: Holds the files of the processor and ``config.json``.
    """

    model_type: str
    folder: Path

    @property
    def label(self) -> str:
        """The family's name in prose."""
        return FAMILIES[self.model_type].label

    @cached_property
    def config(self) -> Any:
        """Of a released checkpoint."""
        return released_config(RELEASES[self.model_type])

    def processor(self, padding_side: str = "right") -> Any:
        """A fresh one: frameworks patch it."""
        processor = load_processor(self.folder)
        processor.tokenizer.padding_side = padding_side
        return processor

    @cached_property
    def judge(self) -> Any:
        """The processor that batches are judged by: no framework sees it."""
        return self.processor()

    @cached_property
    def model(self) -> Any:
        """The family's model class without storage: frameworks ask it for its configuration and its positions."""
        import torch
        from transformers import AutoModelForImageTextToText

        small = released_config(RELEASES[self.model_type])
        small.get_text_config().num_hidden_layers = 1
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(small)

    @property
    def cell(self) -> int:
        """Pixels per side of a scene's cell."""
        vision = self.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size * TOKENS_PER_CELL)


def write_parts(model_type: str, folder: Path) -> Parts:
    """Write the files of a family into a folder."""
    name = RELEASES[model_type]
    write_processor(folder, name)
    config = released_config(name)
    settings = json.loads(config.to_json_string(use_diff=False))
    settings["architectures"] = [FAMILIES[model_type].config_class.removesuffix("Config") + "ForConditionalGeneration"]
    settings["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    images = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    images |= {
        "size": {"shortest_edge": images["min_pixels"], "longest_edge": images["max_pixels"]},
        "video_processor_type": "Qwen3VLVideoProcessor" if model_type == "qwen3_vl" else "Qwen2VLVideoProcessor",
        "image_processor_type": images["image_processor_type"],
    }
    (folder / "video_preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    return Parts(model_type, folder)


def rows_of(skills: Sequence[str], cell: int, seed: int = 0) -> list[Row]:
    """One row for each skill, with one question."""
    return [Row(s, ((s.question, s.answer),)) for s in scenes(seed, 1, skills, cell=cell)]


def several_turns(cell: int) -> list[Row]:
    """Rows of two questions: one about the image, then one about text; a third row with one question."""
    first, second, third = rows_of(("colour", "count", "side"), cell)
    asked = scenes(1, 2, ("text",), cell=cell)
    return [_asked_again(first, asked[0]), _asked_again(second, asked[1]), third]


def _asked_again(row: Row, then: Sample) -> Row:
    turns = (*row.turns, (then.question, then.answer))
    return Row(replace(row.sample, answer=then.answer), turns)


def with_video(cell: int) -> list[Row]:
    """A row whose four frames are two scenes of one size, and one whose frames are another two."""
    made = []
    for sample in scenes(0, 1, ("colour", "count"), cell=cell):
        assert sample.swapped is not None
        frames = (*sample.images, *sample.images, *sample.swapped, *sample.swapped)
        made.append(Row(replace(sample, images=()), ((sample.question, sample.answer),), frames))
    return made
