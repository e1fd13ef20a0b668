"""Batches of videos: how they are made, healthy models of every family, and damage that only videos show."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from PIL import Image

from pytest_qvl.checks import batch as judge_batch
from pytest_qvl.checks import causality, decode_positions, feature_scatter, mrope_positions, placeholder_counts
from pytest_qvl.checks.batches.findings import findings_of
from pytest_qvl.checks.support.placeholders import validate_batch
from pytest_qvl.evidence import CannotJudge, CheckFailed, InputError
from pytest_qvl.faults.case import Case, apply, healthy_case
from pytest_qvl.faults.catalogue import catalogue
from pytest_qvl.faults.matrix.panel import judge
from pytest_qvl.faults.matrix.random_models import RANDOM_FAMILIES, random_model
from pytest_qvl.faults.requirements import unmet
from pytest_qvl.faults.tools import attribute
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.processors import has_torchvision
from pytest_qvl.models.sources.synthetic_processor import synthetic_processor
from pytest_qvl.releases import is_before
from pytest_qvl.samples import Clip, clip_batch, scene_clips

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.samples.batch import PaddingSide

CELL = 84
FAULTS = [name for name, fault in catalogue().items() if fault.family == "videos"]
CHECKS = (placeholder_counts, feature_scatter, mrope_positions)


@pytest.fixture(scope="module", params=RANDOM_FAMILIES)
def pair(processor: Any, request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A random model of a family, and a processor for it."""
    model = random_model(request.param, seed=0, dtype=torch.float32, quantization_config=None)
    with attribute(processor.image_processor, "patch_size", model.config.vision_config.patch_size):
        yield model, processor


def batch_of(pair: tuple[Any, Any], side: PaddingSide = "left", clips: list[Clip] | None = None) -> Any:
    model, processor = pair
    clips = [clip.noise(0) for clip in scene_clips(0, cell=CELL)] if clips is None else clips
    return clip_batch(processor, clips, time=FAMILIES[model.config.model_type].video_time, padding_side=side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_family_is_healthy(pair: tuple[Any, Any], side: PaddingSide) -> None:
    model, batch = pair[0], batch_of(pair, side)
    for check in CHECKS:
        assert check(model, batch).ok
    assert validate_batch(model, batch) == []
    if side == "left":
        assert decode_positions(model, batch, steps=2).ok


def test_a_family_without_its_time_of_videos_is_red(pair: tuple[Any, Any]) -> None:
    model, batch = pair[0], batch_of(pair)
    if "second_per_grid_ts" not in batch:
        pytest.skip("only Qwen2.5-VL reads seconds")
    seconds = batch["second_per_grid_ts"]
    for given in (seconds.tolist(), list(seconds), seconds.numpy(), list(seconds.numpy())):
        evidence = mrope_positions(model, {**batch, "second_per_grid_ts": given})
        assert not evidence.notes, "whoever collates them, the model reads them"
    core = anatomy(model).core
    own = core.get_rope_index
    core.get_rope_index = lambda *args, **kwargs: own(*args, **{**kwargs, "second_per_grid_ts": None})
    try:
        with pytest.raises(CheckFailed, match=r"\(video 0, visual token \d+\): t is \d+, should be \d+"):
            mrope_positions(model, batch)
    finally:
        del core.get_rope_index


@pytest.mark.parametrize(
    ("seconds", "right"),
    [
        # huggingface/transformers#48669: a whole number of seconds up to 5.17.
        pytest.param(
            0.5, is_before("transformers", "4.52") or not is_before("transformers", "5.18"), id="half seconds"
        ),
        # docs/upstream/video-positions.md: text behind a video that is longer than its frames are wide.
        pytest.param(9.0, is_before("transformers", "5.3"), id="a long one"),
    ],
)
def test_what_releases_get_wrong_is_seen(pair: tuple[Any, Any], *, seconds: float, right: bool) -> None:
    model = pair[0]
    if FAMILIES[model.config.model_type].video_time != "seconds":
        pytest.skip("only Qwen2.5-VL lays frames out by seconds")
    clip = scene_clips(0, cell=CELL)[0]
    batch = batch_of(pair, clips=[replace(clip, seconds=seconds).noise(0)])
    if right:
        assert mrope_positions(model, batch).ok
        return
    with pytest.raises(CheckFailed, match=r": t is \d+, should be \d+"):
        mrope_positions(model, batch)


def test_what_is_wrong_between_placeholders_and_videos(pair: tuple[Any, Any]) -> None:
    model, batch = pair[0], batch_of(pair)
    places = (batch["input_ids"] == model.config.video_token_id).nonzero()
    fewer = batch["input_ids"].clone()
    fewer[tuple(places[3])] = fewer[0, -1]
    broken = {
        "fewer": ({**batch, "input_ids": fewer}, "placeholders, but grid"),
        "lost": ({n: v for n, v in batch.items() if "video" not in n}, "but no pixel_values_videos"),
        "no grids": ({n: v for n, v in batch.items() if n != "video_grid_thw"}, "there is no video_grid_thw"),
        "black": ({**batch, "pixel_values_videos": batch["pixel_values_videos"].to(torch.uint8)}, "_videos are uint8"),
        "hidden": ({**batch, "attention_mask": batch["attention_mask"].clone()}, "that the attention_mask hides"),
    }
    broken["hidden"][0]["attention_mask"][tuple(places[0])] = 0
    if "mm_token_type_ids" in batch:
        types = batch["mm_token_type_ids"].clamp(max=1)
        broken["types"] = ({**batch, "mm_token_type_ids": types}, "mm_token_type_ids is 1: the types are wrong")
    if "second_per_grid_ts" in batch:
        for seconds in ([1.0], [1.0, 2.0, 3.0], [1.0, 0.0]):
            broken[str(seconds)] = ({**batch, "second_per_grid_ts": seconds}, f"second_per_grid_ts are {seconds} for 2")
    for name, (given, words) in broken.items():
        assert any(words in problem for problem in validate_batch(model, given)), name
        for check in CHECKS:
            with pytest.raises((CheckFailed, InputError), match=re.escape(words)):
                check(model, given)


@pytest.mark.parametrize("noun", ["image", "video"])
def test_pixels_and_grids_that_hold_nothing(pair: tuple[Any, Any], noun: str) -> None:
    model, processor = pair
    pixels, grids = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }[noun]
    whole = batch_of(pair)
    empty, none = whole[pixels][:0], whole[grids][:0]
    text = batch_of(pair, clips=[Clip((), (), "Say red.", "red")])
    with pytest.raises((ValueError, RuntimeError, IndexError)), torch.no_grad():
        model(**text, **{pixels: empty, grids: none})
    of_nothing = f"leave out both {pixels} and {grids}"
    broken: list[tuple[dict[str, Any], str]] = [
        ({**text, pixels: empty, grids: none}, of_nothing),
        ({**text, pixels: empty}, of_nothing),
        ({**whole, pixels: empty, grids: none}, of_nothing),
        ({**whole, pixels: empty}, of_nothing),
        ({**whole, grids: whole[grids] * torch.tensor([0, 1, 1])}, f"{grids} of {noun} 0 is 0x"),
        ({**whole, grids: whole[grids] * 0}, f"{grids} of {noun} 0 is 0x0x0"),
    ]
    for given, words in broken:
        assert [problem for problem in validate_batch(model, given) if words in problem] == validate_batch(model, given)
        for check in (*CHECKS, decode_positions):
            with pytest.raises((CheckFailed, InputError), match=re.escape(words)):
                check(model, given)
        with pytest.raises(CheckFailed) as caught:
            judge_batch(given, processor, model)
        said = [each for each in findings_of(caught.value.evidence) if each.kind in ("pixels-missing", "grids-apart")]
        assert len(said) == 1
        assert words in f"{said[0].found}: {said[0].cause}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda grids: grids.float(), "is float32, and counts"),
        (lambda grids: grids[None], r"has shape (1, 2, 3) where the processor makes a row for each image or video"),
        (lambda grids: grids[0], "has shape (3,)"),
    ],
)
def test_grids_that_are_none(pair: tuple[Any, Any], change: Any, words: str) -> None:
    batch = batch_of(pair)
    batch["video_grid_thw"] = change(batch["video_grid_thw"])
    for check in (*CHECKS, decode_positions):
        with pytest.raises(InputError, match=re.escape(f"{check.__name__}: batch['video_grid_thw'] {words}")):
            check(pair[0], batch)


def test_a_frame_is_to_the_tower_what_an_image_is(pair: tuple[Any, Any]) -> None:
    """Nothing but the grid of a video tells the tower that frames belong together: positions that go on are seen."""
    model, batch = pair[0], batch_of(pair)
    parts = anatomy(model)
    figure = "visual tokens of videos that depend on more than their frame"
    assert figure in {each.name for each in feature_scatter(model, batch).figures}
    images = [Clip(clip.frames[:1], (), "What?", "red") for clip in scene_clips(0, cell=CELL)[:2]]
    judged = feature_scatter(model, batch_of(pair, clips=[clip.noise(0) for clip in images]))
    assert figure not in {each.name for each in judged.figures}
    own = type(parts.vision_tower).forward

    def onward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        grids = kwargs.pop("grid_thw") if "grid_thw" in kwargs else args[0]
        joined = torch.stack([torch.ones_like(grids[:, 0]), grids[:, 0] * grids[:, 1], grids[:, 2]], dim=1)
        return own(parts.vision_tower, hidden, grid_thw=joined, **kwargs)

    with (
        attribute(parts.vision_tower, "forward", onward),
        pytest.raises(CheckFailed, match=r"something else of visual token \d+ of row 0, video"),
    ):
        feature_scatter(model, batch)


def test_two_equal_frames_are_not_judged_and_hide_no_finding(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    clip = scene_clips(0, cell=CELL)[0].noise(0)
    still = batch_of(pair, clips=[replace(clip, frames=clip.frames[:1] * 4)])
    with pytest.raises(CannotJudge, match=r"which no two frames are alike, such as clip\.noise\(seed\)"):
        feature_scatter(model, still)
    core = anatomy(model).core
    own = core.get_video_features

    def first_only(pixels: torch.Tensor, grids: torch.Tensor, **kwargs: Any) -> Any:
        frame = int(grids[0, 1:].prod())
        return own(torch.cat([pixels[:frame], pixels[:frame], pixels[2 * frame :]]), grids, **kwargs)

    with attribute(core, "get_video_features", first_only), pytest.raises(CheckFailed, match="receives other pixels"):
        feature_scatter(model, batch_of(pair, clips=[clip]))


def test_a_check_of_images_says_so(pair: tuple[Any, Any]) -> None:
    with pytest.raises(CannotJudge, match="not judged: video"):
        causality(pair[0], batch_of(pair))


def test_frames_are_joined_two_by_two() -> None:
    processor = synthetic_processor("qwen2.5-vl-7b")
    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0)]
    frames = tuple(Image.new("RGB", (112, 56), colour) for colour in colours)
    batch = clip_batch(processor, [Clip((), frames, "What?", "red")], time="patches")
    assert batch["video_grid_thw"].tolist() == [[2, 4, 8]]
    first, second = batch["pixel_values_videos"].view(2, 32, 3, 2, 14 * 14).mean(dim=(1, 4))  # channel, frame
    low, high = first[0]
    assert low < -1 and high > 1
    assert torch.equal(second[:, 0], second[:, 1]), "the last frame is repeated"
    assert second[0, 0] > 1 > -1 > second[1, 0]
    with pytest.raises(InputError, match="one size, got 112x56, 56x56"):
        clip_batch(processor, [Clip((), (frames[0], frames[0].resize((56, 56))), "What?", "red")], time="patches")
    with pytest.raises(InputError, match="at least one clip"):
        clip_batch(processor, [], time="patches")


@pytest.mark.parametrize(
    ("clip", "time", "words"),
    [
        ({}, "frames", "time is 'frames', expected one of 'patches', 'seconds', 'words'"),
        ({"question": "What <|video_pad|>?"}, "patches", r"holds <\|video_pad\|>; the chat template writes"),
        ({"seconds": 0.0}, "seconds", r"has 0\.0 seconds from one patch to the next"),
        ({"seconds": float("nan")}, "seconds", "has nan seconds"),
    ],
)
def test_a_clip_that_makes_no_batch(processor: Any, clip: dict[str, Any], time: Any, words: str) -> None:
    given = Clip((), (Image.new("RGB", (112, 56)),), "What?", "red")
    with pytest.raises(InputError, match=words):
        clip_batch(processor, [replace(given, **clip)], time=time)
    with pytest.raises(InputError, match="frames must be at least 1, got 0"):
        scene_clips(0, cell=CELL, frames=0)


@pytest.mark.skipif(not has_torchvision(), reason="needs torchvision: the video processors of Transformers do")
@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_a_video_processor_makes_the_same(name: str) -> None:
    processor = synthetic_processor(name)
    clip = replace(scene_clips(0, cell=CELL)[0], seconds=1.0)
    frames = torch.stack([torch.from_numpy(numpy.array(frame)).permute(2, 0, 1) for frame in clip.frames])
    size = processor.image_processor.size
    limits = {"shortest_edge": size["shortest_edge"], "longest_edge": size["longest_edge"]}
    made = processor.video_processor(videos=[frames], return_tensors="pt", do_sample_frames=False, size=limits)
    ours = clip_batch(processor, [clip], time="patches")
    assert torch.equal(made["video_grid_thw"], ours["video_grid_thw"])
    assert (made["pixel_values_videos"] - ours["pixel_values_videos"]).abs().max() < 0.02


@pytest.fixture(scope="module")
def case() -> Case:
    return healthy_case()


@pytest.mark.parametrize("name", FAULTS)
def test_damage_is_seen(case: Case, name: str) -> None:
    fault = catalogue()[name]
    if why := unmet(fault.requires, fault.check, case):
        pytest.skip(why)
    with apply(name, case) as damaged:
        verdict = judge(damaged, fault.check)
    assert verdict.noticed
    assert all(word in verdict.message for word in fault.words()), verdict.message
