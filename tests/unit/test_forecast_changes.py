"""What to change so that it fits, and the JSON with its schema."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from importlib.resources import files
from typing import Any

import jsonschema
import pytest

from pytest_qvl.cli import main
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.vram.cards import card
from pytest_qvl.vram.forecast import Forecast, Request, phases
from pytest_qvl.vram.forecast.changes import Change, candidates, cheapest, render_changes
from pytest_qvl.vram.forecast.engine.trace import Failure, PhaseBytes
from pytest_qvl.vram.forecast.output.answer import Answer
from pytest_qvl.vram.forecast.result import Largest, Refused, Verdict
from pytest_qvl.vram.forecast.run import Forecaster, make_forecaster
from pytest_qvl.vram.units import MiB

EMBEDDED = str(embedded_model_dir())
SCHEMA = json.loads(
    files("pytest_qvl").joinpath("vram", "forecast", "forecast.schema.json").read_text(encoding="utf-8")
)


def _found(request: Request, reserved: int, available: int = 1000 * MiB, states: int = 0) -> Forecast:
    failure = None if reserved <= available else Failure("train: backward", 8 * MiB)
    kinds = {"weights": reserved - states, "optimizer": states}
    phase = PhaseBytes("train: backward", reserved, reserved, kinds)  # type: ignore[arg-type]
    verdict = Verdict(card("t4"), available, reserved, failure)
    return Forecast(request, "a model", 64, 128, reserved // 2, (phase,), verdict=verdict)


def test_changes_are_ordered_by_what_they_cost() -> None:
    everything = Request(
        gradient_checkpointing=False, vision_hook=True, kbit_upcast=True, batch=4, optimizer="adamw_torch"
    )
    assert [candidate.options for candidate in candidates(_found(everything, 2000 * MiB))] == [
        "--no-vision-hook",
        "--optimizer paged_adamw_8bit",
        "--no-kbit-upcast",
        "--gradient-checkpointing",
        "--batch 1 --accumulation 4",
        "--lora-r 4",
    ]
    assert [c.options for c in candidates(_found(Request(vision_hook=False), 2000 * MiB))] == ["--lora-r 4"]


@pytest.mark.parametrize(("peak", "changed"), [(2000 * MiB, True), (900 * MiB, False)])
def test_an_evaluation_is_changed_where_it_is_what_does_not_fit(peak: int, changed: bool) -> None:
    def options(**changes: Any) -> list[str]:
        request = Request(evaluation=8, evaluation_batches=3, lora_r=4, vision_hook=False, **changes)
        found = _found(request, 2000 * MiB)
        evaluated = PhaseBytes(phases.EVALUATION, peak, peak, {})
        return [one.options for one in candidates(replace(found, phases=(*found.phases, evaluated)))]

    kept = ["--preprocess-logits argmax", "--eval-accumulation-steps 1", "--evaluation 1 --evaluation-batches 24"]
    assert options(compute_metrics=True) == (kept if changed else [])
    assert options(compute_metrics=True, preprocess_logits="argmax") == (kept[1:] if changed else [])
    assert options() == (["--evaluation 1"] if changed else [])


@pytest.mark.slow
def test_what_an_evaluation_needs_to_fit_is_forecast() -> None:
    """Real forecasts on a card with room for the training step, and for an evaluation that keeps no logits."""
    request = Request(model=EMBEDDED, image=(56, 56), tokens=40, lora_r=4, evaluation=4, evaluation_batches=20)
    forecaster, request = make_forecaster(replace(request, compute_metrics=True), "l4", None)
    l4, small = forecaster.card, replace(request, evaluation=1, evaluation_batches=1)
    assert l4 is not None
    room = forecaster.forecast(small, inference=False).peak_reserved + 2 * MiB
    forecaster.card = replace(l4, usable_bytes=l4.context_bytes + room)
    found = forecaster.forecast(request, inference=False)
    kept = ["--preprocess-logits argmax", "--eval-accumulation-steps 1"]
    assert [c.options for c in candidates(found)][:3] == [*kept, "--evaluation 1 --evaluation-batches 80"]
    assert [change.options for change in cheapest(found, forecaster.other)] == kept
    assert not [c for c in candidates(forecaster.forecast(small, inference=False)) if "evaluation" in c.options]


def test_only_changes_that_make_it_fit_are_named_and_the_hopeless_are_not_forecast() -> None:
    """The optimizer's states are less than what is too much, so that change is not tried alone."""
    request = Request(gradient_checkpointing=False, vision_hook=True, batch=2, optimizer="adamw_torch")
    asked = []

    def make(changed: Request) -> Forecast:
        asked.append(changed)
        return _found(
            changed, 1500 * MiB if changed.gradient_checkpointing is False and changed.batch == 2 else 900 * MiB
        )

    found = cheapest(_found(request, 1600 * MiB, states=100 * MiB), make)
    assert [change.options for change in found] == ["--gradient-checkpointing", "--batch 1 --accumulation 2"]
    assert asked == [
        replace(request, vision_hook=False),
        replace(request, gradient_checkpointing=True),
        replace(request, batch=1, accumulation=2),
    ]
    assert "--gradient-checkpointing: 0.88 GiB, 0.10 GiB to spare (about a third more time" in render_changes(found)


def test_where_none_does_it_alone_all_together_are_tried_and_the_smaller_image_is_named() -> None:
    request = Request(gradient_checkpointing=False, batch=2, vision_hook=False)
    smaller = _found(replace(request, image=(300, 400)), 990 * MiB)

    def make(changed: Request) -> Forecast:
        return _found(changed, 900 * MiB if changed.gradient_checkpointing and changed.batch == 1 else 1100 * MiB)

    options = [change.options for change in cheapest(_found(request, 2000 * MiB), make, smaller)]
    assert options == ["--image 300x400", "--gradient-checkpointing --batch 1 --accumulation 2 --lora-r 4"]


def test_what_fits_or_is_not_trained_needs_no_change() -> None:
    def make(_: Request) -> Forecast:
        raise AssertionError("no forecast is needed")

    assert cheapest(_found(Request(), 900 * MiB), make) == []
    assert cheapest(_found(Request(lora_r=0), 2000 * MiB), make) == []
    assert "no change of these settings makes it fit" in render_changes([])


def test_each_change_is_a_real_forecast_on_the_same_card() -> None:
    """A card that holds the step only with checkpointing."""
    kept = Request(model=EMBEDDED, image=(448, 448), tokens=400, gradient_checkpointing=False, vision_hook=False)
    forecaster, kept = make_forecaster(kept, None, "bfloat16")
    with_checkpointing = forecaster.other(replace(kept, gradient_checkpointing=True))
    available = with_checkpointing.peak_reserved
    forecaster.card = replace(card("l4"), usable_bytes=card("l4").context_bytes + available)
    too_much = forecaster.forecast(kept, inference=False)
    assert too_much.verdict is not None
    assert not too_much.verdict.fits
    found = cheapest(too_much, forecaster.other)
    assert found[0].options == "--gradient-checkpointing"
    assert found[0].forecast.peak_reserved == available


def test_the_schema_knows_every_setting_and_refuses_what_is_no_forecast() -> None:
    assert set(SCHEMA["$defs"]["request"]["properties"]) == {field.name for field in fields(Request)}
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    data = _as_plain(_found(Request(), 900 * MiB))
    jsonschema.validate(data, SCHEMA)
    for broken in (
        {"schema": "pytest-qvl/forecast/0"},
        {"peak": {}},
        {"phases": [{}]},
        {"card": {}},
        {"assumed": None},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**data, **broken}, SCHEMA)


def _as_plain(*arguments: Any, **named: Any) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(Answer(*arguments, **named).as_json()))
    return plain


@pytest.mark.parametrize(
    ("changes", "adapter"),
    [
        ({}, "fp32, language linears"),
        ({"trainer": "trl", "lora_targets": "all-linear"}, "bf16, all-linear"),
        ({"trainer": "trl", "base_bits": 16, "lora_targets": ("q_proj", "v_proj")}, "fp32, q_proj + v_proj"),
    ],
)
def test_the_text_says_in_which_dtype_and_where_the_adapter_is(changes: dict[str, Any], adapter: str) -> None:
    assert f"LoRA r=16 ({adapter}), " in Answer(_found(Request(**changes), 900 * MiB)).as_text()


def test_all_that_a_forecast_can_say_fits_the_schema() -> None:
    refused = _found(Request(batch=4), 2000 * MiB)
    fits = _found(Request(), 900 * MiB)
    change = Change("--batch 1 --accumulation 4", "time", fits)
    larger = Refused(refused.request, refused.visual_tokens)
    for largest in (Largest("batch", fits, refused=larger), Largest("image", None, refused=larger), None):
        data = _as_plain(refused, ("--trainer hf",), largest=largest, changes=[change])
        jsonschema.validate(data, SCHEMA)
        assert data["changes"][0]["fits"] is True


def test_the_command_prints_json_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "forecast",
        "--model",
        EMBEDDED,
        "--image",
        "112x112",
        "--tokens",
        "20",
        "--card",
        "l4",
        "--json",
        "--compare",
    ]
    assert main([*command, "--json", "--compare", "--largest", "none"]) == 0
    data = json.loads(capsys.readouterr().out)
    jsonschema.validate(data, SCHEMA)
    assert "rules" in data
    assert not {"largest", "changes"} & data.keys()


def test_the_command_names_the_changes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(model=EMBEDDED, image=(448, 448), tokens=400, gradient_checkpointing=True, vision_hook=False)
    request = replace(request, capability=card("l4").compute_capability)
    room = Forecaster(request).forecast(request, inference=False).peak_reserved
    small = replace(card("l4"), usable_bytes=card("l4").context_bytes + room)
    monkeypatch.setattr("pytest_qvl.vram.forecast.asked.find_card", lambda _: small)
    command = ["forecast", "--model", EMBEDDED, "--image", "448x448", "--tokens", "400", "--card", "l4"]
    assert main([*command, "--no-gradient-checkpointing", "--no-vision-hook", "--largest", "none"]) == 1
    text = capsys.readouterr().out
    assert "the cheapest changes that make it fit:\n  --gradient-checkpointing: " in text
