"""Layers of Qwen3.5 that no target reaches: a note of question 2, and red only if others of their kind are reached."""

from __future__ import annotations

import pytest

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.preflight import preflight

pytestmark = pytest.mark.skipif(not FAMILIES["qwen3_5"].installed, reason="this release of Transformers has no Qwen3.5")
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIXER = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]


def census(model="qwen3.5-9b", **lora):
    """The finding that counts the adapted modules, of a report without a red one."""
    report = preflight(model, lora={"r": 8, "lora_alpha": 16, **lora})
    assert not report.red
    (found,) = report.of(2)
    assert (found.name, found.state) == ("census", "green")
    return found


def test_mixers_that_seven_names_leave_out_are_noted():
    found = census(target_modules=SEVEN)
    (note,) = found.notes
    assert note == (
        "24 of 32 layers mix tokens by linear attention without an adapter on it: 120 linears of "
        "model.language_model.layers.0.linear_attn, model.language_model.layers.1.linear_attn, "
        "model.language_model.layers.2.linear_attn and 21 more; to adapt them too, name in_proj_qkv, in_proj_z, "
        "in_proj_b, in_proj_a and out_proj in target_modules"
    )
    mended = census(target_modules=SEVEN + MIXER)
    assert "language 248" in mended.line
    assert not mended.notes


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": [*SEVEN, "out_proj"]},
        {"target_modules": r".*language_model\.layers\..*_(proj|qkv|z|b|a)"},
        {"target_modules": SEVEN, "layers_to_transform": [3, 7]},
        {"target_modules": r".*language_model\..*_proj", "exclude_modules": r".*\.linear_attn\..*"},
        {"target_modules": SEVEN, "modules_to_save": ["linear_attn"]},
    ],
    ids=["part of each", "all by an expression", "other layers chosen", "excluded", "trained whole"],
)
def test_what_is_reached_or_left_out_on_purpose_is_not_noted(lora):
    assert not census(**lora).notes


def test_only_layers_that_are_chosen_are_noted():
    (note,) = census(target_modules=SEVEN, layers_to_transform=[0, 1, 3]).notes
    assert note.startswith("2 of 32 layers mix tokens by linear attention without an adapter on it: 10 linears of")


def test_linears_that_are_excluded_are_not_advised():
    (note,) = census(target_modules=SEVEN, exclude_modules=["in_proj_b", "in_proj_a"]).notes
    assert ": 72 linears of" in note
    assert note.endswith("name in_proj_qkv, in_proj_z and out_proj in target_modules")


def test_families_without_linear_attention_have_no_such_note():
    assert not census("qwen3-vl-8b", target_modules=SEVEN).notes


@pytest.mark.parametrize(
    ("targets", "notes"), [(["q_proj", "v_proj"], 1), (r".*language_model\..*\.self_attn\..*_proj", 1), (MIXER, 0)]
)
def test_targets_that_only_one_kind_of_layer_has_are_no_alarm(targets, notes):
    assert len(census(target_modules=targets).notes) == notes


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (r".*language_model\.layers\.[37]\.self_attn\.q_proj", "layers 11, 15, 19, 23, 27, 31 get none"),
        (
            r".*language_model\.layers\.\d\.linear_attn\.out_proj",
            "layers 10, 12-14, 16-18, 20-22, 24-26, 28-30 get none",
        ),
        (r".*language_model\.layers\.\d\.mlp\.up_proj", "layers 10-31 get none"),
    ],
)
def test_layers_that_have_the_targets_and_get_none_are_red(targets, said):
    report = preflight("qwen3.5-9b", lora={"r": 8, "target_modules": targets})
    assert [finding.name for finding in report.red] == ["bare-layers"]
    assert said in report.red[0].line
