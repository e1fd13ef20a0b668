"""Question 3: tensors of the adapter whose shapes are not those that the model needs, one finding for each cause."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.models.sources.released import released_config, released_names
from pytest_qvl.preflight.commands import red
from pytest_qvl.preflight.findings import Finding, neutral, some
from pytest_qvl.preflight.loading import Part

if TYPE_CHECKING:
    from pytest_qvl.preflight.loading import Loaded
    from pytest_qvl.preflight.subject import Subject

NUMBER = 3
_red = partial(red, NUMBER)
_OTHER = {"lora_A": "lora_B", "lora_B": "lora_A"}
_VOCABULARY = ("embed_tokens", "lm_head")


def misshapen(subject: Subject, loaded: Loaded, wanted: dict[str, tuple[int, ...]]) -> Iterator[Finding]:
    """One red finding for each cause.

    Args:
        subject: What it is about.
        loaded: What PEFT made of the file.
        wanted: Shapes that the model needs, by the key of each tensor that has another.
    """
    by_cause: dict[str, list[str]] = {}
    for text, needed in wanted.items():
        by_cause.setdefault(_cause(loaded, text, needed), []).append(text)
    for name, texts in by_cause.items():
        held, needed = loaded.shapes[texts[0]], wanted[texts[0]]
        said = f"{len(texts)} tensors of the file have" if len(texts) > 1 else "1 tensor of the file has"
        first = f"{neutral(texts[0], 160)} is {list(held)} and not {list(needed)}"
        line = f"{said} another shape than this model needs: {first}"
        cause, fix = _words(loaded, name, texts, needed)
        yield _red(subject, name, line, cause=cause, fix=fix)


def _cause(loaded: Loaded, text: str, needed: tuple[int, ...]) -> str:
    key, held = loaded.keys[text], loaded.shapes[text]
    partner = loaded.wanted.get(Part(loaded.places[text], _OTHER.get(key.part, "")))
    if key.part in _OTHER and not key.is_bias and held in (partner, needed[::-1]):
        return "swapped-pair"
    if key.part == "rows":
        return "other-token-count" if held[1:] == needed[1:] else "other-size"
    differ = [axis for axis, sides in enumerate(zip(held, needed, strict=False)) if sides[0] != sides[1]]
    if len(held) != len(needed) or len(differ) != 1:
        return "other-size"
    if key.part and differ[0] == (1 if key.part in ("lora_B", "lora_embedding_B") else 0):
        return "other-rank"
    return "other-rows" if key.tail in _VOCABULARY else "other-size"


def _words(loaded: Loaded, name: str, texts: Sequence[str], needed: tuple[int, ...]) -> tuple[str, str]:
    """Cause and fix."""
    held = loaded.shapes[texts[0]]
    axis = next((axis for axis, sides in enumerate(zip(held, needed, strict=False)) if sides[0] != sides[1]), 0)
    if name == "swapped-pair":
        return "A and B of a module are swapped, or were transposed when they were saved", (
            "save the adapter again with PeftModel.save_pretrained"
        )
    if name == "other-token-count":
        return (
            f"the file has {held[0]} trained rows, and trainable_token_indices names {needed[0]} tokens",
            "put back the trainable_token_indices of the training",
        )
    if name == "other-rank":
        return (
            f"the file has rank {held[axis]}, adapter_config.json says {needed[axis]}",
            "put back the r (and rank_pattern) of the training into adapter_config.json",
        )
    if name == "other-rows":
        return (
            f"the vocabulary was resized for the training: {held[axis]} tokens there, {needed[axis]} here",
            "give the base as it was trained, with its tokens added (resize_token_embeddings)",
        )
    fitting = _released_that_fit(loaded, texts)
    return (
        "the adapter belongs to a model of another size" + (f": {some(fitting)}" if fitting else ""),
        "give the base that it was trained on",
    )


def _released_that_fit(loaded: Loaded, texts: Sequence[str]) -> list[str]:
    """Names of releases whose language backbone is as wide as the A matrices of these keys."""
    ends = ("q_proj", "k_proj", "gate_proj")
    fitting = [text for text in texts if loaded.keys[text].part == "lora_A" and loaded.keys[text].tail.endswith(ends)]
    widths = {loaded.shapes[text][-1] for text in fitting if loaded.shapes[text]}
    configs = ((name, released_config(name)) for name in (released_names() if widths else ()))
    return [name for name, config in configs if {config.get_text_config().hidden_size} == widths]
