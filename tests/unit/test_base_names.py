"""Which names are the same base model, which are another, and which prove nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources import base_names
from pytest_qvl.models.sources.base_names import other_base
from pytest_qvl.models.sources.released import hub_id, released_config, released_names

COMMIT = "0123456789" * 4
SEVEN = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.fixture(scope="module")
def config():
    return released_config("qwen2.5-vl-7b")


@pytest.mark.parametrize(
    ("named", "under_test"),
    [
        (SEVEN, SEVEN),
        ("unsloth/Qwen2.5-VL-7B-Instruct-unsloth-bnb-4bit", SEVEN),
        (SEVEN, "someone/qwen2.5-vl-7b-instruct-AWQ"),
        ("/models/Qwen2.5-VL-7B-Instruct/", SEVEN),
        (SEVEN, f"/cache/hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/{COMMIT}"),
        (SEVEN, ""),
        ("", SEVEN),
        ("/train/out/merged", "/serve/merged"),
    ],
)
def test_the_same_model_or_nothing_to_compare(config, named, under_test):
    assert other_base({"base_model_name_or_path": named}, under_test, config) == ("", False)


@pytest.mark.parametrize(
    ("named", "under_test", "said"),
    [
        ("allenai/olmOCR-2-7B", SEVEN, "its shapes fit, but it was learned on other weights"),
        ("Qwen/Qwen2-VL-7B-Instruct", "/models/mine", "which is qwen2_5_vl"),
        ("unsloth/Qwen2-VL-7B-Instruct-bnb-4bit", SEVEN, "which is qwen2_5_vl"),
        ("/models/Qwen3-VL-30B-A3B-Thinking-FP8", SEVEN, "which is qwen2_5_vl"),
        ("/models/Qwen3-VL-8B-Instruct", "", "which is qwen2_5_vl"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "/models/mine", "which is 3,584 wide and not 2,048"),
    ],
)
def test_certainly_another_model(config, named, under_test, said):
    sentence, certain = other_base({"base_model_name_or_path": named}, under_test, config)
    assert certain
    assert said in sentence
    assert repr(named) in sentence
    assert repr(under_test or "a model built from a configuration") in sentence


@pytest.mark.parametrize(
    ("named", "under_test"),
    [
        (SEVEN, "/models/mine"),
        ("/sft-1", SEVEN),
        ("/sft-1", "/sft-2"),
        # The trainer's own folder, often that of a repository of code which is named after another model.
        ("Qwen2-VL-Finetune/my-run", SEVEN),
        ("output/merged", SEVEN),
        ("/home/me/Qwen2-VL-Finetune", "/models/mine"),
        ("/data/qwen3-vl-comparison/Qwen2-VL-sft", SEVEN),
        ("/data/Qwen2-VL-7B-Instruct/run-3", "/models/mine"),
        ("./qwen2-vl-7b-vs-2.5", SEVEN),
    ],
)
def test_a_folder_proves_nothing(config, named, under_test):
    sentence, certain = other_base({"base_model_name_or_path": named}, under_test, config)
    assert sentence.endswith("if these are not the same weights, load it on the model it was trained for")
    assert not certain


def test_a_release_is_of_its_family_whatever_the_family_is_called(monkeypatch, request, config):
    """Experts are a family of their own, with a label of their own, and are released under their generation's name."""
    row = FAMILIES["qwen3_vl"]
    experts = replace(row, model_type="qwen3_vl_moe", label="Qwen3-VL-MoE")
    monkeypatch.setattr(base_names, "FAMILIES", {**FAMILIES, "qwen3_vl_moe": experts})
    base_names.generations.cache_clear()
    request.addfinalizer(base_names.generations.cache_clear)
    monkeypatch.setattr(config, "model_type", "qwen3_vl_moe")
    adapter = {"base_model_name_or_path": "Qwen/Qwen3-VL-30B-A3B-Instruct"}
    assert not other_base(adapter, "/models/mine", config).certain
    assert other_base({"base_model_name_or_path": SEVEN}, "/models/mine", config).certain


def test_every_release_names_its_generation():
    assert set(base_names.generations()) == set(FAMILIES)
    for name in released_names():
        generation = base_names.generations()[released_config(name).model_type]
        assert hub_id(name).rpartition("/")[2].lower().startswith(f"{generation}-")


def test_another_revision():
    loaded = released_config("qwen2.5-vl-7b")
    loaded._commit_hash = COMMIT
    for revision, different in ((COMMIT, False), ("main", False), (None, False), ("f" * 40, True)):
        adapter = {"base_model_name_or_path": SEVEN, "revision": revision}
        assert other_base(adapter, SEVEN, loaded).certain is different
