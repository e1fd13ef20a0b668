"""What can be asked of a forecast: the fields of a request, what they decide, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.vram.forecast import Request, Sample
from pytest_qvl.vram.forecast.source import find_source
from pytest_qvl.vram.forecast.validation.predictions import Case

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, "bfloat16"),
        ({"trainer": "hf", "compute_dtype": "float16"}, "float16"),
        ({"trainer": "loop"}, None),
        ({"trainer": "loop", "kbit_upcast": True}, "bfloat16"),
        ({"trainer": "loop", "compute_dtype": "float16"}, "float16"),
        ({"trainer": "loop", "autocast": True}, "bfloat16"),
        ({"autocast": False}, None),
        ({"precision": "fp16"}, "float16"),
        ({"precision": "bf16-pure"}, None),
    ],
)
def test_autocast_is_what_the_trainer_and_the_precision_say(settings: dict[str, Any], dtype: str | None) -> None:
    assert Request(**settings).autocast_dtype == dtype


def test_a_trainer_leaves_the_vision_hook_and_a_loop_takes_it_off() -> None:
    assert Request().keeps_vision_hook
    assert not Request(gradient_checkpointing=False).keeps_vision_hook
    assert not Request(trainer="loop").keeps_vision_hook
    assert not Request(vision_hook=False).keeps_vision_hook


def test_samples_take_the_place_of_one_size_for_all() -> None:
    assert (
        Request(image=(56, 84), images=2, batch=3, tokens=9).batch_of_samples == (Sample(((56, 84), (56, 84)), 9),) * 3
    )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"accumulation": 0}, "accumulation is 0: it must be at least 1"),
        ({"evaluation": -1}, "evaluation is -1: it must be at least 0"),
        ({"trainer": "axolotl"}, "trainer is 'axolotl': known are hf, trl, unsloth, loop"),
        ({"precision": "fp8"}, "precision is 'fp8': known are None, bf16"),
        ({"precision": "bf16", "autocast": False}, "contradict each other"),
        ({"precision": "bf16-pure", "autocast": True}, "contradict each other"),
        ({"lora_targets": "vision"}, "lora_targets is 'vision': known are language, all-linear and a tuple"),
        ({"lora_targets": "(["}, "is no regular expression"),
        ({"lora_targets": ()}, "lora_targets is empty"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"base_bits": 3}, "base_bits is 3: known are 4, 8, 16"),
        ({"base_bits": 8, "use_dora": True}, "use_dora is True and base_bits is 8"),
        ({"base_bits": 8, "checkpoint": "nf4"}, "checkpoint is 'nf4' and base_bits is 8"),
        ({"base_bits": 16, "checkpoint": "nf4"}, "one saved in NF4 has 4 bits"),
        ({"compute_metrics": True}, "compute_metrics is True and evaluation is 0"),
        ({"max_length": "512"}, "max_length is '512': it must be a whole number"),
        ({"evaluation_batches": 9}, "evaluation_batches is 9 and evaluation is 0: say how many samples"),
        (
            {"preprocess_logits": "argmax", "evaluation": 2},
            "preprocess_logits is 'argmax' and compute_metrics is False",
        ),
        ({"preprocess_logits": "topk"}, "preprocess_logits is 'topk': known are , argmax"),
        ({"samples": (Sample(((0, 28),), 9),)}, "image 0x28 has no pixels"),
        ({"samples": (Sample(((28, 28),), 3),)}, "tokens is 3"),
        ({"samples": (Sample((), 9, ((0, 28, 28),)),)}, "video 0x28x28 has no pixels"),
        ({"samples": (Sample(((28, 28),), 5, ((2, 28, 28),)),)}, "tokens is 5: each of 1 images and 1 videos needs"),
    ],
)
def test_what_describes_no_run_is_refused_in_one_sentence(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        Request(**settings)
    assert "\n" not in str(refused.value)


def test_an_entry_of_an_earlier_release_was_a_loop() -> None:
    case = Case.from_dict({"request": {"image": [448, 448], "capability": [7, 5], "vision_hook": False}, "card": None})
    assert case.request == Request(image=(448, 448), capability=(7, 5), vision_hook=False, trainer="loop")


def test_a_scaler_is_there_for_float16() -> None:
    assert Request(precision="fp16").scales_loss
    assert Request(trainer="loop", compute_dtype="float16").scales_loss
    assert not Request().scales_loss
    assert not Request(precision="fp16-pure").scales_loss
    with pytest.raises(ValueError, match="GradScaler cannot unscale"):
        Request(trainer="trl", precision="fp16")


def test_a_video_is_cut_frame_by_frame_and_two_frames_are_one_step() -> None:
    source = find_source("qwen2.5-vl-7b")
    sample = Sample(((280, 140),), 40, ((5, 280, 140), (2, 56, 84)))
    assert source.grids(sample) == [(1, 20, 10), (3, 20, 10), (1, 4, 6)]
    assert source.lengths(sample, None) == (50 + 150 + 6, 40)
    with pytest.raises(ValueError, match="max_length is 210 and a sample has 206 visual tokens"):
        source.lengths(sample, 210)


def test_frames_of_qwen3_vl_stand_behind_their_times() -> None:
    """Each step in time: ``<``, digits, ``.``, a digit, `` seconds``, ``>`` and two markers."""
    source = find_source("qwen3-vl-2b")
    sample = Sample((), 40, ((25, 128, 192),))
    assert source.grids(sample) == [(13, 8, 12)]
    assert source.lengths(sample, None) == (13 * 24, 40 + 10 * 8 + 3 * 9)
    with pytest.raises(ValueError, match="max_length is 400 and a sample has 312 visual tokens"):
        source.lengths(sample, 400)
    with pytest.raises(ValueError, match="video 1x64x64: the processor refuses fewer than 2 frames"):
        source.grids(Sample((), 40, ((1, 64, 64),)))


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("video", [(2, 20, 300), (16, 1080, 1920), (7, 720, 1280), (768, 480, 854), (4, 33, 33)])
def test_all_frames_of_qwen3_vl_share_their_pixels(video: tuple[int, int, int], capped: bool) -> None:
    """Transformers' own arithmetic, with the sizes of the released checkpoints and the cap of its processor."""
    module = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    frames, height, width = video
    least, most = 4096, 25165824
    if capped:
        most = max(min(768 * 32 * 32, most // frames), int(least * 1.05)) * frames
    rows, columns = module.smart_resize(frames, height, width, 2, 32, least, most)
    sizes = replace(find_source("qwen3-vl-8b").videos, capped=capped)
    assert sizes.grid(*video) == (-(-frames // 2), rows // 16, columns // 16)


def test_a_folder_says_how_its_videos_are_cut(tmp_path: Path) -> None:
    """Of 600 frames each may have 128,000 * 0.9 * 28 * 28 * 2 / 600 pixels where the folder asks for the cap."""
    (tmp_path / "config.json").write_text(find_source("qwen2.5-vl-7b").config.to_json_string(use_diff=False))
    assert find_source(str(tmp_path)).grids(Sample((), 9, ((600, 700, 700),)))[0][1:] == (50, 50)
    settings = {"size": {"shortest_edge": 3136, "longest_edge": 9999999}, "cap_pixels_per_frame": True}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    assert find_source(str(tmp_path)).grids(Sample((), 9, ((600, 700, 700),)))[0][1:] == (38, 38)
    assert find_source(str(tmp_path)).grids(Sample((), 9, ((4, 700, 700),)))[0][1:] == (50, 50)
