"""Values that decide arithmetic, read from live modules, against the ``config.json`` that the model was made from.

What the file does not say is what the published architectures fix: an epsilon of 1e-6 and a rotary base of 10,000 in
the vision tower (``modeling_qwen2_vl.py``, ``modeling_qwen2_5_vl.py``, ``modeling_qwen3_vl.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.anatomy import TOWER
from pytest_qvl.models.layers import MIXER, VISION_EPS, VISION_THETA
from pytest_qvl.models.sources.loading import has_tied_head

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_qvl.models.anatomy import Parts

FLOAT32_STEP = 2.0**-23
# Rotary kinds whose frequencies are theta ** (-2 i / d); the others stretch them, each in its own way.
_PLAIN_ROPE = (None, "default", "mrope")
_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# What forward passes read from the configuration object itself.
_READ_LIVE = ("spatial_merge_size", "tokens_per_second", "patch_size", "temporal_patch_size", "window_size")


@dataclass
class Facts:
    """What a ``config.json`` says; it may keep the language model's values at the top or in ``text_config``.

    Attributes:
        config: Its content.
    """

    config: Mapping[str, Any]

    def text(self, name: str) -> Any:
        """A value of the language model; ``None`` if the file does not say."""
        inner = self.config.get("text_config")
        if isinstance(inner, dict) and inner.get(name) is not None:
            return inner[name]
        return self.config.get(name)

    def vision(self, name: str) -> Any:
        """A value of the vision tower; ``None`` if the file does not say."""
        return (self.config.get("vision_config") or {}).get(name)

    def rope(self, name: str) -> Any:
        """A value of the rotary embedding, wherever this release of Transformers wrote it."""
        for where in ("rope_parameters", "rope_scaling"):
            found = self.text(where)
            if isinstance(found, dict) and found.get(name) is not None:
                return found[name]
        return self.text(name)

    @property
    def rope_kind(self) -> str | None:
        """``"default"``, ``"mrope"``, ``"yarn"`` ...; ``None`` if the file does not say."""
        kind = self.rope("rope_type") or self.rope("type")
        return None if kind is None else str(kind)

    @property
    def head_dim(self) -> int | None:
        """Width of one attention head of the language model."""
        width, heads = self.text("hidden_size"), self.text("num_attention_heads")
        own = self.text("head_dim")
        return int(own) if own else (width // heads if width and heads else None)

    @property
    def vision_head_dim(self) -> int | None:
        """Width of one attention head of the vision tower (Qwen2-VL calls its width ``embed_dim``)."""
        width, heads = self.vision("embed_dim") or self.vision("hidden_size"), self.vision("num_heads")
        return width // heads if width and heads else None


@dataclass
class ConfigReport:
    """What was compared.

    Attributes:
        compared: How many values.
        problems: One sentence for each that differs.
        notes: What could not be judged.
    """

    compared: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def hold(self, where: str, found: Any, wanted: Any) -> None:
        """Compare one value, unless either side does not have it."""
        if found is None or wanted is None:
            return
        self.compared += 1
        if _plain(found) != _plain(wanted):
            self.problems.append(f"{where} is {_plain(found)} instead of {_plain(wanted)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def compared_config(parts: Parts, config: Mapping[str, Any]) -> ConfigReport:
    """Compare a model's live values with a ``config.json``.

    Args:
        parts: The model, wrapped or not.
        config: The content of the file.
    """
    facts, report = Facts(config), ConfigReport()
    modules = base_modules(parts)
    for name, module in modules.items():
        _hold_epsilon(report, parts, facts, name, module)
    for where, layer in _numbered(modules, parts.roots["language"], "layers"):
        _hold_attention(report, facts, where, layer)
    for where, block in _numbered(modules, parts.roots["vision"], "blocks"):
        attention = getattr(block, "attn", None)
        size = facts.vision_head_dim
        report.hold(f"{where}.attn.num_heads", getattr(attention, "num_heads", None), facts.vision("num_heads"))
        report.hold(f"{where}.attn.scaling", getattr(attention, "scaling", None), size and size**-0.5)
    _hold_rotary(report, parts, facts)
    _hold_tower(report, parts, facts)
    for name in _IDS:
        report.hold(name, getattr(parts.config, name, None), facts.config.get(name))
    for name in _READ_LIVE:
        report.hold(f"vision_config.{name}", getattr(parts.config.vision_config, name, None), facts.vision(name))
    report.hold("tie_word_embeddings (head and embeddings are one tensor)", has_tied_head(parts), _tied(facts))
    return report


def _tied(facts: Facts) -> bool | None:
    """Whether the head is the embeddings: where only ``text_config`` says so, releases differ."""
    said = facts.config.get("tie_word_embeddings")
    inner = (facts.config.get("text_config") or {}).get("tie_word_embeddings")
    return None if said is None or (inner is not None and inner != said) else bool(said)


def _numbered(modules: Mapping[str, Any], root: str, kind: str) -> Iterator[tuple[str, Any]]:
    """The layers of a stack with their names, in order."""
    number = 0
    while (name := f"{root}.{kind}.{number}") in modules:
        yield name, modules[name]
        number += 1


def _hold_epsilon(report: ConfigReport, parts: Parts, facts: Facts, name: str, module: Any) -> None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    group = parts.group_of(name)
    if group in TOWER:
        report.hold(f"{name}: epsilon", epsilon, VISION_EPS)
    elif group == "language":
        report.hold(f"{name}: epsilon", epsilon, facts.text("rms_norm_eps"))


def _hold_attention(report: ConfigReport, facts: Facts, where: str, layer: Any) -> None:
    attention = getattr(layer, "self_attn", None)
    if attention is None:  # a layer of Qwen3.5's with a linear-attention mixer
        _hold_mixer(report, facts, f"{where}.{MIXER}", getattr(layer, MIXER))
        return
    number = int(where.rpartition(".")[2])
    size, heads, groups = facts.head_dim, facts.text("num_attention_heads"), facts.text("num_key_value_heads")
    wanted = {
        "scaling": size and size**-0.5,
        "head_dim": size,
        "num_key_value_groups": heads and groups and heads // groups,
        "layer_idx": number,
        "attention_dropout": facts.text("attention_dropout"),
    }
    for name, value in wanted.items():
        report.hold(f"{where}.self_attn.{name}", getattr(attention, name, None), value)
    for kept in ("rope_scaling", "rope_parameters"):
        section = (getattr(attention, kept, None) or {}).get("mrope_section")
        report.hold(f"{where}.self_attn.{kept}: mrope_section", section, facts.rope("mrope_section"))
    if facts.text("use_sliding_window") is False and getattr(attention, "sliding_window", None) is not None:
        report.problems.append(f"{where}.self_attn.sliding_window is {attention.sliding_window} instead of None")


def _hold_mixer(report: ConfigReport, facts: Facts, where: str, mixer: Any) -> None:
    wanted = {
        "num_v_heads": facts.text("linear_num_value_heads"),
        "num_k_heads": facts.text("linear_num_key_heads"),
        "head_v_dim": facts.text("linear_value_head_dim"),
        "head_k_dim": facts.text("linear_key_head_dim"),
        "conv_kernel_size": facts.text("linear_conv_kernel_dim"),
        "layer_idx": int(where.split(".")[-2]),
        "activation": facts.text("hidden_act"),
    }
    for name, value in wanted.items():
        report.hold(f"{where}.{name}", getattr(mixer, name, None), value)


def _hold_rotary(report: ConfigReport, parts: Parts, facts: Facts) -> None:
    rotary = getattr(parts.language_backbone, "rotary_emb", None)
    name = f"{parts.roots['language']}.rotary_emb"
    report.hold(f"{name}: mrope_section", getattr(rotary, "mrope_section", None), facts.rope("mrope_section"))
    if facts.rope_kind in _PLAIN_ROPE:
        report.hold(f"{name}: attention_scaling", getattr(rotary, "attention_scaling", None), 1.0)
        theta, size = facts.rope("rope_theta"), facts.head_dim
        if theta and size:
            share = facts.rope("partial_rotary_factor") or 1.0
            _hold_frequencies(report, name, rotary, float(theta), int(size * share))
    else:
        report.notes.append(f"frequencies of the rotary embedding are not judged: its kind is {facts.rope_kind!r}")
    size = facts.vision_head_dim
    tower = getattr(parts.vision_tower, "rotary_pos_emb", None)
    theta = (facts.vision("rope_parameters") or {}).get("rope_theta", VISION_THETA)
    if size:
        _hold_frequencies(report, f"{parts.roots['vision']}.rotary_pos_emb", tower, float(theta), size // 2)


def _hold_frequencies(report: ConfigReport, name: str, rotary: Any, theta: float, size: int) -> None:
    """Hold ``inv_freq`` to ``theta ** (-2 i / size)``, each within the roundings of float32.

    The exponent is rounded once, which moves the power by ``ln(theta)`` half steps at most; power and reciprocal are
    good to two steps more.
    """
    import torch

    live = getattr(rotary, "inv_freq", None)
    if live is None:
        return
    report.compared += 1
    wanted = [theta ** (-2 * i / size) for i in range(size // 2)]
    if live.dtype != torch.float32:
        report.problems.append(
            f"{name}.inv_freq is {str(live.dtype).removeprefix('torch.')} instead of float32, too coarse for "
            "positions: load in the dtype you want, instead of casting the model with .half() or .to(dtype)"
        )
        return
    limit = (math.log(theta) / 2 + 3) * FLOAT32_STEP if theta > 1 else 4 * FLOAT32_STEP
    found = live.detach().double().cpu().reshape(-1).tolist()
    off = [i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if not math.isclose(a, b, rel_tol=limit)]
    if len(found) != len(wanted):
        report.problems.append(f"{name}.inv_freq has {len(found)} frequencies instead of {len(wanted)}")
    elif off:
        base = f", as of a rotary base of {_base(found, size):.6g}" if len(off) == len(found) - 1 else ""
        report.problems.append(
            f"{name}.inv_freq[{off[0]}] is {found[off[0]]:.6g} instead of {wanted[off[0]]:.6g} and {len(off)} of "
            f"{len(found)} are off{base} instead of {theta:.6g}"
        )


def _base(found: list[float], size: int) -> float:
    """The rotary base that the last frequency belongs to."""
    return float(found[-1] ** (-size / (2 * (len(found) - 1)))) if len(found) > 1 and found[-1] > 0 else math.nan


def _hold_tower(report: ConfigReport, parts: Parts, facts: Facts) -> None:
    name, tower = parts.roots["vision"], parts.vision_tower
    for key in ("window_size", "fullatt_block_indexes", "spatial_merge_size", "patch_size", "deepstack_visual_indexes"):
        report.hold(f"{name}.{key}", getattr(tower, key, None), facts.vision(key))
    places = facts.vision("num_position_embeddings")
    side = math.isqrt(places) if places else None
    report.hold(f"{name}.num_grid_per_side", getattr(tower, "num_grid_per_side", None), side)
    for key in ("patch_size", "temporal_patch_size", "in_channels"):
        report.hold(f"{name}.patch_embed.{key}", getattr(parts.patch_embed, key, None), facts.vision(key))
