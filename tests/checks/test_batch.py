"""batch: what any collator made is judged by row and token; healthy batches of every kind pass."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoModel

from pytest_qvl import checks
from pytest_qvl.checks.batches.findings import KINDS, findings_of, unjudged_of
from pytest_qvl.checks.batches.rows import some_rows
from pytest_qvl.checks.support.packing import pack
from pytest_qvl.checks.support.placeholders import HALF_A_LEVEL, of_one_colour
from pytest_qvl.evidence import CannotJudge, CheckFailed, InputError
from pytest_qvl.models.sources.model_source import parse_model
from pytest_qvl.models.sources.released import released_config
from pytest_qvl.models.sources.synthetic_processor import processor_for
from pytest_qvl.releases import is_before
from pytest_qvl.samples import Sample, clip_batch, make_batch, scene_clips, scenes
from pytest_qvl.suite import test_data

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Batch = dict[str, torch.Tensor]
SKILLS = ("colour", "nth_colour", "text", "side")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """One image, three images, none, one of another size."""
    made = {sample.skill: sample for sample in scenes(0, 1, cell=14)}
    return [made[skill] for skill in SKILLS]


@pytest.fixture
def batch(processor: Any, samples: list[Sample]) -> Batch:
    return make_batch(processor, samples, padding_side="right", answers=True)


def kinds(batch: Any, processor: Any, config: Any, samples: Any = None, **options: Any) -> list[str]:
    """Kinds of the findings, the most telling first."""
    try:
        evidence = checks.batch(batch, processor, config, samples, **options)
    except CheckFailed as failure:
        evidence = failure.evidence
    return list(dict.fromkeys(finding.kind for finding in findings_of(evidence)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("answers", [False, True], ids=["prompts", "answers"])
def test_what_the_processor_makes_passes(
    processor: Any, config: Any, samples: list[Sample], side: Any, answers: bool
) -> None:
    made = make_batch(processor, samples, padding_side=side, answers=answers)
    evidence = checks.batch(made, processor, config, samples)
    figures = {figure.name: figure.value for figure in evidence.figures}
    assert (figures["rows"], figures["images"], figures["not judged"]) == (4, 5, 0)
    assert figures["images compared with samples"] == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_cast_of_the_pixels_passes(processor: Any, config: Any, samples: Any, batch: Batch, dtype: Any) -> None:
    assert kinds({**batch, "pixel_values": batch["pixel_values"].to(dtype)}, processor, config, samples) == []


def test_text_alone_passes(processor: Any, config: Any, samples: list[Sample]) -> None:
    text = [samples[2], samples[2]]
    made = make_batch(processor, text, padding_side="right", answers=True)
    made.pop("mm_token_type_ids", None)
    assert kinds(made, processor, config, text) == []


def test_the_line_break_behind_an_answer_may_be_learned_or_not(processor: Any, config: Any, samples: Any) -> None:
    text = processor.apply_chat_template(
        [{"role": "user", "content": "Say blue."}, {"role": "assistant", "content": "blue"}], tokenize=False
    )
    made = dict(processor(text=[text], return_tensors="pt"))
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = (made["input_ids"][0] == end).nonzero().flatten().tolist()
    for last in (ends[-1] + 1, made["input_ids"].shape[1]):
        labels = torch.full_like(made["input_ids"], -100)
        labels[0, ends[-1] - 1 : last] = made["input_ids"][0, ends[-1] - 1 : last]
        assert kinds({**made, "labels": labels}, processor, config) == []


def _without(*names: str) -> Callable[[Batch], Batch]:
    return lambda batch: {name: value for name, value in batch.items() if name not in names}


def _with(name: str, change: Callable[[Batch], torch.Tensor]) -> Callable[[Batch], Batch]:
    return lambda batch: {**batch, name: change(batch)}


def _raw(batch: Batch) -> torch.Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[None, :, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[None, :, None]
    pixels = batch["pixel_values"]
    return (pixels.reshape(len(pixels), 3, -1) * deviation + mean).flatten(1)


def _cut(tokens: int) -> Callable[[Batch], Batch]:
    def cut(batch: Batch) -> Batch:
        shape = batch["input_ids"].shape
        return {name: value[:, :tokens] if value.shape == shape else value for name, value in batch.items()}

    return cut


DAMAGES: dict[str, tuple[Callable[[Batch], Batch], list[str]]] = {
    "ids in float": (_with("input_ids", lambda b: b["input_ids"].float()), ["ids-dtype"]),
    "an id of another vocabulary": (
        _with("input_ids", lambda b: b["input_ids"].masked_fill(b["input_ids"] == int(b["input_ids"][0, 1]), 10**6)),
        ["ids-without-embedding"],
    ),
    "types dropped": (_without("mm_token_type_ids"), ["types-missing"]),
    "types of zeros": (_with("mm_token_type_ids", lambda b: b["mm_token_type_ids"] * 0), ["types-apart"]),
    "types padded on the left": (_with("mm_token_type_ids", lambda b: b["mm_token_type_ids"].flip(1)), ["types-apart"]),
    "a mask of ones": (_with("attention_mask", lambda b: torch.ones_like(b["input_ids"])), ["padding-attended"]),
    "no mask": (_without("attention_mask"), ["padding-attended"]),
    "a mask on the other side": (
        _with("attention_mask", lambda b: b["attention_mask"].flip(1)),
        ["padding-attended", "text-not-attended", "padding-learned"],
    ),
    "pixels as bytes": (
        _with("pixel_values", lambda b: (255 * _raw(b)).round().to(torch.uint8)),
        ["pixels-dtype"],
    ),
    "pixels up to 255": (_with("pixel_values", lambda b: 255 * _raw(b)), ["pixels-not-rescaled"]),
    "pixels not normalised": (_with("pixel_values", _raw), ["pixels-not-normalised"]),
    "pixels not normalised in bfloat16": (
        _with("pixel_values", lambda b: _raw(b).bfloat16()),
        ["pixels-not-normalised"],
    ),
    "pixels with the constants of Qwen3-VL": (
        _with("pixel_values", lambda b: 2 * _raw(b) - 1),
        ["pixels-not-normalised"],
    ),
    "pixels of zeros": (_with("pixel_values", lambda b: b["pixel_values"] * 0), ["pixels-blank"]),
    "pixels that are NaN": (_with("pixel_values", lambda b: b["pixel_values"] / 0), ["pixels-not-finite"]),
    "a patch lost": (_with("pixel_values", lambda b: b["pixel_values"][:-1]), ["grids-apart"]),
    "grids in float": (_with("image_grid_thw", lambda b: b["image_grid_thw"].float()), ["grid-dtype"]),
    "a grid dropped": (_without("image_grid_thw"), ["pixels-missing"]),
    "pixels dropped": (_without("pixel_values", "image_grid_thw"), ["images-without-pixels"]),
    "cut inside of an answer": (_cut(-1), ["answer-truncated"]),
    "labels shifted": (_with("labels", lambda b: b["labels"].roll(-1, 1)), ["labels-shifted"]),
    "labels copied": (_with("labels", lambda b: b["input_ids"].clone()), ["whole-row-learned"]),
    "nothing learned": (_with("labels", lambda b: torch.full_like(b["labels"], -100)), ["nothing-learned"]),
    "1-D positions": (
        _with("position_ids", lambda b: (b["attention_mask"].cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)),
        ["positions-apart"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_kind_of_finding(
    processor: Any, config: Any, samples: list[Sample], batch: Batch, name: str
) -> None:
    if name.startswith("types") and "mm_token_type_ids" not in batch:
        pytest.skip("the processors of this release of Transformers make no mm_token_type_ids")
    damage, expected = DAMAGES[name]
    assert kinds(damage(batch), processor, config, samples) == expected


def test_a_finding_says_where_what_and_why(processor: Any, config: Any, batch: Batch) -> None:
    batch["labels"][0, 0] = batch["input_ids"][0, 0]
    with pytest.raises(CheckFailed, match=r"^prompt-learned: row 0, token 0: 1 learned tokens of the") as failure:
        checks.batch(batch, processor, config)
    [finding] = findings_of(failure.value.evidence)
    assert (finding.kind, finding.row, finding.token, finding.expected) == (
        "prompt-learned",
        0,
        0,
        "-100 in labels there",
    )
    assert json.loads(str(failure.value.evidence.data["findings"][0]))["cause"] == finding.cause


def test_rows_may_stand_in_another_order_and_none_may_be_lost(
    processor: Any, config: Any, samples: list[Sample], batch: Batch
) -> None:
    evidence = checks.batch(batch, processor, config, samples[::-1])
    assert "rows stand in another order than the samples; each was compared with its own" in evidence.notes
    twice = make_batch(processor, [samples[0], samples[0], *samples[2:]], padding_side="right", answers=True)
    assert kinds(twice, processor, config, samples) == ["row-of-another-sample"]


def test_images_and_answers_of_two_rows_are_told_apart(
    processor: Any, config: Any, samples: list[Sample], batch: Batch
) -> None:
    """Also in packed rows, whose samples stand behind each other."""
    one, other = replace(samples[0], images=samples[3].images), replace(samples[3], images=samples[0].images)
    wrong = make_batch(processor, [one, samples[1], samples[2], other], padding_side="right", answers=True)
    assert kinds(wrong, processor, config, samples) == ["images-exchanged"]
    assert kinds(pack(_parts(config), wrong), processor, config, samples) == ["images-exchanged"]
    assert kinds(pack(_parts(config), batch), processor, config, samples[::-1]) == []
    answers = [replace(samples[0], answer=samples[3].answer), *samples[1:3], replace(samples[3], answer="orange")]
    wrong = make_batch(processor, answers, padding_side="right", answers=True)
    assert kinds(wrong, processor, config, samples) == ["another-answer"]
    assert kinds(pack(_parts(config), wrong), processor, config, samples) == ["another-answer"]
    assert kinds(pack(_parts(config), batch), processor, config, samples[1:]) == []  # noted: not compared


def test_an_image_that_is_not_as_it_was(processor: Any, config: Any, samples: list[Sample]) -> None:
    high = replace(samples[0], images=(samples[0].images[0].resize((56, 112)),))
    made = make_batch(processor, [high], padding_side="right", answers=True)
    turned = {**made, "image_grid_thw": made["image_grid_thw"][:, [0, 2, 1]]}
    assert kinds(turned, processor, config, [high]) == ["image-turned"]
    for change, kind in ((ImageOps.flip, "patches-misplaced"), (_blue_first, "colours-exchanged")):
        given = [replace(sample, images=tuple(map(change, sample.images))) for sample in samples]
        made = make_batch(processor, given, padding_side="right", answers=True)
        assert kinds(made, processor, config, samples) == [kind]


def _blue_first(image: Image.Image) -> Image.Image:
    return Image.merge("RGB", image.split()[::-1])


@pytest.mark.parametrize("scale", [0.7, 1.6])
def test_a_collator_may_resize_as_it_likes(processor: Any, config: Any, samples: list[Sample], scale: float) -> None:
    def resized(image: Image.Image) -> Image.Image:
        return image.resize((round(image.width * scale), round(image.height * scale)))

    given = [replace(sample, images=tuple(map(resized, sample.images))) for sample in samples]
    made = make_batch(processor, given, padding_side="right", answers=True)
    assert kinds(made, processor, config, samples) == []


def test_chat_messages_are_samples_too(processor: Any, config: Any, samples: list[Sample], batch: Batch) -> None:
    def row(sample: Sample) -> dict[str, Any]:
        content = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": sample.question}]
        answer = [{"type": "text", "text": sample.answer}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "images": list(sample.images)}

    rows = [row(sample) for sample in samples]
    assert kinds(batch, processor, config, rows) == []
    rows[0]["messages"][1]["content"] = "another"
    assert kinds(batch, processor, config, rows) == ["another-answer"]


def test_placeholders_in_the_text_of_samples_are_no_words(
    processor: Any, config: Any, samples: list[Sample], batch: Batch
) -> None:
    for placeholder in ("<image>", "<|vision_start|><|image_pad|><|vision_end|>"):
        rows = [
            {
                "messages": chat((f"{placeholder * len(sample.images)}\n{sample.question}", sample.answer)),
                "images": list(sample.images),
            }
            for sample in samples
        ]
        evidence = checks.batch(batch, processor, config, rows[::-1])
        assert "rows stand in another order than the samples; each was compared with its own" in evidence.notes
        assert not [note for note in evidence.notes if "word by word" in note]
    turns = [("Which colour?", "red"), ("Which side?", "left"), ("Which colour?", "blue")]
    whole = chat(("<image>\nWhich colour?", "red"), *turns[1:])
    assert kinds(row_of(processor, chat(*turns)), processor, config, [whole, *map(chat, turns)]) == []


def test_the_folder_and_the_model_say_the_same(processor: Any, tiny_dir: Path, batch: Batch, lora_model: Any) -> None:
    for given in (tiny_dir, lora_model, torch.nn.DataParallel(lora_model)):
        assert kinds(batch, processor, given) == []


def test_wrong_arguments_are_one_sentence(processor: Any, config: Any, batch: Batch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_or_config is a Qwen-VL model"):
        checks.batch(batch, processor, 3)
    with pytest.raises(InputError, match="no configuration can be read from"):
        checks.batch(batch, processor, tmp_path)
    with pytest.raises(InputError, match="a batch is a mapping from names to tensors, got list"):
        checks.batch([batch], processor, config)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"samples\[0\] is of type int"):
        checks.batch(batch, processor, config, [1, 2, 3, 4])
    with pytest.raises(InputError, match=r"input_ids of shape \(4, 0\) hold no token"):
        checks.batch({"input_ids": batch["input_ids"][:, :0]}, processor, config)
    negative = {**batch, "input_ids": -batch["input_ids"], "labels": -batch["input_ids"]}
    assert kinds(negative, processor, config, [Sample((), "a", "b", "s", str(n)) for n in range(4)])
    with pytest.raises(InputError, match="got None"):
        checks.batch(batch, None, config)
    with pytest.raises(CannotJudge, match="model_type of the configuration is 'bert'"):
        checks.batch(batch, processor, AutoConfig.for_model("bert"))


def test_the_suite_judges_a_users_own_rows(processor: Any, lora_model: Any, samples: list[Sample]) -> None:
    """What the fixtures qvl_dataset and qvl_collator give, samples or rows that cannot be compared."""

    def collate(rows: list[Any]) -> Batch:
        given = [row if isinstance(row, Sample) else row["sample"] for row in rows]
        return make_batch(processor, given, padding_side="right", answers=True)

    def learns_all(rows: list[Any]) -> Batch:
        made = collate(rows)
        return {**made, "labels": made["input_ids"].clone()}

    for rows in (samples, [{"sample": sample} for sample in samples]):
        test_data.test_batch(rows, collate, processor, lora_model)
        with pytest.raises(CheckFailed, match="whole-row-learned"):
            test_data.test_batch(rows, learns_all, processor, lora_model)


def test_rows_are_spread_over_the_data_set() -> None:
    assert list(some_rows(range(1000), rows=5, per_batch=2)) == [[0, 250], [500, 749], [999]]
    assert list(some_rows(range(3))) == [[0, 1, 2]]
    assert list(some_rows([7])) == [[7]]


def test_every_kind_is_in_the_list_once() -> None:
    assert len(set(KINDS)) == len(KINDS)


# Every family, videos, packed rows


@pytest.fixture(scope="module", params=["qwen2-vl-2b", "qwen2.5-vl-7b", "qwen3-vl-8b"])
def released(request: pytest.FixtureRequest) -> tuple[Any, Any, list[Sample], Batch]:
    """Processor and configuration as released, and a padded batch of them."""
    processor = processor_for(parse_model(f"synthetic:{request.param}"))
    made = {sample.skill: sample for sample in scenes(0, 1, cell=32)}
    rows = [made[skill] for skill in SKILLS]
    batch = make_batch(processor, rows, padding_side="right", answers=True)
    return processor, released_config(request.param), rows, batch


def _parts(config: Any) -> Any:
    return SimpleNamespace(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=config.vision_config.spatial_merge_size,
        roots={"language": "language_model"},
        language_backbone=SimpleNamespace(layers=()),  # none of linear attention
    )


def test_every_family_passes(released: Any) -> None:
    processor, config, rows, batch = released
    assert kinds(batch, processor, config, rows) == []
    assert kinds({**batch, "pixel_values": batch["pixel_values"].bfloat16()}, processor, config, rows) == []


def test_packed_rows_pass_and_wrong_ones_do_not(released: Any) -> None:
    processor, config, _, batch = released
    made = pack(_parts(config), batch)
    places = made["position_ids"]
    assert kinds(made, processor, config) == []
    assert kinds({**made, "position_ids": places[1:], "text_position_ids": places[0]}, processor, config) == []
    lengths = torch.tensor([0, *batch["attention_mask"].sum(dim=1).cumsum(0).tolist()], dtype=torch.int32)
    assert kinds({**made, "position_ids": places[1:], "cu_seq_lens_q": lengths}, processor, config) == []
    numbers = (places[0] == 0).long().cumsum(dim=1)
    blocks = (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]
    for mask in (blocks, torch.where(blocks, 0.0, float("-inf")), numbers):
        assert kinds({**made, "position_ids": places[1:], "attention_mask": mask}, processor, config) == []
    assert kinds({**made, "position_ids": places[1:]}, processor, config) == ["packed-not-separated"]
    ones = torch.ones_like(made["input_ids"])
    assert kinds({**made, "attention_mask": ones}, processor, config) == ["packed-not-separated"]
    plain = places[:1].expand(4, -1, -1)
    assert kinds({**made, "position_ids": plain}, processor, config) == ["packed-apart"]


def _as_videos(config: Any, batch: Batch) -> Batch:
    """The same rows with every image shown as a video of one temporal patch."""
    names = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}
    made = {names.get(name, name): value for name, value in batch.items()}
    made["input_ids"] = made["input_ids"].masked_fill(made["input_ids"] == config.image_token_id, config.video_token_id)
    if "mm_token_type_ids" in made:
        made["mm_token_type_ids"] = 2 * made["mm_token_type_ids"]
    return made


def test_videos(released: Any) -> None:
    processor, config, _, batch = released
    made = _as_videos(config, batch)
    seconds = torch.full((len(made["video_grid_thw"]),), 0.5)
    assert kinds({**made, "second_per_grid_ts": seconds}, processor, config) == []
    timed = config.model_type == "qwen2_5_vl"
    assert kinds(made, processor, config) == (["video-time"] if timed else [])
    assert kinds({**made, "second_per_grid_ts": seconds[1:]}, processor, config) == (["video-time"] if timed else [])
    if "mm_token_type_ids" in made:
        taken = {**made, "second_per_grid_ts": seconds, "mm_token_type_ids": made["mm_token_type_ids"] // 2}
        assert kinds(taken, processor, config) == ["types-apart"]
    dropped = {name: value for name, value in made.items() if name != "pixel_values_videos"}
    assert "images-without-pixels" in kinds({**dropped, "second_per_grid_ts": seconds}, processor, config)


def test_the_frames_of_a_video_stand_apart_in_qwen3_vl_only(released: Any) -> None:
    """Two temporal patches: one run of placeholders in Qwen2-VL and Qwen2.5-VL, two with a time between in Qwen3-VL."""
    processor, config, _, _ = released
    each = 4
    width = config.vision_config.patch_size**2 * 3 * config.vision_config.temporal_patch_size
    pad, text = [config.video_token_id] * each, processor.tokenizer("1 s", add_special_tokens=False)["input_ids"]
    header = processor.tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    for between, apart in (([], False), (text, True)):
        ids = torch.tensor([[*header, *pad, *between, *pad, *processor.tokenizer("<|im_end|>\n")["input_ids"]]])
        made = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == config.video_token_id).long(),
            "video_grid_thw": torch.tensor([[2, 4, 4]]),
            "pixel_values_videos": torch.full((32, width), -1.0),
            "second_per_grid_ts": torch.tensor([1.0]),
        }
        fits = apart == (config.model_type == "qwen3_vl")
        found = kinds(made, processor, config)
        assert ([each for each in found if each != "pixels-blank"] == []) == fits, (found, apart)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (("0.2", "1.2", "2.2"), ""),
        (("0.0", "0.0", "0.1"), ""),  # of a camera's every frame
        (("9.9", "10.0", "10.0"), ""),
        (("1.2", "0.2", "2.2"), "<0.2 seconds> before frame 1 of video 0, behind <1.2 seconds> of frame 0"),
        (("0.2", "10.2", "9.2"), "<9.2 seconds> before frame 2 of video 0, behind <10.2 seconds> of frame 1"),
        (("0.2", "", "2.2"), "no time before frame 1 of video 0"),
        (("-3.0", "-2.0", "-1.0"), "<-3.0 seconds> before frame 0 of video 0"),
        (("0.2", "nan", "2.2"), "<nan seconds> before frame 1 of video 0"),
        (("", "", ""), None),
    ],
)
def test_times_in_words_never_run_backwards(times: tuple[str, ...], words: str | None) -> None:
    processor, config = processor_for(parse_model("synthetic:qwen3-vl-8b")), released_config("qwen3-vl-8b")
    made = clip_batch(processor, scene_clips(0, cell=32)[:1], time="words")
    text = processor.tokenizer.decode(made["input_ids"][0])
    for own, time in zip(("0.2", "1.2", "2.2"), times, strict=True):
        text = text.replace(f"<{own} seconds>", f"[{time}]")
    text = text.replace("[]", "").replace("[", "<").replace("]", " seconds>")
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    made |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in made:
        made["mm_token_type_ids"] = 2 * (ids == config.video_token_id).long()
    if not words:
        evidence = checks.batch(made, processor, config)
        judged = "times of frames" in {figure.name for figure in evidence.figures}
        assert (judged, "times of videos" in unjudged_of(evidence)) == ((True, False) if words == "" else (False, True))
        return
    with pytest.raises(CheckFailed, match=re.escape(words)) as caught:
        checks.batch(made, processor, config)
    (finding,) = findings_of(caught.value.evidence)
    assert finding.kind == "video-time"
    assert int(ids[finding.row, finding.token]) == config.video_token_id


@pytest.mark.skipif(is_before("transformers", "5.3"), reason="made right up to 5.2")
def test_positions_behind_a_long_video_are_known_for_what_makes_them(processor: Any, config: Any) -> None:
    """docs/upstream/video-positions.md: a collator may have called this release's own ``get_rope_index``."""
    made = clip_batch(processor, scene_clips(0, cell=28), time="seconds")
    made["second_per_grid_ts"] = torch.full((len(made["video_grid_thw"]),), 8.0)
    with torch.device("meta"):
        core = AutoModel.from_config(config)
    given = {k: v for k, v in made.items() if k in inspect.signature(core.get_rope_index).parameters}
    places, _ = core.get_rope_index(**given)
    for change, words in ((0, "Transformers since 5.3 makes them so"), (1, "made for another batch")):
        places[:, :, -1] += change
        with pytest.raises(CheckFailed, match=words):
            checks.batch({**made, "position_ids": places}, processor, config)


def test_times_before_the_frames_of_one_of_two_videos() -> None:
    processor, config = processor_for(parse_model("synthetic:qwen3-vl-8b")), released_config("qwen3-vl-8b")
    made = clip_batch(processor, scene_clips(0, cell=32)[:2], time="words", padding_side="right")
    ids, end = made["input_ids"], int(made["attention_mask"][0].sum())
    text = re.sub(r"<[\d.]+ seconds>", "", processor.tokenizer.decode(ids[0, :end]))
    shorter = processor.tokenizer(text)["input_ids"]
    for name, value in (("input_ids", torch.tensor(shorter)), ("attention_mask", 1)):
        made[name][0, len(shorter) :] = processor.tokenizer.pad_token_id if name == "input_ids" else 0
        made[name][0, : len(shorter)] = value
    if "mm_token_type_ids" in made:
        made["mm_token_type_ids"] = 2 * (ids == config.video_token_id).long()
    with pytest.raises(CheckFailed, match="no time before any frame of video 0, unlike other videos of the batch"):
        checks.batch(made, processor, config)


def test_an_image_of_one_colour_up_to_the_rounding_of_a_resize() -> None:
    plain = torch.full((4, 12), 0.3) + torch.arange(48).view(4, 12) % 15 * 2.0**-24
    assert of_one_colour(plain, 3)
    step = plain.clone()
    step[1, 2] += 1 / 255 / 0.5  # one step of 8 bits, under the largest deviation
    assert not of_one_colour(step, 3)


@pytest.mark.parametrize("level", [1.0 / 2, 3 / 4, 1.0, 1.5, 2.0, 2.12])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_plain_image_is_plain_however_a_cast_rounds_it(level: float, sign: int) -> None:
    """Two numbers of a dtype with none between are what one value may be rounded to, on either side of their middle."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        at = torch.tensor(sign * level, dtype=dtype)
        after, later = (at.view(_BITS[dtype]) + n for n in (1, 2))
        values = at.repeat(4, 12)
        values[1, 2] = after.view(dtype)
        assert of_one_colour(values, 3)
        values[1, 2] = later.view(dtype)
        assert of_one_colour(values, 3) == (abs(float(later.view(dtype) - at)) < HALF_A_LEVEL)


_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


CASTS = [
    (),
    *((dtype,) for dtype in (torch.float16, torch.bfloat16)),
    *((half, torch.float32) for half in (torch.float16, torch.bfloat16)),
    *((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)),
]


def cast(pixels: torch.Tensor, casts: tuple[torch.dtype, ...]) -> torch.Tensor:
    for dtype in casts:
        pixels = pixels.to(dtype)
    return pixels


@pytest.mark.parametrize("casts", CASTS, ids=str)
@pytest.mark.parametrize("grey", [1, 64, 127, 128, 200, 254])
def test_a_grey_image_is_no_buffer_after_any_casts(casts: tuple[torch.dtype, ...], grey: int) -> None:
    """One value in all channels, as Qwen3-VL normalises grey; a cast moves it off the steps of float32."""
    processor, config = processor_for(parse_model("synthetic:qwen3-vl-8b")), released_config("qwen3-vl-8b")
    sample = {each.skill: each for each in scenes(0, 1, cell=32)}["nth_colour"]
    first = Image.new("RGB", sample.images[0].size, (grey,) * 3)
    made = make_batch(processor, [replace(sample, images=(first, *sample.images[1:]))])
    evidence = checks.batch({**made, "pixel_values": cast(made["pixel_values"], casts)}, processor, config)
    assert "image 0 is of one colour" in evidence.notes
    patches = int(made["image_grid_thw"][0].prod())
    for filled in (0.0, 0.5, 3.14):
        made["pixel_values"][:patches] = filled
        batch = {**made, "pixel_values": cast(made["pixel_values"], casts)}
        assert kinds(batch, processor, config) == ["pixels-blank"]


@pytest.mark.parametrize("colour", [(28, 28, 28), (46, 189, 59), (147, 227, 46), (170, 170, 170), (174, 174, 174)])
def test_a_colour_that_is_rounded_twice_is_normalised(
    colour: tuple[int, int, int], processor: Any, config: Any
) -> None:
    """float16 cast to bfloat16, alone in a batch, so that three values say by which constants they were made."""
    sample = scenes(0, 1, ["colour"])[0]
    made = make_batch(processor, [replace(sample, images=(Image.new("RGB", (112, 84), colour),))])
    batch = {**made, "pixel_values": cast(made["pixel_values"], (torch.float16, torch.bfloat16))}
    assert "image 0 is of one colour" in checks.batch(batch, processor, config).notes


# Several conversations in one row


def one_row(batch: Batch) -> Batch:
    """All rows behind each other in one, and nothing that says where each begins."""
    kept = batch["attention_mask"].bool()
    made = {name: value[kept][None] if value.shape == kept.shape else value for name, value in batch.items()}
    del made["attention_mask"]
    return made


def test_conversations_that_nothing_keeps_apart(
    processor: Any, config: Any, samples: list[Sample], batch: Batch
) -> None:
    made = one_row(batch)
    with pytest.raises(CheckFailed) as failure:
        checks.batch(made, processor, config, samples)
    (finding,) = findings_of(failure.value.evidence)
    assert (finding.kind, finding.row, finding.token) == (
        "packed-not-separated",
        0,
        int(batch["attention_mask"][0].sum()),
    )
    assert finding.found == (
        "4 conversations (samples 0, 1, 2 and 3) in one row, and nothing that keeps them apart (neither position_ids nor "
        "an attention_mask)"
    )
    assert unjudged_of(failure.value.evidence)["batch against samples"] == "4 samples were given for 1 row"
    ones = torch.ones_like(made["input_ids"])
    assert kinds({**made, "attention_mask": ones}, processor, config, samples) == ["packed-not-separated"]
    places = torch.arange(ones.numel())[None]
    text_only = one_row(make_batch(processor, samples[2:3] * 2, padding_side="right", answers=True))
    numbered = {**text_only, "position_ids": places[:, : text_only["input_ids"].numel()]}
    assert kinds(numbered, processor, config, [samples[2], replace(samples[2], id="again")]) == ["packed-not-separated"]


def test_a_bound_that_is_missing_among_others(processor: Any, config: Any, samples: list[Sample], batch: Batch) -> None:
    made = one_row(batch)
    bounds = [0, *batch["attention_mask"].sum(dim=1).cumsum(0).tolist()]
    right = {**made, "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32)}
    assert kinds(right, processor, config, samples) == []
    del bounds[2]
    with pytest.raises(
        CheckFailed, match=r"2 conversations \(samples 1 and 2\) in one sample of a packed row"
    ) as failure:
        checks.batch({**made, "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32)}, processor, config, samples)
    assert findings_of(failure.value.evidence)[0].token == int(batch["attention_mask"][:2].sum())


def test_samples_of_one_question(processor: Any, config: Any, samples: list[Sample]) -> None:
    alike = [replace(samples[2], answer=answer) for answer in ("red", "blue", "red")]
    rows = make_batch(processor, alike, padding_side="right", answers=True)
    assert kinds(one_row(rows), processor, config, alike) == ["packed-not-separated"]
    dropped = {name: value[:2] for name, value in rows.items()}
    assert kinds(dropped, processor, config, alike) == []


def chat(*turns: tuple[str, str], system: str = "") -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for asked, said in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return messages


def row_of(processor: Any, *chats: list[dict[str, str]], cut: int | None = None) -> Batch:
    """Conversations in one row, which is cut to so many tokens."""
    text = "".join(processor.tokenizer.apply_chat_template(each, tokenize=False) for each in chats)
    ids = torch.tensor(processor.tokenizer(text)["input_ids"])[None, :cut]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_turns_of_one_conversation_are_no_samples(processor: Any, config: Any) -> None:
    """Also where a data set holds each turn as a sample too, and where the row was cut."""
    turns = [("Which colour?", "red"), ("Which side?", "left"), ("Which colour?", "blue")]
    whole = chat(*turns)
    every = [whole, *(chat(turn) for turn in turns)]
    length = row_of(processor, whole)["input_ids"].numel()
    for cut in range(1, length + 1):
        assert kinds(row_of(processor, whole, cut=cut), processor, config, every) == [], cut
    for pair in ((3, 1), (1, 3), (0, 2)):
        joined = row_of(processor, *(every[number] for number in pair))
        assert kinds(joined, processor, config, every) == ["packed-not-separated"], pair


@pytest.mark.parametrize("name", ["packed_seq_lengths", "segment_ids", "cu_seqlens"])
def test_what_may_keep_samples_apart_and_is_not_read(
    processor: Any, config: Any, samples: list[Sample], batch: Batch, name: str
) -> None:
    lengths = batch["attention_mask"].sum(dim=1)
    evidence = checks.batch({**one_row(batch), name: lengths}, processor, config, samples)
    assert unjudged_of(evidence)["packed samples"] == (
        f"row 0 holds 4 conversations (samples 0, 1, 2 and 3), and what keeps them apart may be {name}, which is not "
        "read here"
    )


def test_a_second_system_turn_is_told_where_nobody_gave_samples(processor: Any, config: Any) -> None:
    chats = [chat(("Which colour?", said), system="Be brief.") for said in ("red", "blue")]
    joined = row_of(processor, *chats)
    said = unjudged_of(checks.batch(joined, processor, config))
    assert said["conversations in one row"].startswith("row 0 has several system turns, and without `samples` nobody")
    assert "conversations in one row" not in unjudged_of(checks.batch(row_of(processor, chats[0]), processor, config))
    assert kinds(joined, processor, config, chats) == ["packed-not-separated"]
