"""The rules of releases as data, held to the installed release's own function."""

from __future__ import annotations

import re

import pytest

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.quantized_layers import QuantizedLayers
from pytest_qvl.models.skip_rules import RULES, installed_rule, others, rule_of, skipped_by
from pytest_qvl.preflight import preflight
from pytest_qvl.preflight.base import find_base
from pytest_qvl.preflight.questions.four_bits import _DECLARED, in_four_bits
from pytest_qvl.releases import installed

NAMES = (
    "lm_head",
    "model.visual.blocks.1.attn.qkv",
    "model.visual.merger.mlp.0",
    "model.language_model.layers.1.self_attn.q_proj",
    "model.language_model.layers.11.mlp.gate_proj",
)
ENTRIES = ("visual", "model.visual", "lm_head", "model.language_model.layers.1", "merger", "mlp", "proj", "0", "q_proj")
PATTERNS = (r"model\.visual.*", "model.*", "visual.*")


@pytest.mark.parametrize("entry", [*ENTRIES, *PATTERNS])
def test_the_row_of_the_installed_release_is_its_own_function(entry):
    rule = rule_of(installed("transformers"))
    assert [rule.skips(entry, name) for name in NAMES] == [skipped_by(entry, name) for name in NAMES]


def test_every_supported_release_has_one_rule():
    assert rule_of("4.56.2") is None
    assert [rule_of(v) for v in ("4.57.6", "5.0.0", "5.20.1", "5.21.0", "5.24.0")] == [
        RULES[0],
        RULES[1],
        RULES[1],
        RULES[2],
        RULES[2],
    ]
    assert len(others()) == 2


def names(report, question=1):
    return {finding.name for finding in report.of(question) if finding.state == "red"}


def test_the_default_list_is_green_in_every_release():
    report = preflight("qwen2.5-vl-7b")
    (census,) = report.of(1)
    assert census.state == "green"
    assert not census.notes
    assert "language 196 of 196, vision 0 of 160, merger 0 of 2, lm_head 0 of 1" in census.line


def test_an_entry_without_effect_is_named_with_the_one_that_would():
    report = preflight("qwen2.5-vl-7b", skip=["visual", "lm_head"])
    if rule_of(installed("transformers")) is RULES[0]:
        assert not names(report)
        return
    assert names(report) == {"vision-in-four-bits", "idle-skip-entry"}
    idle = next(finding for finding in report if finding.name == "idle-skip-entry")
    assert "'model.visual' would" in idle.line
    assert any("4.57" in note and "162" in note for note in idle.notes)


def test_an_entry_that_covers_more_than_it_names():
    report = preflight("qwen2.5-vl-7b", skip=["model.visual", "lm_head", "model.language_model.layers.1"])
    wide = [finding for finding in report if finding.name == "wide-skip-entry"]
    if rule_of(installed("transformers")) is not RULES[1]:
        assert not wide
        return
    assert "layers 10-19" in wide[0].line
    # The fix means the same in every release.
    entries = ["model.language_model.layers.1.self_attn", "model.language_model.layers.1.mlp"]
    assert all(repr(entry) in wide[0].fix for entry in entries)
    mended = preflight("qwen2.5-vl-7b", skip=["model.visual", "lm_head", *entries])
    assert not names(mended)
    assert not mended.of(1)[0].notes
    assert "language 189 of 196" in mended.of(1)[0].line


def test_a_list_without_the_head():
    assert names(preflight("qwen2.5-vl-7b", skip=["model.visual"])) == {"lm-head-in-four-bits"}
    tied = preflight("qwen2.5-vl-3b", skip=["model.visual"])
    assert "fails in its first forward" in tied.red[0].cause


@pytest.mark.parametrize("entry", ["multi_modal_projector", "mamba"])
def test_entries_for_other_families_are_no_alarm(entry):
    assert not names(preflight("qwen3-vl-8b", skip=["model.visual", "lm_head", entry]))


def test_a_mistyped_and_a_broken_entry():
    assert names(preflight("qwen3-vl-8b", skip=["model.visual", "lm_head", "gate_prjo"])) == {"idle-skip-entry"}
    assert names(preflight("qwen3-vl-8b", skip=["model.visual", "lm_head", "(("])) == {"broken-skip-entry"}


KEPT = ["model.visual", "lm_head"]
HYBRID = pytest.mark.skipif(not FAMILIES["qwen3_5"].installed, reason="this release of Transformers has no Qwen3.5")
ONLY_5 = pytest.mark.skipif(
    rule_of(installed("transformers")) is RULES[0],
    reason="Transformers 4 reads an entry as a name anywhere in the path",
)


GATES = ("in_proj_a", "in_proj_b")


@HYBRID
def test_layers_that_are_declared_to_stay_in_16_bits():
    declared = QuantizedLayers.parse("language, in_proj_[ab]:16bit")
    report = preflight("qwen3.5-9b", skip=[*KEPT, *GATES], layers=declared)
    assert not names(report)
    assert "--qvl-quantized-layers 'language, in_proj_[ab]:16bit' " in report.of(1)[0].keeps_green
    report = preflight("qwen3.5-9b", skip=[*KEPT, GATES[0]], layers=declared)
    assert names(report) == {"kept-layers-in-four-bits"}
    assert "24 linear layers that" in report.red[0].line
    assert report.red[0].fix == "add to llm_int8_skip_modules: 'in_proj_b'"


@HYBRID
def test_layers_that_are_declared_to_be_in_4_bits():
    skip = [*KEPT, *GATES]
    assert not names(preflight("qwen3.5-9b", skip=skip))  # nobody said
    report = preflight("qwen3.5-9b", skip=skip, layers=QuantizedLayers())
    assert names(report) == {"quantized-layers-in-16-bits"}
    assert "48 linear layers that" in report.red[0].line
    assert "such as 'language, in_proj_a:16bit'" in report.red[0].fix
    assert names(preflight("qwen3.5-9b", skip=KEPT, layers=QuantizedLayers(("vision",)))) == {"nothing-in-four-bits"}


@HYBRID
def test_a_tower_that_is_declared_to_be_in_4_bits():
    declared = QuantizedLayers.parse("language, vision")
    assert not names(preflight("qwen3.5-9b", skip=["model.visual.merger", "lm_head"], layers=declared))
    assert names(preflight("qwen3.5-9b", skip=["lm_head"], layers=declared)) == {"merger-in-four-bits"}


def test_a_declared_name_that_no_layer_has():
    report = preflight("qwen2.5-vl-7b", layers=QuantizedLayers(kept=("in_proj_a", "q_prjo")))
    assert names(report) == {"unknown-layers"}
    first, second = (finding.line for finding in report.red)
    assert "'in_proj_a' is no part (language, " in first
    assert "there are down_proj, " in first
    assert second.endswith("did you mean q_proj?")


def groups_of_linears(model):
    parts = find_base(model).skeleton()
    return {name: parts.group_of(name) for name, _ in parts.named_linears()}


def advised(report):
    (idle,) = (finding for finding in report if finding.name == "idle-skip-entry")
    assert idle.fix.startswith("write '")
    return re.findall(r"'([^']+)'", idle.fix)


@ONLY_5
@pytest.mark.parametrize(
    ("model", "entry", "count"),
    [
        pytest.param("qwen3.5-9b", "linear_attn", 24 * 5, marks=HYBRID),
        pytest.param("qwen3.5-9b", "self_attn", 8 * 4, marks=HYBRID),
        pytest.param("qwen3.5-9b", "mlp", 32 * 3, marks=HYBRID),
        ("qwen2.5-vl-7b", "mlp", 28 * 3),
        ("qwen3-vl-8b", "self_attn", 36 * 4),
        ("qwen3-vl-8b", "language_model.layers.1", 7),
    ],
)
def test_the_advice_for_an_entry_keeps_every_module_of_that_name(model, entry, count):
    report = preflight(model, skip=[entry, *KEPT])
    assert names(report) == {"idle-skip-entry"}
    entries = advised(report)

    mended = preflight(model, skip=[*entries, *KEPT])
    assert not names(mended)
    assert not mended.of(1)[0].notes, "every supported release keeps the same"
    linears = {name for name, group in groups_of_linears(model).items() if group == "language"}
    meant = {name for name in linears if f".{entry}." in name}
    assert len(meant) == count
    assert linears - set(in_four_bits(dict.fromkeys(linears, "language"), entries, installed_rule())) == meant
    assert f"language {len(linears) - count} of {len(linears)}" in mended.of(1)[0].line


@ONLY_5
@pytest.mark.parametrize(
    ("model", "entry"), [("qwen2.5-vl-7b", "mlp"), ("qwen2.5-vl-7b", "attn"), ("qwen3-vl-8b", "mlp")]
)
def test_where_no_names_fit_the_advice_is_an_expression(model, entry):
    """Names of the linears are others' too here: ``proj`` ends ``q_proj``, and mergers have a ``linear_fc1``."""
    report = preflight(model, skip=["lm_head", entry])
    assert names(report) == {"vision-in-four-bits", "idle-skip-entry"}
    entries = advised(report)
    assert entries == [f".*[.]{entry}"]
    linears = groups_of_linears(model)
    meant = {name for name in linears if f".{entry}." in name}
    for rule in RULES[1:]:
        assert set(linears) - set(in_four_bits(linears, entries, rule)) == meant
    assert "idle-skip-entry" not in names(preflight(model, skip=["lm_head", *entries]))


@ONLY_5
def test_an_entry_is_kept_by_others_only_if_all_of_it_is():
    assert not names(preflight("qwen3-vl-8b", skip=["attn", *KEPT])), "of the tower alone"
    some = preflight("qwen3-vl-8b", skip=["self_attn", "q_proj", *KEPT])
    assert advised(some) == ["k_proj", "v_proj", "o_proj"]
    assert not names(preflight("qwen3-vl-8b", skip=["self_attn", "q_proj", "k_proj", "v_proj", "o_proj", *KEPT]))


@HYBRID
def test_an_end_keeps_it_in_every_layer():
    report = preflight("qwen3.5-9b", skip=["in_proj_a", *KEPT])
    assert not names(report)
    assert "language 224 of 248" in report.of(1)[0].line


@ONLY_5
def test_a_mistyped_entry_is_mended_in_every_layer():
    report = preflight("qwen3-vl-8b", skip=["gate_prjo", *KEPT])
    assert advised(report) == ["gate_proj"]
    assert "keeps 36 linear layers" in report.red[0].fix


def test_declarations_that_no_model_can_follow():
    """A tied head, a part without linear layers, and nothing that is left in 4 bits."""
    for text, right in (("language, lm_head", "language, lm_head:16bit"), ("*", "*, lm_head:16bit")):
        report = preflight("qwen2.5-vl-3b", skip=["model.visual", "lm_head"], layers=QuantizedLayers.parse(text))
        (finding,) = (each for each in report.red if "tied to the embeddings" in each.line)
        assert finding.fix == f"declare {right!r}"
    report = preflight("qwen2.5-vl-3b", skip=["model.visual"], layers=QuantizedLayers.parse("language, lm_head"))
    assert names(report) == {"quantized-layers-in-16-bits", "lm-head-in-four-bits"}
    report = preflight("qwen2.5-vl-7b", skip=KEPT, layers=QuantizedLayers.parse("language, embeddings"))
    assert [each.line for each in report.red] == [f"{_DECLARED}: there is no linear layer in 'embeddings'"]
    report = preflight("qwen2.5-vl-7b", skip=KEPT, layers=QuantizedLayers.parse("language, *:16bit"))
    assert "leaves no linear layer in 4 bits (language, *:16bit)" in report.red[0].cause


def test_a_layer_that_is_declared_by_name_and_skipped():
    report = preflight("qwen2.5-vl-7b", skip=[*KEPT, "q_proj"], layers=QuantizedLayers.parse("language, q_proj"))
    assert report.red[0].fix.endswith("such as 'language, q_proj:16bit'")
    report = preflight("qwen2.5-vl-7b", skip=KEPT, layers=QuantizedLayers(("merger",), ("visual.merger.mlp.0",)))
    assert "such as" not in report.red[0].fix
