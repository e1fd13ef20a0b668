"""Processor, tokenizer, template and generation settings of a folder, as plain data; nothing is rendered or built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pytest_qvl.models.sources.processors import PREPROCESSOR_FILE
from pytest_qvl.preflight import value_types
from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.value_types import Wrong, wrong_values

PROCESSOR_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer.json", "vocab.json")
_SPECIAL = ("eos_token", "pad_token", "bos_token", "unk_token")


@dataclass(frozen=True)
class ProcessorFiles:
    """What one folder holds beside weights.

    Settings that are :attr:`wrong` are left out of all else.

    Attributes:
        folder: The folder.
    """

    folder: Folder

    @cached_property
    def wrong(self) -> tuple[Wrong, ...]:
        """Every value that its setting cannot have (:mod:`pytest_qvl.preflight.value_types`)."""
        return (*self.wrong_image, *self._wrong_tokenizer, *self.wrong_generation)

    @cached_property
    def wrong_image(self) -> tuple[Wrong, ...]:
        """Those of the processor and its image half."""
        found = list(wrong_values(PROCESSOR_FILE, self._json(PROCESSOR_FILE), value_types.PROCESSOR))
        if self._image is not None:
            file, inside, settings = self._image
            found += [each for each in wrong_values(file, settings, value_types.IMAGE, inside) if each not in found]
            if self._class is not None:
                file, name = self._class
                found += wrong_values(file, {"processor_class": name}, value_types.PROCESSOR_CLASS)
        return tuple(found)

    @cached_property
    def _wrong_tokenizer(self) -> tuple[Wrong, ...]:
        content = self._json(TOKENIZER_FILE)
        found = list(wrong_values(TOKENIZER_FILE, content, value_types.TOKENIZER))
        if not self.folder.has("chat_template.jinja"):
            found += wrong_values(TOKENIZER_FILE, content, value_types.TEMPLATE)
        if "added_tokens_decoder" not in content:  # the older files are not read beside it
            special, added = "special_tokens_map.json", "added_tokens.json"
            found += wrong_values(special, self._json(special), value_types.SPECIAL_TOKENS)
            tokens = self._json(added)
            found += wrong_values(added, tokens, dict.fromkeys(tokens, value_types.TOKEN_ID))
        return tuple(found)

    @cached_property
    def wrong_generation(self) -> tuple[Wrong, ...]:
        """Those of ``generation_config.json``."""
        return tuple(wrong_values(GENERATION_FILE, self._json(GENERATION_FILE), value_types.GENERATION))

    def _json(self, name: str) -> dict[str, Any]:
        return self.folder.optional_json(name) or {}

    @cached_property
    def _image(self) -> tuple[str, str, dict[str, Any]] | None:
        """File of the image processor's settings, the setting there that holds them if one does, and all of them."""
        inner = self._json(PROCESSOR_FILE).get("image_processor")
        if inner is not None:
            return PROCESSOR_FILE, "image_processor", inner if isinstance(inner, dict) else {}
        for name in (PREPROCESSOR_FILE, PROCESSOR_FILE):
            found = self._json(name)
            if "patch_size" in found or "image_processor_type" in found:
                return name, "", found
        return None

    @cached_property
    def image(self) -> dict[str, Any] | None:
        """Settings of the image processor; ``None`` if the folder has none."""
        return None if self._image is None else _without(self._image[2], self.wrong_image, *self._image[:2])

    @cached_property
    def _class(self) -> tuple[str, Any] | None:
        """The processor's class as the first file says that says one, and that file, in Transformers' order."""
        for name in (PROCESSOR_FILE, PREPROCESSOR_FILE, TOKENIZER_FILE):
            found = self._json(name).get("processor_class")
            if found is not None:
                return name, found
        return None

    @property
    def processor_class(self) -> str:
        """Name of the processor's class; empty if no file says."""
        return self._class[1] if self._class is not None and isinstance(self._class[1], str) else ""

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
        return _without(self._json(TOKENIZER_FILE), self._wrong_tokenizer, TOKENIZER_FILE)

    @cached_property
    def added(self) -> dict[str, int]:
        """Ids of the tokens that were added to the vocabulary, special ones among them, by their text."""
        found: dict[str, int] = {}
        for entry in _entries(self._json("tokenizer.json").get("added_tokens")):
            found |= _token(entry.get("content"), entry.get("id"))
        for text, index in self._json("added_tokens.json").items():
            found |= _token(text, index)
        for index, entry in self.settings.get("added_tokens_decoder", {}).items():
            found |= _token(entry["content"], int(index))
        return found

    @cached_property
    def special(self) -> dict[str, str]:
        """The text of eos, pad and so on, as far as the files say."""
        values = {**self._json("special_tokens_map.json"), **self.settings}
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
        saved = self._json("chat_template.json").get("chat_template")
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
        found = self.folder.optional_json(GENERATION_FILE)
        return None if found is None else _without(found, self.wrong_generation, GENERATION_FILE)


def _without(settings: Mapping[str, Any], wrong: Iterable[Wrong], file: str, inside: str = "") -> dict[str, Any]:
    names = {each.key for each in wrong if (each.file, each.inside) == (file, inside)}
    return {key: value for key, value in settings.items() if key not in names}


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
    return {
        name: list(dict.fromkeys(v for v in values if isinstance(v, int | float))) for name, values in found.items()
    }
