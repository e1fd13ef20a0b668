"""Processor, tokenizer, template and generation settings of a folder, as plain data; nothing is rendered or built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pytest_qvl.models.sources.processors import IMAGE_SETTINGS_FILES
from pytest_qvl.preflight.files.folder import Folder

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json")
_SPECIAL = ("eos_token", "pad_token", "bos_token", "unk_token")


@dataclass(frozen=True)
class ProcessorFiles:
    """What one folder holds beside weights.

    Attributes:
        folder: The folder.
    """

    folder: Folder

    @cached_property
    def image(self) -> dict[str, Any] | None:
        """Settings of the image processor; ``None`` if the folder has none."""
        for name in IMAGE_SETTINGS_FILES:
            found = self.folder.optional_json(name)
            if found is not None:
                inner = found.get("image_processor")
                found = inner if isinstance(inner, dict) else found
                if "patch_size" in found or "image_processor_type" in found:
                    return found
        return None

    @cached_property
    def processor_class(self) -> str:
        """Name of the processor's class; empty if no file says."""
        for name in IMAGE_SETTINGS_FILES:
            found = (self.folder.optional_json(name) or {}).get("processor_class")
            if isinstance(found, str):
                return found
        return ""

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is there."""
        return any(self.folder.has(name) for name in TOKENIZER_FILES)

    @property
    def is_empty(self) -> bool:
        """Whether nothing of a processor is there."""
        return self.image is None and not self.has_tokenizer and self.template is None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Content of ``tokenizer_config.json``; empty if there is none."""
        return self.folder.optional_json("tokenizer_config.json") or {}

    @cached_property
    def added(self) -> dict[str, int]:
        """Ids of the tokens that were added to the vocabulary, special ones among them, by their text."""
        found: dict[str, int] = {}
        for entry in _entries((self.folder.optional_json("tokenizer.json") or {}).get("added_tokens")):
            found |= _token(entry.get("content"), entry.get("id"))
        for text, index in (self.folder.optional_json("added_tokens.json") or {}).items():
            found |= _token(text, index)
        decoder = self.settings.get("added_tokens_decoder")
        for index, entry in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(entry, dict) and str(index).isdigit():
                found |= _token(entry.get("content"), int(index))
        return found

    @cached_property
    def special(self) -> dict[str, str]:
        """The text of eos, pad and so on, as far as the files say."""
        values = {**(self.folder.optional_json("special_tokens_map.json") or {}), **self.settings}
        found = {}
        for name in _SPECIAL:
            value = values.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[name] = value
        return found

    @property
    def has_no_pad(self) -> bool:
        """Whether padding is switched off: named without a token. Where it is not named, the class has its default."""
        return "pad_token" in self.settings and self.settings["pad_token"] is None and "pad_token" not in self.special

    @cached_property
    def template(self) -> str | None:
        """The chat template; ``None`` if the folder has none."""
        if self.folder.has("chat_template.jinja"):
            return self.folder.text("chat_template.jinja")
        saved = (self.folder.optional_json("chat_template.json") or {}).get("chat_template")
        for found in (saved, self.settings.get("chat_template")):
            if isinstance(found, str):
                return found
            named = [entry for entry in _entries(found) if entry.get("name") == "default"]
            if named and isinstance(named[0].get("template"), str):
                return str(named[0]["template"])
        return None

    @cached_property
    def generation(self) -> dict[str, Any] | None:
        """Content of ``generation_config.json``; ``None`` if there is none."""
        return self.folder.optional_json("generation_config.json")


def _entries(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _token(text: Any, index: Any) -> dict[str, int]:
    fine = isinstance(text, str) and isinstance(index, int) and not isinstance(index, bool) and index >= 0
    return {text: index} if fine else {}


def pixel_limits(image: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Least and most pixels of an image, each with every value that the settings give for it."""
    size = image.get("size")
    size = size if isinstance(size, dict) else {}
    found = {
        "min_pixels": [image.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")],
        "max_pixels": [image.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")],
    }
    return {name: list(dict.fromkeys(v for v in values if v is not None)) for name, values in found.items()}
