"""Question 5: where a base has the sizes of a released model, its settings against those of the release.

A reference that is recorded with the same ``config.json`` shares its mistakes, and no tensor's shape shows them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.config_values import Facts
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.layers import VISION_THETA
from pytest_qvl.models.sources.released import hub_id, released_config, released_names
from pytest_qvl.preflight.base import EDITED
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.findings import Finding, counted, neutral, numbers
from pytest_qvl.releases import installed

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject

NUMBER = 5
_red = partial(red, NUMBER)
_LONGEST = 200  # characters of a value in a sentence
_ROPES = ("rope_parameters", "rope_scaling")  # of Transformers 5 and 4
_ROPE = f"text_config.{_ROPES[0]}"


@dataclass(frozen=True)
class Setting:
    """One value of a configuration.

    Attributes:
        name: Where ``config.json`` has it, as Transformers 5 writes it.
        read: The value; ``None`` where there is none.
        effect: What another value does.
    """

    name: str
    read: Callable[[Facts], Any]
    effect: str


@dataclass(frozen=True)
class _Difference:
    """A setting whose value is not the release's; ``unsaid`` where ``config.json`` leaves it to the class."""

    setting: Setting
    found: Any
    released: Any
    unsaid: bool


# Names under which ``transformers.activations`` has the functions of the releases too.
_SAME_FUNCTION = {
    "swish": "silu",
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh"), "gelu_pytorch_tanh"),
}


def _text(name: str, effect: str) -> Setting:
    return Setting(f"text_config.{name}", lambda facts: facts.text(name), effect)


def _vision(name: str, effect: str) -> Setting:
    return Setting(f"vision_config.{name}", lambda facts: facts.vision(name), effect)


def _rope(name: str, effect: str) -> Setting:
    return Setting(f"{_ROPE}.{name}", lambda facts: facts.rope(name), effect)


def _token(name: str) -> Setting:
    return Setting(
        name,
        lambda facts: facts.config.get(name),
        "images and videos are looked for at a token that does not mark them",
    )


def _activation(name: Any) -> Any:
    return _SAME_FUNCTION.get(name, name)


def _layer_types(facts: Facts) -> str | None:
    """The layers of each kind, in words."""
    kinds = facts.text("layer_types")
    if not kinds:
        return None
    placed = sorted((kind, number) for number, kind in enumerate(kinds))
    groups = groupby(placed, key=lambda each: each[0])
    return ", ".join(f"{kind} in {numbers([number for _, number in of_kind])}" for kind, of_kind in groups)


def _vision_theta(facts: Facts) -> Any:
    declared = facts.vision("rope_parameters")
    return (declared if isinstance(declared, dict) else {}).get("rope_theta") or VISION_THETA


def _rope_type(facts: Facts) -> str:
    """Its kind; the plain one is called ``"mrope"`` in the releases of Qwen2-VL and Qwen2.5-VL."""
    kind = facts.rope_kind
    return "default" if kind in (None, "mrope") else str(kind)


_ACTIVATION = "every MLP there computes another function"
_HEADS = "attention cuts its projections into other heads, which no tensor's shape shows"
_MIXER = "linear attention cuts its projections into other heads, which no tensor's shape shows"
_AXES = "time, rows and columns turn other frequencies than those that were trained"
_CUT = "an image is cut into other patches or other visual tokens"
_INTERLEAVED = Setting(f"{_ROPE}.mrope_interleaved", lambda facts: facts.rope("mrope_interleaved"), _AXES)
# What decides arithmetic or meaning, and what no fine-tuning has a reason to change.
FIXED = (
    _text("rms_norm_eps", "every norm of the language model divides by another number"),
    Setting("text_config.hidden_act", lambda facts: _activation(facts.text("hidden_act")), _ACTIVATION),
    _text("num_attention_heads", _HEADS),
    _text("num_key_value_heads", _HEADS),
    _text("head_dim", _HEADS),
    Setting(
        "text_config.layer_types", _layer_types, "layers attend to another part of the text, or are of another kind"
    ),
    _text("linear_num_key_heads", _MIXER),
    _text("linear_num_value_heads", _MIXER),
    _text("linear_key_head_dim", _MIXER),
    _text("linear_value_head_dim", _MIXER),
    _rope("mrope_section", _AXES),
    _INTERLEAVED,
    Setting(
        f"{_ROPE}.partial_rotary_factor",
        lambda facts: facts.rope("partial_rotary_factor") or 1.0,
        "another share of each head is turned by its position",
    ),
    Setting("vision_config.hidden_act", lambda facts: _activation(facts.vision("hidden_act")), _ACTIVATION),
    _vision("num_heads", "the tower's attention cuts its projections into other heads, which no tensor's shape shows"),
    _vision("patch_size", _CUT),
    _vision("temporal_patch_size", _CUT),
    _vision("spatial_merge_size", _CUT),
    _vision("window_size", "the tower attends within windows of another size"),
    _vision("fullatt_block_indexes", "other blocks of the tower attend to the whole image"),
    _vision("deepstack_visual_indexes", "other blocks of the tower feed the first layers of the language model"),
    _vision("tokens_per_second", "positions of a video's frames are another time apart"),
    Setting(
        "vision_config.rope_parameters.rope_theta",
        _vision_theta,
        "positions of patches turn other frequencies than trained",
    ),
)
# What follows a vocabulary that was cut, where every id behind the cut is another.
TOKENS = tuple(map(_token, ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")))
TIED = Setting(
    "tie_word_embeddings",
    lambda facts: facts.config.get("tie_word_embeddings"),
    "the embeddings take the place of the head that was trained",
)
THETA = _rope("rope_theta", "positions turn other frequencies than those that were trained")
CONTEXT = (Setting(f"{_ROPE}.rope_type", _rope_type, ""), _text("max_position_embeddings", ""))


def release_facts(subject: Subject) -> Iterator[Finding]:
    """What differs from the release; nothing of a base that is built in, or has the sizes of none.

    Only noted is what is changed on purpose: a context that was extended, a vocabulary that was grown or cut, a head
    that was trained apart from the embeddings.
    """
    if subject.base.released:
        return
    found = Facts(subject.base.config.to_dict())
    name = _release_of(found)
    if not name:
        return
    released, written = Facts(released_config(name).to_dict()), Facts(subject.base.fields)
    wrong, notes, same = [], [], 0
    for setting in (*FIXED, *TOKENS, TIED, THETA, *CONTEXT):
        mine, theirs = (_plain(setting.read(facts)) for facts in (found, released))
        if setting is _INTERLEAVED:  # configurations of families without it do not mention it
            theirs = FAMILIES[subject.base.family].interleaved
        place = _place(setting, written)
        if mine is None or theirs is None:
            if theirs:
                notes.append(
                    f"{place} is not said, and {_shown(theirs)} in {hub_id(name)}: readers go by their defaults"
                )
            continue
        if mine == theirs:
            same += 1
            continue
        difference = _Difference(setting, mine, theirs, setting.read(written) is None)
        why = _on_purpose(difference, found, released)
        if why:
            notes.append(f"{place} is {_shown(mine)}, and {_shown(theirs)} in {hub_id(name)}: {why}")
        else:
            wrong.append((place, difference))
    rows, theirs = found.text("vocab_size"), released.text("vocab_size")
    if rows != theirs:
        notes.append(
            f"text_config.vocab_size is {rows:,}, and {theirs:,} in {hub_id(name)}: the vocabulary was changed"
        )
    for last, (place, difference) in enumerate(wrong, 1 - len(wrong)):
        yield _unlike(subject, place, difference, hub_id(name), () if last else tuple(notes))
    if not wrong:
        yield Finding(
            NUMBER, "as-released", "green",
            f"{counted(same, 'setting')} of config.json are as in {hub_id(name)}, which has these sizes",
            keeps_green=pytest_line(subject), notes=tuple(notes),
        )  # fmt: skip


def _unlike(subject: Subject, place: str, difference: _Difference, release: str, notes: tuple[str, ...]) -> Finding:
    released = _shown(difference.released)
    origin = (
        f"config.json does not say it, and Transformers {installed('transformers')} has a default or derives it"
        if difference.unsaid
        else EDITED
    )
    return _red(
        subject, "unlike-release",
        f"{place} is {_shown(difference.found)}, and {released} in {release}, which has these sizes",
        cause=f"{origin}; {difference.setting.effect}, and a reference that reads the same file does not show it",
        fix=f"set {place} to {released} in config.json, or put back the config.json of {release}",
        notes=notes,
    )  # fmt: skip


def _place(setting: Setting, written: Facts) -> str:
    """Where this ``config.json`` has it: Transformers 4 has other names, and the language model's values at the top."""
    if not setting.name.startswith("text_config."):
        return setting.name
    part, *rope, key = setting.name.split(".")
    if rope:
        kept = [name for name in _ROPES if isinstance(told := written.text(name), dict) and key in told]
        rope = kept[:1] or ([] if written.text(key) is not None else rope)
    nested = isinstance(written.config.get(part), dict)
    return ".".join([*([part] if nested else []), *rope, key])


def _release_of(found: Facts) -> str:
    """The release that has these sizes, by its name in ``released.json``; empty if none has."""
    for name in released_names():
        released = Facts(released_config(name).to_dict())
        if _sizes(released) == _sizes(found):
            return name
    return ""


def _sizes(facts: Facts) -> tuple[Any, ...]:
    """What the shapes of tensors show, but for the vocabulary.

    Of attention that is the width of its projections: the number of heads may be wrong where their width makes up
    for it.
    """
    text, vision = facts.text, facts.vision
    width = vision("embed_dim") or vision("hidden_size")
    return (
        facts.config["model_type"],
        *(text(name) for name in ("hidden_size", "num_hidden_layers", "intermediate_size")),
        *((text(name) or 0) * (facts.head_dim or 0) for name in ("num_attention_heads", "num_key_value_heads")),
        vision("depth"),
        width,
        vision("intermediate_size") or (vision("mlp_ratio") or 0) * width,
    )


def _on_purpose(difference: _Difference, found: Facts, released: Facts) -> str:
    """Why a difference may be meant, in words; empty where it cannot."""
    if difference.setting in CONTEXT:
        return "a context may be extended on purpose"
    if difference.setting is THETA and not difference.unsaid:
        return f"a context may be extended on purpose; if it was not, {THETA.effect}"
    if difference.setting is TIED and difference.released:
        return "a head may be trained apart from the embeddings; the files have to hold it"
    if difference.setting in TOKENS and found.text("vocab_size") < released.text("vocab_size"):
        return "ids move where a vocabulary is cut; they have to be those of the tokenizer (question 6)"
    return ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return neutral(value if isinstance(value, str) else json.dumps(value, default=str), _LONGEST)
