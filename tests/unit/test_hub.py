"""Hub ids: a revision, the cache where there is no network, and one sentence where there is neither."""

from __future__ import annotations

import json
import time

import pytest

from pytest_qvl.models.sources import hub
from pytest_qvl.models.sources.hub import hub_options, model_folder, saved_quantization
from pytest_qvl.models.sources.model_source import ModelSource, ModelSourceError, parse_model

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """A hub that nobody can reach: the port takes no connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the environment may say otherwise
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    for function in (hub._cache_only, hub._hub_config):
        function.cache_clear()
    yield
    for function in (hub._cache_only, hub._hub_config):
        function.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A local cache that holds nobody/model at revision v1, saved in 4 bits."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--nobody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    return snapshot


def test_a_revision():
    source = parse_model("nobody/model@v1.0/beta")
    assert source == ModelSource("hub", "nobody/model", "v1.0/beta")
    assert (str(source), source.label) == ("hub:nobody/model@v1.0/beta", "model")
    assert parse_model(str(source)) == source
    with pytest.raises(ModelSourceError, match="a hub id has the form owner/name"):
        parse_model("hub:nobody/model@")


def test_without_a_network_one_sentence_in_seconds(cache):
    start = time.monotonic()
    with pytest.raises(ModelSourceError, match="model 'hub:nobody/other' is not in the local cache .* does not answer"):
        hub_options(parse_model("hub:nobody/other"))
    assert time.monotonic() - start < 2 * hub.PATIENCE_S


def test_without_a_network_the_cache_is_used(cache):
    source = parse_model("hub:nobody/model@v1")
    assert hub_options(source) == {"local_files_only": True, "revision": "v1"}
    assert model_folder(source) == cache
    assert saved_quantization(source) == {"load_in_4bit": True}
    with pytest.raises(ModelSourceError, match="is not in the local cache"):
        hub_options(parse_model("hub:nobody/model@v2"))


def test_offline_by_choice_asks_nobody(cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_refusal", lambda source: pytest.fail("asked the hub"))
    with pytest.raises(ModelSourceError, match="HF_HUB_OFFLINE is set"):
        hub_options(parse_model("hub:nobody/other"))
    assert hub_options(parse_model("hub:nobody/model@v1"))["local_files_only"]


@pytest.mark.parametrize(
    ("config", "says"),
    [({"load_in_8bit": True}, r"saved in 8 bits \(load_in_8bit\)"), ({"quant_method": "awq"}, "saved in 'awq'")],
)
def test_a_hub_model_in_another_quantization(cache, config, says):
    (cache / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(ModelSourceError, match=f"model 'hub:nobody/model@v1' is {says}; this package tests 4-bit"):
        saved_quantization(parse_model("hub:nobody/model@v1"))


def test_folders_need_no_hub():
    assert hub_options(parse_model("embedded")) == {"local_files_only": True}
    assert saved_quantization(parse_model("synthetic:qwen2.5-vl-7b")) is None
    assert model_folder(parse_model("synthetic:qwen2.5-vl-7b")) is None
