"""The real Qwen-VL processor, with and without torchvision.

Transformers' Qwen-VL processors insist on a video processor, which needs torchvision. Where torchvision is
missing they can neither be constructed nor loaded (and ``AutoProcessor`` silently returns the bare tokenizer
instead). Images need none of it: here the processor is then put together from its tokenizer and its Pillow
image processor, and only the check that a video processor was given is passed over. ``__call__`` and the chat
template stay Transformers' own.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytest_qvl.models.families import DEFAULT, FAMILIES

PREPROCESSOR_FILE = "preprocessor_config.json"
IMAGE_SETTINGS_FILES = (PREPROCESSOR_FILE, "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class MissingProcessorError(FileNotFoundError):
    """A folder lacks the files of a processor."""


def has_torchvision() -> bool:
    """Whether torchvision is installed (not whether it imports)."""
    return find_spec("torchvision") is not None


def load_processor(path_or_hub_id: str | Path, **kwargs: Any) -> Any:
    """The processor of a checkpoint: a real ``Qwen2_5_VLProcessor``, or its sibling of another family.

    With torchvision it is what ``AutoProcessor`` loads; without, the same class without its video half.
    Nothing is fetched unless a hub id was given.

    Args:
        path_or_hub_id: A checkpoint folder, or an id such as ``Qwen/Qwen2.5-VL-3B-Instruct``.
        kwargs: Passed on to every ``from_pretrained`` (``revision``, ``cache_dir``, ``token``,
            ``local_files_only``, ``min_pixels``, ``max_pixels``).

    Raises:
        MissingProcessorError: A folder without the files of a processor, or a path that is neither a folder
            nor could be a hub id.
        ValueError: The files belong to a processor of another model.
    """
    source = _checked_source(path_or_hub_id)
    if Path(source).is_dir():
        kwargs = {**kwargs, "local_files_only": True}
    if has_torchvision():
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(source, **kwargs)
    return _load_image_only(source, **kwargs)


def save_processor(processor: Any, folder: str | Path) -> None:
    """Write a processor's files so that :func:`load_processor` reads them back, with or without torchvision.

    ``processor.save_pretrained`` fails without a video processor, so its parts are saved one by one; the chat
    template goes with the tokenizer.
    """
    if getattr(processor, "video_processor", None) is not None:
        processor.save_pretrained(folder)
        return
    _save_parts(processor, folder)


def _save_parts(processor: Any, folder: str | Path) -> None:
    if processor.tokenizer.chat_template is None:
        processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    path = Path(folder) / PREPROCESSOR_FILE
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The Pillow class exists in Transformers 5 only; the plain name is the one that every release resolves.
    settings["image_processor_type"] = str(settings["image_processor_type"]).removesuffix("Pil").removesuffix("Fast")
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _checked_source(path_or_hub_id: str | Path) -> str:
    folder = Path(path_or_hub_id).expanduser()
    if not folder.is_dir():
        if isinstance(path_or_hub_id, str) and _HUB_ID.fullmatch(path_or_hub_id) and not folder.exists():
            return path_or_hub_id
        raise MissingProcessorError(
            f"cannot load a processor from {str(path_or_hub_id)!r}: no such folder, and not a hub id "
            "(owner/name). Give a checkpoint folder or a hub id."
        )
    missing = [
        names[0]
        for names in (IMAGE_SETTINGS_FILES, TOKENIZER_FILES)
        if not any((folder / name).is_file() for name in names)
    ]
    if missing:
        raise MissingProcessorError(
            f"{folder} has no {' and no '.join(missing)}, so it holds no processor. "
            "Save the base model's processor there (processor.save_pretrained), or name its folder."
        )
    return str(folder)


def _load_image_only(source: str, **kwargs: Any) -> Any:
    import transformers
    from transformers import AutoTokenizer, ProcessorMixin

    image_processor_class = _pillow_image_processor()
    settings: dict[str, Any] = ProcessorMixin.get_processor_dict(source, **kwargs)[0]
    image_settings: dict[str, Any] = image_processor_class.get_image_processor_dict(source, **kwargs)[0]
    name = settings.get("processor_class") or image_settings.get("processor_class") or DEFAULT.processor_class
    known = list(dict.fromkeys(family.processor_class for family in FAMILIES.values()))
    if name not in known:
        raise ValueError(f"{source} is for {name}; this package knows {', '.join(known)}")
    tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    return _image_only(getattr(transformers, name))(
        image_processor=image_processor_class.from_pretrained(source, **kwargs),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=settings.get("chat_template") or tokenizer.chat_template,
    )


def _pillow_image_processor() -> Any:
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError:  # Transformers 4: the plain class is the Pillow one
        from transformers import Qwen2VLImageProcessor

        return Qwen2VLImageProcessor
    return Qwen2VLImageProcessorPil


def _image_only(stock: type) -> Any:
    """`stock` without the demand for a video processor."""

    def check_argument_for_proper_class(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return None
        return stock.check_argument_for_proper_class(self, argument_name, argument)  # type: ignore[attr-defined]

    def save_pretrained(self: Any, save_directory: str | Path, push_to_hub: bool = False, **_: Any) -> None:
        """What a Trainer calls with every checkpoint; the stock method fails without a video processor."""
        if push_to_hub:
            raise ValueError("a processor without its video half is not pushed to the hub: install torchvision")
        _save_parts(self, save_directory)

    # It keeps the stock name: Transformers writes the class's name into every file that it saves.
    members = {
        "check_argument_for_proper_class": check_argument_for_proper_class,
        "save_pretrained": save_pretrained,
        "__module__": __name__,
    }
    return type(stock.__name__, (stock,), members)
