"""A processor for synthetic weights: real classes, real special-token ids, nothing downloaded.

The released tokenizers put their special tokens at ids 151643 and above, those of Qwen3.5 at 248044 and above, in one
order. Here the 256 byte tokens come first and unreachable fillers take the rest, so that every text still encodes, byte
by byte, and every special id is the real one.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from pytest_qvl.models.backends import one_line
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.embedded import FIRST, embedded_model_dir
from pytest_qvl.models.sources.hub import hub_options
from pytest_qvl.models.sources.model_source import ModelSource, ModelSourceError
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.models.sources.released import image_sizes, released_config

# Added tokens in the order of their released ids: from 151643 on in Qwen2 to Qwen3, from 248044 on in Qwen3.5.
TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOXES = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = (*TURNS, *BOXES, *VISION)


@cache
def synthetic_processor(name: str) -> Any:
    """The processor for the released configuration ``name``.

    Raises:
        ValueError: Unknown name.
    """
    with tempfile.TemporaryDirectory(prefix="qvl-processor-") as folder:
        write_processor(Path(folder), name)
        return load_processor(folder)


def processor_for(source: ModelSource) -> Any:
    """The processor that belongs to a source: loaded, or made for synthetic weights.

    Raises:
        ModelSourceError: Its files cannot be read, or make no processor for images with a chat template.
    """
    if source.kind == "synthetic":
        return synthetic_processor(source.location)
    options = hub_options(source)
    try:
        processor = load_processor(source.pretrained, **options)
    except Exception as error:  # tokenizers raises bare exceptions
        why = _unreadable(Path(source.pretrained)) or one_line(error)
        raise ModelSourceError(
            f"the processor of {source} cannot be read ({why}): save it again beside the model with "
            "processor.save_pretrained"
        ) from None
    if getattr(processor, "image_processor", None) is None:
        raise ModelSourceError(f"{source} has a {type(processor).__name__} but no image processor: save both with it")
    if not processor.chat_template:
        raise ModelSourceError(
            f"the processor of {source} has no chat template, so no prompt can be written: set processor.chat_template "
            "(that of the released model) and save it again"
        )
    # That of released Qwen2.5-VL checkpoints pads on the right (huggingface/transformers#36100).
    processor.tokenizer.padding_side = "left"
    return processor


def _unreadable(folder: Path) -> str:
    """The first of a tokenizer's files that is no JSON, with the error; or empty.

    Transformers 4 tries the slow tokenizer next and says only what that one lacks ("requires the protobuf library").
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except OSError:
            continue
        except ValueError as error:
            return f"{one_line(error)} in {name}"
    return ""


def special_id(config: Any, token: str) -> int:
    """The released id of one of :data:`SPECIAL_TOKENS`, by a released configuration."""
    return int(config.image_token_id) + SPECIAL_TOKENS.index(token) - SPECIAL_TOKENS.index("<|image_pad|>")


def write_processor(folder: Path, name: str) -> None:
    """Write the files of :func:`synthetic_processor` into ``folder``.

    Raises:
        ValueError: Unknown name.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    config = released_config(name)
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for i in range(len(vocabulary), special_id(config, SPECIAL_TOKENS[0])):
        vocabulary[f"<filler {i}>"] = i
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    family = FAMILIES[config.model_type]
    embedded = embedded_model_dir(family.embedded or FIRST)
    settings = json.loads((embedded / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = [(entry["content"], entry["special"]) for entry in settings.pop("added_tokens_decoder").values()]
    if family.embedded in ("", FIRST):  # which has none of boxes
        added = [(text, True) for text in SPECIAL_TOKENS]
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write(folder / "tokenizer_config.json", settings)
    (template,) = embedded.glob("chat_template.*")
    (folder / template.name).write_bytes(template.read_bytes())
    vision, sizes = config.vision_config, image_sizes(name)
    # The first one's, whose limits have names of their own; those of a release go in their place.
    images = json.loads((embedded_model_dir() / "preprocessor_config.json").read_text(encoding="utf-8"))
    images |= {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "image_mean": list(family.image_mean),
        "image_std": list(family.image_std),
        "merge_size": vision.spatial_merge_size,
        "min_pixels": sizes.min_pixels,
        "max_pixels": sizes.max_pixels,
        "processor_class": family.processor_class,
    }
    _write(folder / "preprocessor_config.json", images)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
