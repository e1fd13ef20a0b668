"""A base with the sizes of a released model is held to the settings of the release."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from preflight_corpus import Workshop
from preflight_corpus.making import FAMILIES

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.released import hub_id, released_config, released_names
from pytest_qvl.preflight import preflight
from pytest_qvl.preflight.base import find_base, quiet
from pytest_qvl.preflight.questions import release_facts as facts
from pytest_qvl.preflight.subject import Asked, Subject
from pytest_qvl.releases import is_before

# One of each family.
SMALLEST = [
    name for name in ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b", "qwen3.5-0.8b") if name in released_names()
]
ROPE = "rope_scaling" if is_before("transformers", "5") else "rope_parameters"
# What the language model's part keeps of a configuration that has everything at the top.
LANGUAGE = (
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "use_sliding_window", "sliding_window", "rope_theta"),
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rope_scaling"),
    *("num_key_value_heads", "max_window_layers"),
)
# What every family has, each with a wrong value.
COMMON: dict[str, Any] = {
    "text_config.rms_norm_eps": 1e-3,
    "text_config.hidden_act": "gelu",
    "text_config.rope_parameters.partial_rotary_factor": 0.5,
    "vision_config.hidden_act": "relu",
    "vision_config.num_heads": 4,
    "vision_config.patch_size": 28,
    "vision_config.temporal_patch_size": 1,
    "vision_config.spatial_merge_size": 1,
    "vision_config.rope_parameters.rope_theta": 1e6,
    "image_token_id": 77,
    "video_token_id": 78,
    "vision_start_token_id": 79,
    "vision_end_token_id": 80,
}
HEADS, KEYS, HEAD = (f"text_config.{name}" for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
SECTIONS, INTERLEAVED = (f"text_config.rope_parameters.{name}" for name in ("mrope_section", "mrope_interleaved"))
# What one family has, or has another value of; where heads are fewer, they are wider, and no tensor's shape differs.
OWN: dict[str, list[dict[str, Any]]] = {
    "qwen2-vl-2b": [{HEADS: 6, KEYS: 1}, {SECTIONS: [24, 16, 24]}, {INTERLEAVED: True}],
    "qwen2.5-vl-3b": [
        {HEADS: 8, KEYS: 1},
        {SECTIONS: [24, 24, 16]},
        {INTERLEAVED: True},
        {"text_config.layer_types": ["full_attention"] * 35 + ["sliding_attention"]},
        {"vision_config.window_size": 56},
        {"vision_config.fullatt_block_indexes": [7, 15, 23]},
        {"vision_config.tokens_per_second": 4},
    ],
    "qwen3-vl-2b": [
        {HEADS: 8, KEYS: 4, HEAD: 256},
        {SECTIONS: [16, 24, 24]},
        {INTERLEAVED: False},
        {"vision_config.deepstack_visual_indexes": [8, 16, 23]},
    ],
    "qwen3.5-0.8b": [
        {HEADS: 4, KEYS: 1, HEAD: 512},
        {SECTIONS: [12, 10, 10]},
        {INTERLEAVED: False},
        {"text_config.layer_types": (["full_attention"] + ["linear_attention"] * 3) * 6},
        {"text_config.linear_num_key_heads": 8, "text_config.linear_key_head_dim": 256},
        {"text_config.linear_num_value_heads": 8, "text_config.linear_value_head_dim": 256},
    ],
}
CASES = [
    pytest.param(release, changes, id=f"{release}-{' '.join(changes)}")
    for release in SMALLEST
    for changes in [*({name: value} for name, value in COMMON.items()), *OWN[release]]
]


def as_read(name: str) -> dict[str, Any]:
    """The release's configuration as the installed Transformers writes it, with every field."""
    fields: dict[str, Any] = released_config(name).to_dict()
    return deepcopy(fields)


def judged(folder, fields: dict[str, Any]):
    """What a folder with this ``config.json`` gets."""
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with quiet():
        return list(facts.release_facts(Subject(Asked(str(folder)), find_base(str(folder)))))


def change(fields: dict[str, Any], name: str, value: Any) -> None:
    """Set one setting, by its name in Transformers 5."""
    *path, key = name.split(".")
    table = fields
    for part in path:
        table = table.setdefault(ROPE if path[0] == "text_config" and part == "rope_parameters" else part, {})
    table[key] = value


@pytest.mark.parametrize("name", released_names())
def test_releases_are_as_released(tmp_path, name):
    """As the installed Transformers saves it, and with every field."""
    released_config(name).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    for fields in (saved, as_read(name)):
        (finding,) = judged(tmp_path, fields)
        assert (finding.name, finding.state, finding.notes) == ("as-released", "green", ())
        assert hub_id(name) in finding.line


def test_layouts_of_both_transformers_are_read(tmp_path):
    """At the top, as released; in ``text_config`` with other names, as 4.57 saves; ``rope_parameters``, as 5 does."""
    flat = as_read("qwen2.5-vl-7b")
    text = flat.pop("text_config")
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    language = {key: text[key] for key in LANGUAGE if key in text} | {"rope_theta": 1e6, "rope_scaling": rope}
    layouts = {
        "flat": {**flat, **language},
        "nested": {
            **flat,
            "text_config": {**language, "rope_scaling": {**rope, "type": "default", "rope_type": "default"}},
        },
    }
    if not is_before("transformers", "5"):
        new = {key: value for key, value in language.items() if not key.startswith("rope")}
        layouts["new"] = {
            **flat,
            "text_config": {**new, "rope_parameters": {**rope, "rope_theta": 1e6, "rope_type": "default"}},
        }
    for fields in layouts.values():
        (finding,) = judged(tmp_path, fields)
        assert (finding.state, finding.notes) == ("green", ())
    places = {}
    for layout, fields in layouts.items():
        table = fields if layout == "flat" else fields["text_config"]
        table["rms_norm_eps"] = 1e-5
        (table.get("rope_parameters") or table["rope_scaling"])["mrope_section"] = [24, 16, 24]
        table["max_position_embeddings"] = 32768
        places[layout] = [finding.line.split(" is ")[0] for finding in judged(tmp_path, fields)]
    assert places["flat"] == ["rms_norm_eps", "rope_scaling.mrope_section"]
    assert places["nested"] == ["text_config.rms_norm_eps", "text_config.rope_scaling.mrope_section"]
    if "new" in places:
        assert places["new"] == ["text_config.rms_norm_eps", "text_config.rope_parameters.mrope_section"]


def test_every_setting_has_a_wrong_value_here():
    named = {*COMMON, *(name for own in OWN.values() for changes in own for name in changes)}
    assert named == {setting.name for setting in (*facts.FIXED, *facts.TOKENS)}


@pytest.mark.parametrize(("release", "changes"), CASES)
def test_a_setting_that_is_not_the_releases_is_red(tmp_path, release, changes):
    fields = as_read(release)
    for name, value in changes.items():
        change(fields, name, value)
    found = judged(tmp_path, fields)
    lines = {finding.line.replace(ROPE, "rope_parameters").partition(" is ")[0]: finding for finding in found}
    assert set(lines) == set(changes)
    effects = {setting.name: setting.effect for setting in (*facts.FIXED, *facts.TOKENS)}
    for name, finding in lines.items():
        assert (finding.name, finding.state) == ("unlike-release", "red")
        assert hub_id(release) in finding.line
        assert effects[name] in finding.cause
        assert f"put back the config.json of {hub_id(release)}" in finding.fix


def test_what_is_changed_on_purpose_is_noted(tmp_path):
    fields = as_read("qwen2.5-vl-3b")
    text = fields["text_config"]
    text[ROPE] |= {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    (text if is_before("transformers", "5") else text[ROPE])["rope_theta"] = 1e7
    text |= {"max_position_embeddings": 256_000, "vocab_size": 151_936 + 64, "hidden_act": "swish"}
    fields["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    (finding,) = judged(tmp_path, fields)
    assert finding.state == "green"
    said = " ".join(finding.notes)
    words = ("tie_word_embeddings is false", "rope_theta is 10000000.0", "rope_type is yarn", "max_position_embeddings")
    assert all(word in said for word in (*words, "vocab_size is 152,000"))
    assert len(finding.notes) == 5


def test_a_grown_vocabulary_moves_no_token_and_a_cut_one_does(tmp_path):
    fields = as_read("qwen2.5-vl-3b")
    fields["image_token_id"] = 33_000
    fields["text_config"]["vocab_size"] = 152_064
    assert [finding.state for finding in judged(tmp_path, fields)] == ["red"]
    fields["text_config"]["vocab_size"] = 40_000
    (finding,) = judged(tmp_path, fields)
    assert finding.state == "green"
    assert "image_token_id is 33000, and 151655" in finding.notes[0]


def test_a_head_that_is_tied_over_is_red(tmp_path):
    fields = as_read("qwen2.5-vl-7b")
    fields["tie_word_embeddings"] = True
    (finding,) = judged(tmp_path, fields)
    assert finding.line.startswith("tie_word_embeddings is true, and false in Qwen/Qwen2.5-VL-7B-Instruct")
    assert "take the place of the head" in finding.cause


@pytest.mark.skipif(is_before("transformers", "5"), reason="its default is the release's")
def test_a_default_that_is_not_the_releases_is_named_as_one(tmp_path):
    fields = as_read("qwen3-vl-2b")
    del fields["text_config"][ROPE]["rope_theta"]
    (finding,) = judged(tmp_path, fields)
    assert finding.line.startswith("text_config.rope_parameters.rope_theta is 500000.0, and 5000000 in Qwen/")
    assert "does not say it" in finding.cause


def test_what_is_not_said_and_decides_nothing_here_is_noted(tmp_path):
    """Transformers falls back to the release's sections; a server has no M-RoPE without them."""
    fields = as_read("qwen3-vl-2b")
    del fields["text_config"][ROPE]["mrope_section"], fields["text_config"][ROPE]["mrope_interleaved"]
    (finding,) = judged(tmp_path, fields)
    assert finding.state == "green"
    assert [note.partition(" is not said")[0].rpartition(".")[2] for note in finding.notes] == [
        "mrope_section",
        "mrope_interleaved",
    ]


@pytest.mark.parametrize("name", ["embedded", *FAMILIES])
def test_models_of_other_sizes_are_held_to_none(tmp_path_factory, name):
    shop = Workshop(tmp_path_factory.mktemp("made"))
    base = embedded_model_dir() if name == "embedded" else shop.base(name)
    assert not list(facts.release_facts(Subject(Asked(str(base)), find_base(str(base)))))


def test_the_command_says_it_in_question_5(tmp_path):
    fields = as_read("qwen2.5-vl-7b")
    fields["text_config"]["rms_norm_eps"] = 1e-3
    fields["image_token_id"] = 151654
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    report = preflight(tmp_path)
    assert [(finding.question, finding.name) for finding in report.red] == [(5, "unlike-release")] * 2
    assert "text_config.rms_norm_eps is 0.001, and 1e-06" in report.red[0].line
    assert "image_token_id is 151654, and 151655" in report.red[1].line


def test_a_built_in_release_is_not_compared_with_itself():
    assert not [finding for finding in preflight("qwen2.5-vl-7b") if finding.name in ("as-released", "unlike-release")]
