"""What is said of a forecast: the verdict, the largest that fits, the figure, the command's answers and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bitsandbytes as bnb
import pytest
import transformers
from packaging.version import Version

from pytest_qvl.cli import main
from pytest_qvl.figures import digest_of, drawn_digest
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.models.sources.released import released_config, released_names
from pytest_qvl.vram.cards import card
from pytest_qvl.vram.forecast import Forecast, Request, forecast, phases
from pytest_qvl.vram.forecast.output.timeline import drawn
from pytest_qvl.vram.forecast.run import largest, make_forecaster
from pytest_qvl.vram.forecast.runnable import why_not_runnable
from pytest_qvl.vram.forecast.source import find_source
from pytest_qvl.vram.units import MiB

MERGED_PIXELS = 28
EMBEDDED = str(embedded_model_dir())


def _small(**changes: Any) -> Forecast:
    return forecast(**{"model": EMBEDDED, "image": (224, 224), "tokens": 40, "lora_r": 8, **changes})


def test_a_verdict_names_the_phase_that_runs_out() -> None:
    """On a T4 made to hold little more than a step of 64 tokens."""
    request = Request(model=EMBEDDED, image=(56, 56), tokens=64, gradient_checkpointing=False)
    forecaster, request = make_forecaster(request, "t4", None)
    t4, room = card("t4"), forecaster.forecast(request, inference=False).peak_reserved
    forecaster.card = replace(t4, usable_bytes=t4.context_bytes + room)
    fits = forecaster.forecast(request, inference=False)
    assert fits.verdict is not None
    assert fits.verdict.fits
    assert fits.request.compute_dtype == "float16"
    assert fits.request.capability == (7, 5)
    refused = forecaster.forecast(replace(request, tokens=1024), inference=False)
    assert refused.verdict is not None
    assert refused.verdict.failure is not None
    assert refused.verdict.failure.phase == phases.FORWARD


@pytest.mark.parametrize("dimension", ["image", "batch"])
def test_the_largest_that_fits_is_confirmed_and_the_next_refused(dimension: Any) -> None:
    """On a card made to hold exactly a batch of three, or an image of 784 visual tokens."""
    request = Request(model=EMBEDDED, image=(224, 224), tokens=40, gradient_checkpointing=False)
    enough = {"batch": 3} if dimension == "batch" else {"image": (784, 784)}
    forecaster, request = make_forecaster(request, None, "float16")
    request_tokens = 64
    room = forecaster.forecast(replace(request, **enough)).peak_reserved
    t4 = card("t4")
    forecaster.card = replace(t4, usable_bytes=t4.context_bytes + room)
    found = largest(forecaster, forecaster.forecast(request), dimension)
    assert found.forecast is not None
    assert found.refused is not None
    assert found.forecast.verdict is not None
    assert found.forecast.verdict.fits
    assert found.forecast == forecaster.forecast(found.forecast.request, inference=False, timeline=False)
    refused = forecaster.forecast(found.refused.request, inference=False, timeline=False)
    assert refused.visual_tokens == found.refused.visual_tokens
    assert refused.verdict is not None
    assert not refused.verdict.fits
    assert not found.bounded
    if dimension == "batch":
        assert (found.forecast.request.batch, found.refused.request.batch) == (3, 4)
    else:
        assert found.forecast.visual_tokens < found.refused.visual_tokens
        assert found.refused.visual_tokens > 784
        assert found.forecast.visual_tokens > request_tokens


@pytest.mark.slow
def test_a_card_that_holds_every_image_is_said_to() -> None:
    """The processor of the released models shrinks images to 16,384 tokens; this folder's to far fewer."""
    forecaster, request = make_forecaster(Request(model=EMBEDDED, image=(112, 112), tokens=40), "h200", None)
    found = largest(forecaster, forecaster.forecast(request), "image")
    assert found.bounded
    assert found.refused is None
    assert found.forecast is not None
    sizes = forecaster.source.sizes
    assert found.forecast.visual_tokens >= 0.9 * sizes.max_pixels // MERGED_PIXELS**2


def test_a_model_that_never_fits_has_no_largest() -> None:
    request = Request(model=EMBEDDED, image=(112, 112), tokens=8, kbit_upcast=True)
    tiny = replace(card("rtx3060-12gb"), usable_bytes=card("rtx3060-12gb").context_bytes + 3 * MiB)
    forecaster, request = make_forecaster(request, tiny, None)
    found = largest(forecaster, forecaster.forecast(request), "image")
    assert found.forecast is None
    assert found.refused is not None
    assert found.refused.visual_tokens == 4


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image": (0, 0)}, "image 0x0 has no pixels"),
        ({"image": (10, 9000)}, "more than 200 times"),
        ({"images": 0}, "images is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"lora_r": -1}, "lora_r is -1"),
        ({"generate": -3}, "generate is -3"),
        ({"tokens": 3}, "tokens is 3"),
        ({"optimizer": "lomo"}, "optimizer is 'lomo'"),
        ({"compute_dtype": "float64"}, "float64"),
        ({"checkpoint": "gguf"}, "checkpoint is 'gguf'"),
        ({"card": "t5"}, "card 't5' is unknown"),
        ({"card": "t4", "compute_dtype": "bfloat16"}, "no bfloat16"),
        ({"model": "qwen9"}, "neither a released configuration"),
    ],
)
def test_nonsense_gets_one_clear_error(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        _small(**change)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "no vision-language model"),
        ('{"model_type": "qwen2", "hidden_size": 8}', "model_type 'qwen2'"),
        ('{"model_type": "qwen2_5_vl", "hidden_size": 8}', "vision_config missing"),
    ],
)
def test_a_folder_without_a_vision_model_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        forecast(str(tmp_path))


@pytest.mark.parametrize(
    ("half", "change", "complaint"),
    [
        (
            "text_config",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers 1000000000, which no model of this family has",
        ),
        ("text_config", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ("text_config", {"hidden_size": "128"}, "is no configuration that Transformers takes"),
        ("vision_config", {"window_size": 0}, "cannot run: window_size of the vision tower is 0"),
        ("vision_config", {"num_heads": 7}, "cannot run: its forward pass fails with"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(
    tmp_path: Path, half: str, change: dict[str, Any], complaint: str
) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(EMBEDDED).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content[half].update(change)
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        find_source(str(tmp_path))


def _folder_with(folder: Path, **files: Any) -> str:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(EMBEDDED).save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="Transformers 4 reads the release's file alone")
def test_what_a_processor_saved_goes_before_what_its_folder_had(tmp_path: Path) -> None:
    """The real processor of a folder with both files, as one that is saved beside a release's file leaves it."""
    limits = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}
    shutil.copytree(EMBEDDED, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "size": limits}
    saved = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": settings}
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    sizes = find_source(str(tmp_path)).sizes
    real = load_processor(tmp_path).image_processor
    assert (sizes.min_pixels, sizes.max_pixels) == (real.size["shortest_edge"], real.size["longest_edge"])
    assert sizes.visual_tokens(280, 280) == 4
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    assert find_source(str(tmp_path)).sizes == find_source(EMBEDDED).sizes


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("preprocessor_config", "{", "preprocessor_config.json is not JSON: "),
        ("preprocessor_config", "[]", r"preprocessor_config.json holds \[\] where a processor's settings are expected"),
        ("processor_config", {"image_processor": 5}, "holds 5 where a processor's settings are expected"),
        ("preprocessor_config", {"max_pixels": "many"}, r"has max_pixels \(or size\) 'many': it must be a number of"),
        ("preprocessor_config", {"max_pixels": -1}, r"has max_pixels \(or size\) -1: it must be a number of pixels"),
        ("preprocessor_config", {"size": 5}, "has size=5: it must be shortest_edge and longest_edge by name"),
        ("video_preprocessor_config", {"size": {"longest_edge": "x"}}, r"has max_pixels \(or size\) 'x': it must be"),
        ("processor_config", {"video_processor": []}, r"holds \[\] where a processor's settings are expected"),
    ],
)
def test_a_processor_file_that_says_no_sizes_is_named(tmp_path: Path, file: str, content: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        find_source(_folder_with(tmp_path, **{file: content}))


@pytest.mark.parametrize("name", released_names())
def test_every_release_can_run(name: str) -> None:
    assert why_not_runnable(released_config(name)) == ""


def _command(*options: str) -> list[str]:
    return ["forecast", "--model", EMBEDDED, "--image", "112x112", "--tokens", "20", *options]


def test_the_command_prints_phases_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_command("--card", "t4", "--largest", "none", "--compare")) == 0
    text = capsys.readouterr().out
    for expected in (*phases.TRAINING, "MiB at the peak", "Tesla T4: torch sees 14.56 GiB", "FITS with", "accelerate"):
        assert expected in text


@pytest.mark.parametrize(
    "setting",
    [
        *("--resume", "--load-best --evaluation 1", "--resume --trainer trl", "--packed --batch 2", "--liger", "--ddp"),
        *("--trainer unsloth --no-compiled", "--base-bits 8 --reentrant", "--max-length 60 --trainer trl"),
    ],
)
def test_what_a_trainer_alone_has_leaves_inference_before_it_as_it_is(
    setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_command("--largest", "none", "--json", *setting.split())) == 0
    by_name = {phase["name"]: phase for phase in json.loads(capsys.readouterr().out)["phases"]}
    assert by_name[phases.PREFILL]["peak_allocated"] > 0


@pytest.mark.slow
def test_the_command_fails_when_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["forecast", "--model", "qwen2.5-vl-7b", "--card", "rtx3060-12gb", "--image", "112x112"]
    assert main([*command, "--tokens", "800", "--kbit-upcast", "--largest", "none", "--no-changes"]) == 1
    assert "DOES NOT FIT: out of memory in" in capsys.readouterr().out


def test_the_command_writes_json_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    figure = tmp_path / "step.svg"
    assert main(_command("--card", "l4", "--largest", "none", "--json", "--timeline", str(figure))) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["card"]["fits"] is True
    assert data["peak"]["allocated"] == max(phase["peak_allocated"] for phase in data["phases"])
    root = ElementTree.fromstring(figure.read_text(encoding="utf-8"))
    words = " ".join(root.itertext())
    for expected in ("one training step", "L4: 21.45 GiB for the allocator", "weights", "backward"):
        assert expected in words


def test_a_timeline_without_matplotlib_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_qvl.figures.find_spec", lambda _: None)
    monkeypatch.delattr("pytest_qvl.vram.forecast.run.make_forecaster")
    assert main(_command("--timeline", str(tmp_path / "step.svg"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "error: --timeline draws a figure, and matplotlib is not installed: pip install 'matplotlib>=3.9'"
    )


@pytest.mark.slow
def test_the_committed_figure_is_that_of_the_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(bnb.functional.name2qmap, "dynamic", raising=False)  # as in a process of its own
    svg = (Path(__file__).parents[2] / "docs" / "forecast.svg").read_text(encoding="utf-8")
    assert drawn_digest(svg) == digest_of(drawn(forecast("qwen2.5-vl-7b", card="t4"))), "run python tools/make_pages.py"


@pytest.mark.parametrize(
    "options",
    [
        ("--card", "t5"),
        ("--lora-r", "-1"),
        ("--image", "0x0"),
        ("--timeline", "step.png"),
        ("--timeline", "step.svg", "--lora-r", "0"),
    ],
)
def test_the_command_refuses_nonsense_with_code_2(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_command(*options)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("image", ["10", "10x", "10x10x10", "-1x5", "axb"])
def test_the_command_refuses_malformed_sizes(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["forecast", f"--image={image}"])
    assert left.value.code == 2
    assert "is not a size like 1024x768" in capsys.readouterr().err


def test_the_command_forecasts_a_video(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["forecast", "--model", EMBEDDED, "--tokens", "20", "--video", "5x56x84", "4x56x56"]
    assert main([*command, "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["request"]["samples"]
    assert sample == {"images": [], "tokens": 20, "videos": [[5, 56, 84], [4, 56, 56]]}
    assert main([*command, "--image", "56x56", "--batch", "2"]) == 0
    assert (
        "batch 2, images 1 x 56x56, video of 5 frames of 56x84, video of 4 frames of 56x56: 30 visual + 20 text"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("video", ["10", "10x10", "axbxc"])
def test_the_command_refuses_what_is_no_video(video: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["forecast", "--model", EMBEDDED, "--video", video])
    assert f"{video!r} is no video like 16x364x644" in capsys.readouterr().err
