"""The position oracle against hand-worked examples and Transformers; the checks against damaged models."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
import transformers

from pytest_qvl.checks.positions import decode_positions, mrope_positions, position_state
from pytest_qvl.checks.support.mrope import VisionIds, mrope_oracle
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.taps import positions_changed, tapped
from pytest_qvl.samples import make_batch, scenes

TEXT, IMAGE, VIDEO, START, END = 5, 90, 91, 92, 93
IDS = VisionIds(image=IMAGE, video=VIDEO)
SKILLS = ("nth_colour", "text", "count", "nth_shape")


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(quantized=False)


def batch_of(processor: Any, side: str = "left", seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    return make_batch(processor, scenes(seed, 1, SKILLS), padding_side=side, **options)


def needs_type_ids(model: Any) -> bool:
    return "mm_token_type_ids" in inspect.signature(anatomy(model).core.get_rope_index).parameters


# The oracle, worked by hand


def test_text_counts_up_on_all_axes() -> None:
    ids = torch.full((1, 3), TEXT)
    assert mrope_oracle(ids, None, None, IDS, 2).tolist() == [[[0, 1, 2]]] * 3


def test_picture_spans_rows_and_columns_and_text_goes_on_after_the_larger_side() -> None:
    ids = torch.tensor([[TEXT, START, *[IMAGE] * 6, END, TEXT]])  # 4 x 6 patches: 2 rows of 3 visual tokens
    t, h, w = mrope_oracle(ids, None, [(1, 4, 6)], IDS, 2)[:, 0].tolist()
    assert t == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert h == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert w == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side: str) -> None:
    row, mask = [TEXT, IMAGE, IMAGE, TEXT], [1, 1, 1, 1]
    padded = {"left": ([0, 0, *row], [0, 0, *mask]), "right": ([*row, 0, 0], [*mask, 0, 0])}[side]
    ids, attention = (torch.tensor([values]) for values in padded)
    positions = mrope_oracle(ids, attention, [(1, 4, 2)], IDS, 2)
    assert positions[:, 0, attention[0].bool()].tolist() == [[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]]
    assert not positions[:, 0, ~attention[0].bool()].any()


def test_pictures_are_dealt_out_over_rows_in_reading_order() -> None:
    ids = torch.tensor(
        [
            [TEXT, IMAGE, TEXT, IMAGE, IMAGE, TEXT],
            [TEXT] * 6,
            [TEXT, IMAGE, IMAGE, IMAGE, IMAGE, TEXT],
        ]
    )
    positions = mrope_oracle(ids, None, torch.tensor([(1, 2, 2), (1, 2, 4), (1, 4, 4)]), IDS, 2)
    assert positions[:, 0].tolist() == [[0, 1, 2, 3, 3, 5], [0, 1, 2, 3, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert positions[:, 1].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert positions[:, 2].tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]


@pytest.mark.parametrize(
    ("seconds", "ids_per_second", "temporal", "following"),
    [
        (2.0, 25.0, [0, 50, 100], 101),  # the example in Transformers' own documentation
        (0.5, 2.0, [0, 1, 2], 3),  # truncated to whole seconds, time would stand still (transformers#48669)
        (0.3, 2.0, [0, 0, 1], 2),
        (0.5 - 2**-27, 2.0, [0, 1, 2], 3),  # a float32 half, as far as float32 tells
        (0.5 - 2**-25, 2.0, [0, 0, 1], 2),  # the float32 below it
        (1.0, None, [0, 1, 2], 3),  # Qwen2-VL counts temporal patches
    ],
)
def test_video_time_is_absolute(
    seconds: float, ids_per_second: float | None, temporal: list[int], following: int
) -> None:
    ids = torch.tensor([[*[VIDEO] * 12, TEXT]])
    positions = mrope_oracle(
        ids,
        None,
        None,
        IDS,
        2,
        video_grids=[(3, 4, 4)],
        seconds_per_grid=[seconds],
        tokens_per_second=ids_per_second,
    )
    t, h, w = positions[:, 0].tolist()
    assert t == [time for time in temporal for _ in range(4)] + [following]
    assert h == [0, 0, 1, 1] * 3 + [following]
    assert w == [0, 1, 0, 1] * 3 + [following]


@pytest.mark.parametrize("fps", [25, 1.2, 24, 2 / 0.7, 29.97, 3.75])
@pytest.mark.parametrize("listed", [False, True])
def test_video_time_at_any_frame_rate(fps: float, listed: bool) -> None:
    """Whole seconds are whole: 0.08 s in float32 are less, and 25 of them two seconds (Transformers from 5.18 on)."""
    seconds: Any = 2 / fps if listed else torch.tensor(2 / fps)
    ids = torch.tensor([[VIDEO] * 60])
    ours = mrope_oracle(
        ids, None, None, IDS, 2, video_grids=[(60, 2, 2)], seconds_per_grid=[float(seconds)], tokens_per_second=2.0
    )
    assert ours[0, 0].tolist() == (torch.arange(60) * (2 * seconds)).long().tolist()


@pytest.mark.parametrize(
    ("row", "grids", "message"),
    [
        ([TEXT, IMAGE], [], r"row 0, token 1 .*all 0 image grids are used up"),
        ([TEXT, IMAGE, TEXT], [(1, 4, 2)], r"row 0, token 1 .*grid 1x4x2 makes 2 visual tokens"),
        ([TEXT, IMAGE], [(1, 2, 2), (1, 2, 2)], r"image 1 has a grid but no placeholders"),
    ],
)
def test_placeholders_that_fit_no_grid_are_refused(
    row: list[int], grids: list[tuple[int, int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_oracle(torch.tensor([row]), None, grids, IDS, 2)


# The oracle against Transformers


def random_rows(rng: random.Random, video: bool) -> tuple[list[list[int]], list[Any], list[Any], list[int]]:
    """Rows of text, pictures and videos as chat templates arrange them, grids in patches, seconds."""
    rows: list[list[int]] = []
    pictures: list[Any] = []
    videos: list[Any] = []
    seconds: list[int] = []
    for _ in range(rng.randint(1, 4)):
        row = [TEXT] * rng.randint(1, 6)
        for _ in range(rng.randint(0, 3)):
            height, width = 2 * rng.randint(1, 6), 2 * rng.randint(1, 6)
            if video and rng.random() < 0.5:
                # Transformers 5.17 goes on after a video's larger side and forgets its time, unlike the
                # papers and 4.57; they agree while the time does not outlast the side.
                frames = rng.randint(1, max(height, width) // 2)
                videos.append((frames, height, width))
                seconds.append(1)
                kind, count = VIDEO, frames * height * width // 4
            else:
                pictures.append((1, height, width))
                kind, count = IMAGE, height * width // 4
            row += [START, *[kind] * count, END, *[TEXT] * rng.randint(0, 4)]
        rows.append(row)
    return rows, pictures, videos, seconds


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_oracle_agrees_with_transformers_on_random_batches(model: Any, side: str, video: bool) -> None:
    core = anatomy(model).core
    config = model.config
    stand_ins = {
        IMAGE: config.image_token_id,
        VIDEO: config.video_token_id,
        START: config.vision_start_token_id,
        END: config.vision_end_token_id,
    }
    rng = random.Random(f"{side} {video}")
    vision = config.vision_config
    before, vision.tokens_per_second = vision.tokens_per_second, 1
    try:
        for _ in range(40):
            rows, pictures, videos, seconds = random_rows(rng, video)
            length = max(map(len, rows)) + rng.randint(0, 3)
            ids = torch.zeros(len(rows), length, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for number, row in enumerate(rows):
                where = slice(length - len(row), None) if side == "left" else slice(len(row))
                ids[number, where] = torch.tensor([stand_ins.get(token, token) for token in row])
                mask[number, where] = 1
            given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
            if pictures:
                given["image_grid_thw"] = torch.tensor(pictures)
            if videos:
                given["video_grid_thw"] = torch.tensor(videos)
                given["second_per_grid_ts"] = torch.tensor(seconds)
            if needs_type_ids(model):
                is_video = (ids == config.video_token_id).int()
                given["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * is_video
            theirs, _ = core.get_rope_index(**given)
            ours = mrope_oracle(
                ids,
                mask,
                pictures,
                VisionIds(config.image_token_id, config.video_token_id),
                2,
                video_grids=videos,
                seconds_per_grid=seconds,
                tokens_per_second=1,
            )
            attended = mask.bool()
            assert torch.equal(ours[:, attended], theirs[:, attended]), (rows, pictures, videos)
    finally:
        vision.tokens_per_second = before


# Healthy models


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow), "float32"])
def test_healthy_model_keeps_every_position_promise(fresh_model: Any, processor: Any, dtype: str) -> None:
    model = fresh_model(dtype=dtype, lora={"init_lora_weights": False})
    for side in ("left", "right"):
        assert mrope_positions(model, batch_of(processor, side)).ok
        assert position_state(model, batch_of(processor, side)).ok
    evidence = decode_positions(model, batch_of(processor, "left"))
    assert {figure.name: figure.value for figure in evidence.figures}["decode steps"] == 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_train_mode_and_other_scenes_are_no_matter(model: Any, processor: Any, side: str, seed: int) -> None:
    batch = batch_of(processor, side, seed, answers=True)
    evidence = mrope_positions(model, batch, training=True)
    compared = {figure.name: figure.value for figure in evidence.figures}["position ids compared"]
    assert compared == 3 * int(batch["attention_mask"].sum())


def test_a_single_row_without_padding(model: Any, processor: Any) -> None:
    batch = make_batch(processor, scenes(1, 1, ("count",)))
    assert mrope_positions(model, batch).ok
    assert decode_positions(model, batch, steps=1).ok
    assert position_state(model, batch).ok


def test_float32_holds_every_id(model: Any, processor: Any) -> None:
    batch = batch_of(processor)
    with positions_changed(anatomy(model), lambda positions: positions.float()):
        assert mrope_positions(model, batch).ok
        assert decode_positions(model, batch).ok


def test_a_row_shifted_by_a_constant_is_equivalent(model: Any, processor: Any) -> None:
    def shifted(positions: torch.Tensor) -> torch.Tensor:
        positions = positions.clone()
        positions[:, 0] += 7
        return positions

    batch = batch_of(processor)
    with positions_changed(anatomy(model), shifted):
        assert mrope_positions(model, batch).ok
        assert decode_positions(model, batch).ok


def test_deltas_that_are_kept_for_later_steps_are_held(model: Any, processor: Any, monkeypatch: Any) -> None:
    """generate() makes no use of them since Transformers 5.3: its own ids are right."""
    core = anatomy(model).core
    own, batch = core.get_rope_index, batch_of(processor)
    assert decode_positions(model, batch, steps=1).ok

    def off(*args: Any, **kwargs: Any) -> Any:
        positions, deltas = own(*args, **kwargs)
        return positions, torch.cat([deltas[:1], deltas[1:] - 2])

    monkeypatch.setattr(core, "get_rope_index", off)
    with pytest.raises(CheckFailed, match=r"rope_deltas of row 1 is -2, should be 0 .*; 3 of 4 rows are wrong"):
        decode_positions(model, batch, steps=1)


@pytest.mark.parametrize("check", [mrope_positions, decode_positions, position_state])
def test_the_model_is_left_as_it_was(model: Any, processor: Any, check: Any) -> None:
    parts = anatomy(model)
    parts.core.rope_deltas = stale = torch.tensor([[3]])
    config = model.generation_config
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.random.get_rng_state()
    check(model, batch_of(processor))
    assert parts.core.rope_deltas is stale
    assert model.generation_config.to_dict() == config.to_dict()
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    parts.core.rope_deltas = None


# Damaged models and batches


def test_lost_type_ids_fall_back_to_1d_and_are_named(model: Any, processor: Any) -> None:
    if not needs_type_ids(model):
        pytest.skip("this release of Transformers needs no mm_token_type_ids")
    batch = batch_of(processor)
    del batch["mm_token_type_ids"]
    message = r"(?s)row 0, token \d+ \(image 0, visual token 1\): t is .*plain 1-D.*no mm_token_type_ids"
    for check in (mrope_positions, decode_positions):
        with pytest.raises(CheckFailed, match=message):
            check(model, batch)
    # Wrong from the start is not wrong because of an earlier call.
    assert position_state(model, batch).ok


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_image_positions_off_by_one_on_one_axis(model: Any, processor: Any, axis: int) -> None:
    parts, batch = anatomy(model), batch_of(processor)
    image = batch["input_ids"] == parts.image_token_id

    def moved(positions: torch.Tensor) -> torch.Tensor:
        positions = positions.clone()
        if positions.shape[-1] == image.shape[1]:
            positions[axis][image] += 1
        return positions

    with positions_changed(parts, moved):
        name = "thw"[axis]
        where = r"row 0, token \d+ \(image 0, visual token 0\)"
        message = rf"{where}: {name} is \d+, should be \d+; {image.sum()} tokens"
        with pytest.raises(CheckFailed, match=message) as failure:
            mrope_positions(model, batch)
        assert f"wrong position ids {image.sum()} (== 0)" in str(failure.value)
        with pytest.raises(CheckFailed, match=message):
            decode_positions(model, batch)


def test_one_visual_token_off_by_one(model: Any, processor: Any) -> None:
    parts, batch = anatomy(model), batch_of(processor)
    row, token = (batch["input_ids"] == parts.image_token_id).nonzero()[-1].tolist()

    def moved(positions: torch.Tensor) -> torch.Tensor:
        positions = positions.clone()
        positions[2, row, token] -= 1
        return positions

    with (
        positions_changed(parts, moved),
        pytest.raises(
            CheckFailed,
            match=rf"row {row}, token {token} \(image \d, visual token \d+\): w is .* 1 tokens in 1 of",
        ),
    ):
        mrope_positions(model, batch)


def test_all_tokens_off_by_one_on_one_axis_though_no_logit_can_tell(model: Any, processor: Any) -> None:
    def moved(positions: torch.Tensor) -> torch.Tensor:
        positions = positions.clone()
        positions[1] += 1
        return positions

    with (
        positions_changed(anatomy(model), moved),
        pytest.raises(CheckFailed, match=r"row 0, token \d+ \(text\): h is 1, should be 0; .* in 4 of 4 rows"),
    ):
        mrope_positions(model, batch_of(processor))


@pytest.mark.parametrize("back", [True, False], ids=["cast back", "left in it"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_ids_rounded_to_a_narrow_dtype_are_named(
    model: Any, processor: Any, dtype: torch.dtype, most: int, back: bool
) -> None:
    """Rows are placed so that the last id which the dtype counts exactly is passed while they last."""
    batch = batch_of(processor)

    def rounded(positions: torch.Tensor) -> torch.Tensor:
        narrow = (positions + most - 8).to(dtype)
        return narrow.to(positions.dtype) if back else narrow

    words = f"every id is the right one rounded to {dtype}, which counts without gaps up to {most} only"
    with positions_changed(anatomy(model), rounded):
        for check in (mrope_positions, decode_positions):
            with pytest.raises(CheckFailed, match=words.replace("torch.", "")):
                check(model, batch)


def test_padding_counted_while_decoding(model: Any, processor: Any) -> None:
    """Transformers 4.54 to 4.56.2: left-padded rows only, from the first step after the prefill on."""
    batch = batch_of(processor)
    padding = (batch["attention_mask"] == 0).sum(dim=1)
    first = int(padding.nonzero()[0])

    def counted(positions: torch.Tensor) -> torch.Tensor:
        return positions + padding[None, :, None] if positions.shape[-1] == 1 else positions

    with positions_changed(anatomy(model), counted):
        assert mrope_positions(model, batch).ok
        padded = int(padding[first])
        message = (
            rf"decode step 1, row {first} \({padded} padding tokens on the left\): "
            rf"t is \d+, should be \d+ \(\+{padded}\); {int((padding > 0).sum())} of 4 rows"
        )
        with pytest.raises(CheckFailed, match=message):
            decode_positions(model, batch)


def test_a_later_decode_step_on_one_axis(model: Any, processor: Any) -> None:
    steps = 0

    def late(positions: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += positions.shape[-1] == 1
        if steps == 3:
            positions = positions.clone()
            positions[2, 1] += 1
        return positions

    with (
        positions_changed(anatomy(model), late),
        pytest.raises(CheckFailed, match=r"decode step 3, row 1 .*: w is \d+, should be \d+ \(\+1\); 1 of 4 rows"),
    ):
        decode_positions(model, batch_of(processor))


def test_right_padded_generation_is_named(model: Any, processor: Any) -> None:
    """Transformers 5 goes on from the last column, which is padding; 4.57 from the row's last position."""
    text = ""
    try:
        decode_positions(model, batch_of(processor, "right"))
    except CheckFailed as failure:
        text = str(failure)
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert "padding tokens on the right" in text
        assert "generate() needs padding on the left" in text
    else:
        assert not text


def test_positions_from_an_earlier_call(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to Transformers 4.48 a forward with input_ids trusted the deltas that an earlier call had left."""
    parts = anatomy(model)
    forward = parts.core.forward

    def trusting(*args: Any, **kwargs: Any) -> Any:
        ids, deltas = kwargs.get("input_ids"), parts.core.rope_deltas
        if deltas is not None and ids is not None and kwargs.get("position_ids") is None:
            plain = torch.arange(ids.shape[1]) + deltas[:1]
            kwargs["position_ids"] = plain.expand(3, *ids.shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(parts.core, "forward", trusting)
    message = r"forward on images after generate\(\) on text only: row 0, token \d+ .*plain 1-D"
    with pytest.raises(CheckFailed, match=message):
        position_state(model, batch_of(processor))


def test_a_crash_on_state_of_another_batch_size(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.2 and 5.3: generate() on two rows, then a forward on one (transformers#44873)."""
    parts = anatomy(model)
    forward = parts.core.forward

    def trusting(*args: Any, **kwargs: Any) -> Any:
        ids, deltas = kwargs.get("input_ids"), parts.core.rope_deltas
        if ids is not None and deltas is not None and ids.shape[1] > 1 and len(deltas) != len(ids):
            raise RuntimeError("The size of tensor a (1) must match the size of tensor b (4)")
        return forward(*args, **kwargs)

    monkeypatch.setattr(parts.core, "forward", trusting)
    with pytest.raises(CheckFailed, match=r"forward on text only after generate\(\) on images crashed: The size"):
        position_state(model, batch_of(processor))


def test_positions_of_no_row_are_named_even_where_nothing_crashes(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers 5.2 and 5.3: four rows' deltas, repeated for one row, leave positions of no row at all."""
    parts = anatomy(model)
    rotary, right, left = parts.language_backbone.rotary_emb, [], [None]

    def note(*_: Any) -> None:
        left[0] = parts.core.rope_deltas  # 4.57 has overwritten it by the time of the rotary embedding

    def emptied(positions: torch.Tensor) -> torch.Tensor:
        deltas = left[0]
        right.append(positions)
        if deltas is None or len(deltas) <= positions.shape[1] or positions.shape[-1] == 1:
            return positions
        return positions + deltas.repeat_interleave(positions.shape[1] // len(deltas), dim=0)

    forward = rotary.forward  # some kernels multiply matrices without rows, and the forward goes through
    monkeypatch.setattr(rotary, "forward", lambda hidden, position_ids: forward(hidden, right.pop()))
    says = r"forward on text only after generate\(\) on images: prompt: .* position ids of shape \(3, 0, \d+\), should be \(3, 1, "
    hook = parts.core.register_forward_pre_hook(note)
    with positions_changed(parts, emptied), pytest.raises(CheckFailed, match=says) as failed:
        position_state(model, batch_of(processor))
    hook.remove()
    assert "state left by an earlier call breaks a later one" in str(failed.value)


def test_a_tap_sees_how_much_is_in_the_cache(model: Any, processor: Any) -> None:
    """Transformers 5.24 passes the cache under another name."""
    batch = batch_of(processor)
    with tapped(anatomy(model)) as tap:
        model.generate(**batch, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert [call.past_length for call in tap.language] == [0, batch["input_ids"].shape[1]]


# Inputs that are wrong or cannot decide


@pytest.mark.parametrize("check", [mrope_positions, decode_positions, position_state])
def test_malformed_and_undecidable_batches(model: Any, processor: Any, check: Any) -> None:
    with pytest.raises(CannotJudge, match="no image"):
        check(model, make_batch(processor, scenes(0, 1, ("text",))))
    batch = batch_of(processor)
    with pytest.raises(ValueError, match=r"malformed: .* no pixel_values"):
        check(model, {name: value for name, value in batch.items() if name != "pixel_values"})
    with pytest.raises(ValueError, match="input_ids of shape"):
        check(model, {})


@pytest.mark.parametrize("check", [decode_positions, position_state])
def test_no_step_decides_nothing(model: Any, processor: Any, check: Any) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        check(model, batch_of(processor), steps=0)
