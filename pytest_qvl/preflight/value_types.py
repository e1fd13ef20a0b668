"""What each setting of tokenizer, processor and generation may be. Standard library only.

One table for each file, from the sources of Transformers 5.17 and from what it does with other values: it raises, at
the load or at the first use, or acts on another value than was meant. What makes no difference is accepted, whatever
its type (``1`` for ``do_resize``, ``2048.0`` for ``max_new_tokens``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Content = Mapping[str, Any]

# What the fields of an ``AddedToken`` other than its text are.
_TOKEN_SWITCHES = ("single_word", "lstrip", "rstrip", "normalized", "special")
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SIDES = ("left", "right")
_UNLIMITED = int(1e20)  # transformers.tokenization_utils_base.LARGE_INTEGER: above it nothing is truncated
# PIL.Image.Resampling, and torchvision.transforms.InterpolationMode.
_RESAMPLINGS = range(6)
_RESAMPLING_NAMES = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Kind:
    """What a setting may be.

    Attributes:
        expected: In words.
        accepts: Whether a value is; the second argument is the whole content of the file, where others decide with it.
    """

    expected: str
    accepts: Callable[[Any, Content], bool]


@dataclass(frozen=True)
class Wrong:
    """A value that its setting cannot have.

    Attributes:
        file: Name of the file.
        key: The setting.
        value: As it stands there.
        expected: What the setting may be, in words.
        inside: The setting that it is inside of; empty for none.
    """

    file: str
    key: str
    value: Any
    expected: str
    inside: str = ""


def wrong_values(file: str, content: Content, kinds: Mapping[str, Kind], inside: str = "") -> Iterator[Wrong]:
    """Every value of a file that its setting cannot have.

    Args:
        file: Its name.
        content: What it holds.
        kinds: What settings may be, by their names; others are not judged.
        inside: The setting that `content` is the value of, where it is not the whole file.
    """
    for key, kind in kinds.items():
        if key in content and not kind.accepts(content[key], content):
            yield Wrong(file, key, content[key], kind.expected, inside)


def _kind(expected: str, accepts: Callable[[Any], bool]) -> Kind:
    return Kind(expected, lambda value, _: accepts(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_whole(value) and abs(value) <= sys.float_info.max)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(accepts, value))


# Tokenizer


def _is_described(value: Any) -> bool:
    """Whether it is made into an ``AddedToken``: its text, and switches."""
    if not (isinstance(value, dict) and _is_text(value.get("content"))):
        return False
    return all(isinstance(value[name], bool) for name in _TOKEN_SWITCHES if name in value)


def _is_token(value: Any) -> bool:
    """A token of ``tokenizer_config.json``, where one that is described has to say that it is a token."""
    return _is_text(value) or (_is_described(value) and value.get("__type") == "AddedToken")


def _are_extra(value: Any, is_token: Callable[[Any], bool] = _is_token) -> bool:
    if isinstance(value, dict):
        return all(map(_is_token, value.values()))
    return value is None or _is_list_of(value, is_token)


def _is_decoder(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_id(index) and _is_described(token) for index, token in value.items())


def _is_id(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _names_tokenizer(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.get("AutoTokenizer")
        if value is None or isinstance(value, str):
            return value is None or len(value) > 1
    return isinstance(value, list) and len(value) > 1 and _is_text(value[0] if value[1] is None else value[1])


def _is_length(value: Any) -> bool:
    return value is None or (_is_number(value) and (value > _UNLIMITED or (_is_whole(value) and value > 0)))


def _is_template(value: Any) -> bool:
    if not isinstance(value, list):
        return True  # read as no template, which has a finding of its own
    return all(isinstance(entry, dict) and "name" in entry and "template" in entry for entry in value)


_TOKEN = _kind('a text, null, or {"__type": "AddedToken", "content": ...}', lambda v: v is None or _is_token(v))
_SIDE = _kind('"left" or "right"', lambda v: v in _SIDES)
_EXTRA = "a list of tokens, an object of tokens by their names, or null"

TOKENIZER: Mapping[str, Kind] = {
    **dict.fromkeys(_TOKENS, _TOKEN),
    "added_tokens_decoder": _kind(
        "an object of token ids, each with content (a text) and switches (true or false)", _is_decoder
    ),
    "extra_special_tokens": _kind(_EXTRA, _are_extra),
    # Dropped where the newer name is given too.
    "additional_special_tokens": Kind(_EXTRA, lambda v, content: "extra_special_tokens" in content or _are_extra(v)),
    "auto_map": _kind("an object whose AutoTokenizer is a pair of class names", _names_tokenizer),
    "padding_side": _SIDE,
    "truncation_side": _SIDE,
    "model_max_length": _kind("a whole number above 0, or null", _is_length),
    "model_input_names": _kind("a list of names", lambda v: _is_list_of(v, _is_text)),
    "tokenizer_class": _kind("the name of a class, or null", lambda v: v is None or _is_text(v)),
    "split_special_tokens": _kind("true or false", lambda v: isinstance(v, bool)),
    "add_prefix_space": _kind("true, false or null", lambda v: v is None or isinstance(v, bool)),
    "init_inputs": _kind("a list", lambda v: isinstance(v, list)),
}
# Of tokenizer_config.json, where no chat_template.jinja takes its place.
TEMPLATE: Mapping[str, Kind] = {
    "chat_template": _kind("a text, or a list of objects with name and template", _is_template),
}
# Of special_tokens_map.json, which is read where tokenizer_config.json has no added_tokens_decoder.
SPECIAL_TOKENS: Mapping[str, Kind] = {
    **dict.fromkeys(
        _TOKENS,
        _kind(
            'a text, null, or {"content": ...} with switches', lambda v: v is None or _is_text(v) or _is_described(v)
        ),
    ),
    "extra_special_tokens": _kind(_EXTRA, lambda v: _are_extra(v, lambda each: _is_text(each) or _is_described(each))),
}
TOKEN_ID = _kind("a whole number", _is_whole)  # of each token of added_tokens.json, read where that one is

# Processor


def _has_edges(size: Any, content: Content) -> bool:
    """Whether a size has both limits, where fields of their own take the place of those inside."""
    if size is None:
        return True  # the class's own
    if not isinstance(size, dict):
        return False
    edges = dict(size)
    for field, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if content.get(field) is not None:
            edges.pop(field, None)
            edges[edge] = 1
    return set(edges) == {"shortest_edge", "longest_edge"} and all(map(_is_number, edges.values()))


def _names_image_processor(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_text(value.get("AutoImageProcessor", ""))
    return isinstance(value, list | str)  # only searched


def _is_switch(value: Any) -> bool:
    """Whether a step is on, or is switched off by ``false``, which is judged by itself."""
    return value is False or bool(value)


def _is_resampling(value: Any) -> bool:
    return value in _RESAMPLING_NAMES if isinstance(value, str) else _is_whole(value) and value in _RESAMPLINGS


def _are_channels(value: Any) -> bool:
    return _is_number(value) or _is_list_of(value, _is_number)


_SIDE_LENGTH = _kind("a whole number", _is_whole)
_PIXELS = _kind("a number of pixels, or null", lambda v: v is None or _is_number(v))
_CHANNELS = _kind("a list of three numbers", _are_channels)
_STEP = _kind("true", lambda v: _is_switch(v) and not isinstance(v, list | dict))
_CLASS = _kind("the name of a class, or null", lambda v: v is None or _is_text(v))

IMAGE: Mapping[str, Kind] = {
    "size": Kind('{"shortest_edge": NUMBER, "longest_edge": NUMBER}, both in pixels', _has_edges),
    "min_pixels": _PIXELS,
    "max_pixels": _PIXELS,
    "patch_size": _SIDE_LENGTH,
    "temporal_patch_size": _SIDE_LENGTH,
    "merge_size": _SIDE_LENGTH,
    "resample": _kind("a whole number from 0 to 5, or the name of a filter", _is_resampling),
    "image_mean": _CHANNELS,
    "image_std": _CHANNELS,
    "rescale_factor": _kind("a number", _is_number),
    "do_resize": _kind("true", _is_switch),
    "do_rescale": _STEP,
    "do_normalize": _STEP,
    "image_processor_type": _CLASS,
    "auto_map": _kind("an object of class names", _names_image_processor),
}
PROCESSOR: Mapping[str, Kind] = {
    "image_processor": _kind("an object of settings", lambda v: v is None or isinstance(v, dict)),
    "auto_map": _kind("an object of class names", lambda v: isinstance(v, dict | list | str)),
}
PROCESSOR_CLASS: Mapping[str, Kind] = {"processor_class": _CLASS}

# Generation


def flat(value: Any) -> list[Any]:
    """What stands in lists, nested or not, one after the other; a value alone is one."""
    found, rest = [], [value]
    while rest:
        each = rest.pop()
        if isinstance(each, list):
            rest += reversed(each)
        else:
            found.append(each)
    return found


def _are_ids(value: Any) -> bool:
    """One or many, nested or not, as ``torch.tensor`` takes them."""
    return all(map(_is_number, flat(value)))


def _is_id_list(value: Any) -> bool:
    return _are_ids(value) if isinstance(value, list) else not (value or _is_number(value))


def _if_drawn(accepts: Callable[[Any], bool]) -> Callable[[Any, Content], bool]:
    """As long as nothing is drawn, the setting is not read."""
    return lambda value, content: value is None or not content.get("do_sample") or accepts(value)


def _unless(other: str, accepts: Callable[[Any], bool]) -> Callable[[Any, Content], bool]:
    """Where the other setting is given, this one is not read."""
    return lambda value, content: content.get(other) is not None or accepts(value)


def _is_factor(value: Any) -> bool:
    """1 does nothing, whatever its type; others have to be floats."""
    return bool(value == 1) or (isinstance(value, float) and value > 0)


def _is_count(value: Any) -> bool:
    return value is None or isinstance(value, int)


def _is_top_k(value: Any, content: Content) -> bool:
    if not content.get("do_sample"):
        return value is None or isinstance(value, int | float)  # compared with 1 all the same
    return value is None or value is False or (_is_whole(value) and value >= 0)


def _is_top_p(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _are_words(value: Any) -> bool:
    return value is None or (bool(value) and _is_list_of(value, _is_word))


def _is_word(value: Any) -> bool:
    return bool(value) and _is_list_of(value, lambda each: _is_whole(each) and each >= 0)


_IDS = _kind("a token id, a list of them, or null", lambda v: v is None or _are_ids(v))
_ID_LIST = _kind(
    "a list of token ids, or null", lambda v: not (v or _is_number(v)) or (isinstance(v, list) and _are_ids(v))
)
_FACTOR = "a number above 0, with a decimal point unless it is 1, or null"

GENERATION: Mapping[str, Kind] = {
    "eos_token_id": _IDS,
    "bos_token_id": _kind("a token id, or null", lambda v: v is None or isinstance(v, bool) or _are_ids(v)),
    "pad_token_id": _kind("a token id, or null", lambda v: v is None or _is_number(v)),
    "do_sample": _kind("true or false", lambda v: v is True or not v),
    "temperature": Kind(_FACTOR, _if_drawn(_is_factor)),
    "top_k": Kind("a whole number, 0 or above, or null", _is_top_k),
    "top_p": Kind("a number, 0 or above, or null", _if_drawn(_is_top_p)),
    "min_p": Kind("a number from 0 to 1, or null", _if_drawn(_is_share)),
    "repetition_penalty": _kind(_FACTOR, lambda v: v is None or _is_factor(v)),
    "max_new_tokens": _kind("a number above 0, or null", lambda v: v is None or (_is_number(v) and v > 0)),
    "max_length": Kind("a number, or null", _unless("max_new_tokens", lambda v: v is None or _is_number(v))),
    "min_new_tokens": _kind("a whole number, or null", _is_count),
    "min_length": Kind("a whole number, or null", _unless("min_new_tokens", lambda v: _is_count(v) or v == 0)),
    "no_repeat_ngram_size": _kind(
        "a whole number, or null", lambda v: v is None or _is_whole(v) or (isinstance(v, int | float) and v <= 0)
    ),
    "num_beams": _kind("a whole number above 0, or null", lambda v: v is None or v == 1 or (_is_whole(v) and v > 0)),
    "suppress_tokens": _ID_LIST,
    "begin_suppress_tokens": _ID_LIST,
    "bad_words_ids": _kind("a list of lists of token ids, or null", _are_words),
    "max_time": _kind("a number of seconds, or null", lambda v: v is None or isinstance(v, int | float)),
    "use_cache": _kind("true, false or null", lambda v: v is None or _is_switch(v)),
}
SAMPLING = frozenset({"do_sample", "temperature", "top_k", "top_p", "min_p"})
