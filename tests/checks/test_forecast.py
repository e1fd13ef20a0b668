"""The forecast as a check: derived from what the user configured, refused with a reason, and right."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from pytest_qvl.checks import forecast_agrees, forecast_fits_card
from pytest_qvl.checks.forecast import forecast_work, judge_agreement
from pytest_qvl.checks.vram import work_of
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.models.adapters import LANGUAGE_ONLY, adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import base_tensors, usual_quantization
from pytest_qvl.models.sources.model_source import ModelSource
from pytest_qvl.models.sources.synthetic_processor import synthetic_processor
from pytest_qvl.samples import make_batch, scenes
from pytest_qvl.vram.cards import card
from pytest_qvl.vram.forecast import Request, Sample, phases
from pytest_qvl.vram.forecast.engine.allocator import round_size
from pytest_qvl.vram.forecast.engine.dry_run import DryRun
from pytest_qvl.vram.forecast.engine.recipes import NotFollowed, recipe_from_configs, recipe_from_model
from pytest_qvl.vram.forecast.engine.trace import replay
from pytest_qvl.vram.forecast.run import Forecaster
from pytest_qvl.vram.forecast.source import find_source, find_weights_source
from pytest_qvl.vram.forecast.validation.agreement import Comparison
from pytest_qvl.vram.forecast.validation.measured import measure
from pytest_qvl.vram.forecast.validation.predictions import (
    PACKAGES,
    Case,
    differences,
    other_versions,
    predict,
    read_predictions,
)
from pytest_qvl.vram.forecast.validation.predictions import main as compare
from pytest_qvl.vram.forecast.validation.records import as_plain, versions
from pytest_qvl.vram.meter import Meter
from pytest_qvl.vram.units import GiB, MiB
from pytest_qvl.vram.usage import Usage

RECORDS = Path(__file__).parents[2] / "docs" / "records"
NF4 = usual_quantization(torch.bfloat16)
LORA = LoraConfig(r=16, lora_alpha=32, target_modules=LANGUAGE_ONLY)
PREDICTIONS = RECORDS / "forecast-predictions.json"
SHORT = {"image": (112, 112), "tokens": 20, "generate": 2}


def suite_samples() -> list[Any]:
    """What the shipped suite makes its batches of."""
    return list({sample.skill: sample for sample in reversed(scenes(0, 6))}.values())


# --- fits the card -----------------------------------------------------------------------------------------------


def test_a_model_that_fits_shows_every_phase_and_the_room() -> None:
    evidence = forecast_fits_card("embedded", NF4, LORA, "t4", **SHORT)
    figures = {figure.name: figure for figure in evidence.figures}
    assert evidence.table is not None
    assert [row[0] for row in evidence.table.rows][-1] == phases.OPTIMIZER
    assert {f"{row[0]}: peak reserved" for row in evidence.table.rows} < set(figures)
    held = figures["forecast for Tesla T4"]
    assert held.limit == (card("t4").usable_bytes - card("t4").context_bytes) / GiB
    assert figures["room"].value == pytest.approx(held.limit - held.value)
    assert any("has no bfloat16, so it computes in float16" in note for note in evidence.notes)


@pytest.mark.slow
def test_a_model_that_does_not_fit_says_where_by_how_much_and_what_does() -> None:
    t4 = card("t4")
    small = replace(t4, title="Small", usable_bytes=t4.context_bytes + 150 * MiB)
    with pytest.raises(CheckFailed) as caught:
        forecast_fits_card("embedded", NF4, LORA, small, image=(700, 700), batch=4, generate=0)
    said = re.search(
        r"embedded does not fit Small: out of memory in 'prefill', (\d+) MiB more than it has would be reserved; "
        r"the largest image of that shape that fits is \d+x\d+ \(\d+ visual tokens\) "
        r"\[forecast for Small (0\.\d+) GiB \(<= 0\.1465 GiB\)\]",
        str(caught.value),
    )
    assert said
    more, needed = int(said[1]), float(said[2])  # both as rounded for people; how much differs between releases
    assert more > 0
    assert more == pytest.approx(needed * 1024 - 150, abs=1)


def test_the_users_own_pictures_are_what_is_forecast() -> None:
    samples = suite_samples()
    evidence = forecast_fits_card("embedded", NF4, LORA, "l4", samples=samples, generate=0)
    most = max(len(sample.images) for sample in samples)
    assert any(f"{most} images of " in note and "bfloat16" in note for note in evidence.notes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"card": None}, "no card was named: --qvl-card t4"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "bfloat16 or float16, not in float32"),
        ({"quantization_config": None}, "bfloat16 or float16, not in None"),
        ({"lora_config": LoraConfig(use_dora=True, target_modules=["q_proj"])}, "does not follow use_dora=True"),
        ({"lora_config": LoraConfig(bias="all", target_modules=["q_proj"])}, "does not follow bias='all'"),
        ({"lora_config": LoraConfig(modules_to_save=["lm_head"])}, r"does not follow modules_to_save=\['lm_head'\]"),
    ],
)
def test_what_the_forecast_cannot_follow_is_not_judged(change: dict[str, Any], says: str) -> None:
    asked = {"quantization_config": NF4, "lora_config": LORA, "card": "t4", **change}
    with pytest.raises(CannotJudge, match=says):
        forecast_fits_card("embedded", **asked)


def test_what_unsloth_has_replaced_is_not_forecast(monkeypatch: pytest.MonkeyPatch, lora_model: Any) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    with pytest.raises(CannotJudge, match="in this process Unsloth has put its own in place"):
        forecast_fits_card("embedded", NF4, LORA, "t4")
    with pytest.raises(NotFollowed, match="in this process Unsloth has put its own in place"):
        recipe_from_model(lora_model)


def test_an_unknown_card_or_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="card 't5' is unknown"):
        forecast_fits_card("embedded", NF4, LORA, "t5")
    with pytest.raises(ValueError, match="no released configuration 'qwen9'"):
        forecast_fits_card("synthetic:qwen9", NF4, LORA, "t4")


def test_a_released_hub_id_needs_no_network() -> None:
    assert find_weights_source(ModelSource("hub", "Qwen/Qwen2.5-VL-3B-Instruct")).label == "qwen2.5-vl-3b"


# --- what a model is made of -------------------------------------------------------------------------------------


def kinds(tiny_dir: Path, lora: LoraConfig, **changes: Any) -> dict[Any, int]:
    """Bytes by kind after the first update, with a recipe changed."""
    source = find_source(str(tiny_dir))
    recipe = replace(recipe_from_configs(source.config, NF4, lora), **changes)
    request = Request(str(tiny_dir), **{**SHORT, "lora_r": lora.r, "generate": 0})
    found = Forecaster(request, source=source, recipe=recipe).forecast(request, inference=False)
    return found.phase(phases.STATES).by_kind


def test_the_model_forecast_is_the_one_configured(tiny_dir: Path) -> None:
    # A saved adapter's configuration is for inference, and some ways to initialise need the weights.
    saved = LoraConfig(r=16, target_modules=LANGUAGE_ONLY, inference_mode=True, init_lora_weights="pissa")
    queries = LoraConfig(r=16, target_modules=["language_model.layers.0.self_attn.q_proj"])
    usual, other = kinds(tiny_dir, saved), kinds(tiny_dir, queries, nested=False)
    width = find_source(str(tiny_dir)).config.get_text_config().hidden_size
    assert other["adapters"] == 2 * round_size(4 * 16 * width) < usual["adapters"]
    # Second statistics, their code book and an offset take 512 bytes each: on layers this small they cost more.
    assert other["weights"] < usual["weights"]


def test_linears_are_quantized_as_configured(tiny_dir: Path) -> None:
    config = find_source(str(tiny_dir)).config
    skip = ["model.visual.blocks", "lm_head"]
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16", llm_int8_skip_modules=skip)
    usual, other = (recipe_from_configs(config, quantization, LORA) for quantization in (NF4, asked))
    assert usual.quantized is not None
    assert other.quantized is not None
    assert usual.quantized < other.quantized
    assert all(".merger." in name for name in other.quantized - usual.quantized)
    assert (usual.nested, other.nested) == (True, False)


def test_a_loaded_model_and_its_configurations_give_the_same_recipe(lora_model: Any, tiny_dir: Path) -> None:
    request, source, recipe = recipe_from_model(lora_model)
    given = recipe_from_configs(find_source(str(tiny_dir)).config, NF4, lora_model.peft_config["default"])
    assert recipe == given
    assert (request.lora_r, request.compute_dtype, request.kbit_upcast) == (8, "bfloat16", False)
    assert source.config.get_text_config().hidden_size == lora_model.config.get_text_config().hidden_size


def test_a_model_of_another_kind_is_not_followed(fresh_model: Any) -> None:
    with pytest.raises(NotFollowed, match="not quantized to 4 bits"):
        recipe_from_model(fresh_model(quantized=False))
    with pytest.raises(NotFollowed, match="one active adapter, and this model has 0"):
        recipe_from_model(fresh_model(dtype="bfloat16"))


# --- agrees with a measurement -----------------------------------------------------------------------------------


def test_the_work_forecast_begins_from_the_bytes_of_the_real_model(lora_model: Any, processor: Any) -> None:
    samples = scenes(0, 2)[:3]
    batch = make_batch(processor, samples)
    found = forecast_work(lora_model, batch, make_batch(processor, samples, padding_side="right", answers=True))
    assert list(found)[-4:] == ["vision", "prefill", "decode 8", "train step"]
    parts = anatomy(lora_model)
    base = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for _, t in base_tensors(parts)}
    real = sum(map(round_size, base.values()))
    # Each layer names the code book that all share, which the forecast has once; and blocks not worth splitting.
    assert abs(found["vision"].by_kind["weights"] - real) <= 4 * 512
    tuned = sum(round_size(p.nbytes) for p in adapter_parameters(parts).values())
    assert abs(found["vision"].by_kind["adapters"] - tuned) <= 512
    assert found["vision"].start_allocated < found["vision"].peak_allocated < found["train step"].peak_allocated


def test_without_a_gpu_there_is_nothing_to_compare(lora_model: Any, processor: Any) -> None:
    batch = make_batch(processor, scenes(0, 1, ("colour_of",)), answers=True)
    with pytest.raises(CannotJudge, match="a forecast is compared with a GPU: the model is on the CPU"):
        forecast_agrees(lora_model, batch, batch, Meter())


@pytest.fixture(scope="module")
def three_billion() -> DryRun:
    """The 3B model as the suite and the predictions build it."""
    source = find_source("qwen2.5-vl-3b")
    request = Request("qwen2.5-vl-3b", checkpoint="synthetic", trainer="loop")
    return DryRun(request, source, recipe_from_configs(source.config, NF4, LORA))


@pytest.mark.slow
def test_the_suites_own_batch_is_forecast_as_an_h200_measured_it(three_billion: DryRun) -> None:
    """Against the figures of the committed record, which were measured before this comparison was written.

    The record has the bytes requested for what is resident, not those of the allocator's blocks, which are up to 1 MiB
    larger each: as resident both sides take the forecast's here, so that the first limit judges the whole.
    """
    record = json.loads((RECORDS / "h200-qwen2.5-vl-3b.json").read_text(encoding="utf-8"))
    (measured,) = (check["figures"] for check in record["checks"] if check["check"] == "peak_vram")
    peaks = {f["name"].removesuffix(": peak allocated"): f["value"] for f in measured if "peak allocated" in f["name"]}
    processor, samples = synthetic_processor("qwen2.5-vl-3b"), suite_samples()
    batches = (make_batch(processor, samples), make_batch(processor, samples, padding_side="right", answers=True))
    found = replay(three_billion.run_work(batches, lambda *parts: work_of(*parts, decode_steps=1))).phases
    resident = found["vision"].start_allocated
    usages = [Usage(n, allocated=int(v * GiB), alive_allocated=resident) for n, v in peaks.items()]
    assert judge_agreement(found, usages).ok


def test_a_committed_prediction_is_still_what_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte on the releases it was made with; on others within the limits that measurements are held to.

    One without autocast: those with were made before the forecast followed CUDA's.
    """
    # As the models were built before this one in the process that made the file.
    monkeypatch.setitem(bnb.functional.name2qmap, "dynamic", bnb.functional.create_dynamic_map())
    (entry,) = (e for e in read_predictions(PREDICTIONS) if e["name"] == "3b-256-kept")
    case = Case.from_dict(entry)
    found = as_plain(predict(case, Forecaster(case.request)))
    if not other_versions(PREDICTIONS):
        assert differences(entry, found) == []
    for name in phases.TRAINING:
        peaks = (each["phases"][name]["allocated"] for each in (found, entry))
        assert Comparison(name, *peaks, found["resident"], entry["resident"]).holds


def test_other_versions_are_named(tmp_path: Path) -> None:
    data = {**json.loads(PREDICTIONS.read_text(encoding="utf-8")), "cases": []}
    data["versions"] = {
        **versions(*PACKAGES),
        "pytest-qvl": "9",
        "peft": "0.1",
        "torch": f"{torch.__version__.partition('+')[0]}+x",
    }
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    assert other_versions(file) == [f"peft 0.1, here {versions('peft')['peft']}"]


def test_where_forecasts_differ_is_said() -> None:
    entry = {"name": "a", "verdict": {"fits": True}, "phases": {"load": {"allocated": 7}}}
    assert differences(entry, entry) == []
    changed = {
        "name": "a",
        "verdict": {"fits": True},
        "phases": {"load": {"allocated": 8}, "prefill": {"allocated": 9}},
    }
    assert differences(entry, changed) == [
        "a: phases, load, allocated: 7 committed, 8 now",
        "a: phases, prefill, allocated: nothing committed, 9 now",
    ]


@pytest.mark.parametrize("changed", [False, True])
def test_the_comparison_of_all_cases_exits_by_what_it_finds(
    changed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = read_predictions(PREDICTIONS)
    now = [{**entries[0], "resident": 1}, *entries[1:]] if changed else entries
    monkeypatch.setattr("pytest_qvl.vram.forecast.validation.predictions.predictions", lambda: iter(now))
    assert compare(["--compare", str(PREDICTIONS)]) == int(changed)
    printed = capsys.readouterr().out
    expected = (
        f"3b-256: resident: {entries[0]['resident']} committed, 1 now" if changed else "all 24 forecasts are those of"
    )
    assert expected in printed


@pytest.mark.parametrize(("size", "gib", "lora"), [("3b", 3.159, 29_933_568), ("7b", 6.426, 40_370_176)])
def test_four_bit_weights_take_what_arithmetic_says(size: str, gib: float, lora: int) -> None:
    """By the forecast and by a GPU, against a table made without either: parameters by their storage."""
    entry = next(e for e in read_predictions(RECORDS / "forecast-predictions.json") if e["name"] == f"{size}-256")
    assert entry["resident"] / GiB == pytest.approx(gib, rel=0.01)
    record = json.loads((RECORDS / f"h100-qwen2.5-vl-{size}.json").read_text(encoding="utf-8"))
    (figures,) = (check["figures"] for check in record["checks"] if check["check"] == "peak_vram")
    model = next(figure["value"] for figure in figures if figure["name"] == "model")
    assert model - lora * 4 / GiB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"trainer": "loop", "kbit_upcast": True}, marks=pytest.mark.slow),
        {"trainer": "hf", "accumulation": 2, "samples": (Sample(((56, 56),), 12), Sample(((56, 84), (56, 56)), 20))},
        pytest.param({"trainer": "trl"}, marks=pytest.mark.slow),
    ],
)
def test_what_is_measured_goes_through_the_phases_that_are_forecast(tiny_dir: Path, changes: dict[str, Any]) -> None:
    """The real code on real tensors, on the CPU; only the numbers need a GPU."""
    settings: dict[str, Any] = {**SHORT, "lora_r": 4, "optimizer": "adamw_8bit", **changes}
    request = Request(str(tiny_dir), checkpoint="synthetic", **settings)
    measured = measure(request, Meter(), "cpu")
    assert list(dict.fromkeys(u.name for u in measured.phases)) == [
        p.name for p in Forecaster(request).forecast(request).phases
    ]
    assert not any(usage.measured for usage in measured.phases)


def test_only_what_can_be_measured_is(tiny_dir: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint is '16bit': what is measured here is built with random weights"):
        measure(Request(str(tiny_dir)), Meter(), "cpu")
    with pytest.raises(ValueError, match="paged states cannot be measured"):
        measure(Request(str(tiny_dir), **SHORT, checkpoint="synthetic"), Meter(), "cpu", inference=False)
