"""A user's dataset: tokens of its samples by the real processor, and the batches that training draws from it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from pytest_qvl.cli import main
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.vram.forecast import Sample
from pytest_qvl.vram.forecast.dataset import Dataset, Row, read_dataset
from pytest_qvl.vram.forecast.source import find_source

SCHEMA = json.loads(
    files("pytest_qvl").joinpath("vram", "forecast", "forecast.schema.json").read_text(encoding="utf-8")
)
EMBEDDED = str(embedded_model_dir())
SIZES = {"a.png": (112, 224), "b.jpg": (300, 200), "deep/c.png": (56, 56)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, height by width as in ``SIZES``."""
    place = tmp_path_factory.mktemp("images")
    (place / "deep").mkdir()
    (place / "notes.txt").write_text("no image")
    for name, (height, width) in SIZES.items():
        Image.new("RGB", (width, height)).save(place / name)
    return place


@pytest.fixture(scope="module")
def read(folder: Path) -> Any:
    """Reads a JSONL with these rows, beside the images."""

    def found(*rows: Any, model: str = EMBEDDED, tokens: int | None = None) -> Dataset:
        file = folder / "train.jsonl"
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
        return read_dataset(file, find_source(model), model, tokens)

    return found


def test_a_folder_has_a_sample_for_each_image(folder: Path) -> None:
    found = read_dataset(folder, find_source(EMBEDDED), EMBEDDED, 40)
    assert [row.name for row in found.rows] == ["a.png", "b.jpg", "deep/c.png"]
    assert [row.sample for row in found.rows] == [Sample((size,), 40) for size in SIZES.values()]


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many cats are there?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
]
TURNS = [{"from": "human", "value": "<image>How many cats are there?"}, {"from": "gpt", "value": "Three."}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "images": ["b.jpg"]},
        {"messages": [{**CHAT[0], "content": [{"type": "image", "image": "b.jpg"}, CHAT[0]["content"][1]]}, CHAT[1]]},
        {"conversations": TURNS, "image": "b.jpg"},
        {"messages": [{"role": "user", "content": "How many cats are there?"}, CHAT[1]], "image": "b.jpg"},
    ],
    ids=["messages", "images in messages", "conversations", "images without a place"],
)
def test_tokens_are_those_of_the_real_processor(folder: Path, read: Any, row: dict[str, Any]) -> None:
    """The processor is called on the text with its image, and makes exactly as many tokens."""
    processor = load_processor(EMBEDDED)
    text = processor.apply_chat_template(CHAT, tokenize=False)
    with Image.open(folder / "b.jpg") as image:
        ids = processor(text=[text], images=[image], return_tensors="pt")["input_ids"]
    (found,) = read(row).rows
    assert found.tokens == ids.shape[1]
    assert found.visual == int((ids == processor.tokenizer.convert_tokens_to_ids(processor.image_token)).sum())


def test_plain_text_and_given_tokens(read: Any) -> None:
    first, second = read({"question": "Why?", "answer": "So.", "image": "a.png"}, {"text": "no image here"}).rows
    assert len(first.sample.images) == 1
    assert second.visual == 0
    assert [row.sample.tokens for row in read({"image": "a.png"}, {"image": "b.jpg"}, tokens=77).rows] == [77, 77]
    assert read({"image": "a.png"}, model="qwen2.5-vl-7b", tokens=77).rows[0].sample.tokens == 77


def test_no_column_of_text_is_passed_over(read: Any) -> None:
    """Alpaca's ``input``, answers by other names, and a system prompt beside the turns or before them."""

    def tokens(**row: Any) -> int:
        (found,) = read(row).rows
        return int(found.sample.tokens)

    long = "Say what is in it. " * 20
    whole = tokens(text=long)
    assert tokens(instruction="Do.", input=long, output="So.") >= whole
    assert tokens(prompt="Do.", response=long) >= whole
    assert tokens(query="Do.", response=long) >= whole
    assert tokens(text="Do.", system=long) >= whole
    turns = [{"role": "user", "content": "Do."}, {"role": "assistant", "content": "So."}]
    said = tokens(messages=[{"role": "system", "content": long}, *turns])
    assert tokens(messages=turns, system=long) == said
    spoken = [{"from": "human", "value": "Do."}, {"from": "gpt", "value": "So."}]
    assert tokens(conversations=spoken, system=long) == said
    assert read({"text": "Do.", "tools": [{"name": "look"}]}, tokens=50).rows[0].sample.tokens == 50


def test_images_without_a_place_stand_in_the_first_message_of_a_user(read: Any) -> None:
    """As TRL puts them; a message's content may be in parts already."""
    system = {"role": "system", "content": "Be brief."}
    by_hand, *others = (
        read({"messages": [system, {"role": "user", "content": content}, CHAT[1]], "image": "b.jpg"}).rows[0]
        for content in (CHAT[0]["content"], CHAT[0]["content"][1]["text"], CHAT[0]["content"][1:])
    )
    assert others == [by_hand, by_hand]


def test_an_image_in_the_form_of_openai_is_an_image(read: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": "b.jpg"}}
    told = {"messages": [{"role": "user", "content": [part, CHAT[0]["content"][1]]}, CHAT[1]]}
    assert read(told).rows == read({"messages": CHAT, "image": "b.jpg"}).rows
    assert read(told, tokens=50).rows[0].sample.images == (SIZES["b.jpg"],)


def test_a_file_that_is_not_in_utf_8_is_named(folder: Path) -> None:
    file = folder / "latin.jsonl"
    file.write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl is not UTF-8: "):
        read_dataset(file, find_source(EMBEDDED), EMBEDDED, None)
    file.write_bytes('{"text": "é"}\n'.encode("utf-8-sig"))
    assert len(read_dataset(file, find_source(EMBEDDED), EMBEDDED, None).rows) == 1


def test_an_image_that_pillow_refuses_to_open_is_named(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(ValueError, match=r"b.jpg' cannot be read: Image size \(60000 pixels\) exceeds limit"):
        read({"text": "x", "image": "b.jpg"})


FRAMES = ["deep/c.png"] * 5
WATCHED = [{"type": "video"}, CHAT[0]["content"][1]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": WATCHED}, CHAT[1]], "video": FRAMES},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": FRAMES}, WATCHED[1]]}, CHAT[1]]},
        {"conversations": [{**TURNS[0], "value": "<video>How many cats are there?"}, TURNS[1]], "videos": [FRAMES]},
        {"messages": [{"role": "user", "content": "How many cats are there?"}, CHAT[1]], "videos": [FRAMES]},
    ],
    ids=["messages", "videos in messages", "conversations", "videos without a place"],
)
def test_a_list_of_frames_is_a_video(read: Any, row: dict[str, Any]) -> None:
    """Five frames are three steps of four tokens, and the text has as many tokens as beside an image."""
    (found,), (image,) = read(row).rows, read({"messages": CHAT, "image": "b.jpg"}).rows
    assert found.sample == Sample((), image.sample.tokens, ((5, 56, 56),))
    assert found.visual == 12


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "train.jsonl, line 1 is not JSON"),
        ("[1]", "train.jsonl, line 1 holds a list and not one row"),
        (
            {"image": "a.png"},
            "train.jsonl, line 1 has no text: known are messages, conversations and text, prompt with",
        ),
        ({"text": "x", "image": "https://x.org/a.png"}, "has the image 'https://x.org/a.png', which is no path"),
        ({"text": "x", "image": "none.png"}, "none.png' cannot be read"),
        ({"text": "x", "video": "a.mp4"}, "has the video 'a.mp4', which is not read here: give the images of its"),
        ({"text": "x", "videos": [["a.png"], []]}, r"has the video '\[\]', which is not read"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]}, "has the video 'a.mp4'"),
        ({"conversations": [{"from": "human", "value": "<video>\nWhat?"}]}, "has 0 videos and a place for 1"),
        ({"messages": CHAT, "image": "a.png", "video": ["a.png"]}, "has 1 videos and a place for 0"),
        ({"text": "x", "video": ["a.png", "b.jpg"]}, "has a video with frames of 112x224 and 300x200: all frames"),
        ({"messages": CHAT, "images": ["a.png", "b.jpg"]}, "has 2 images and a place for 1"),
        ({"conversations": TURNS}, "has 0 images and a place for 1"),
        ("[", "line 1 is not JSON: it begins a list, and a JSONL has a row on each line"),
        ({"messages": "hello"}, "has messages='hello': it must be a list of turns"),
        ({"messages": []}, r"has messages=\[\]: it must be a list of turns"),
        ({"messages": ["hello"]}, "has the turn 'hello' in messages: it needs role, a name, and content, a text or a"),
        ({"messages": [{"role": "user", "content": None}]}, "in messages: it needs role, a name, and content, a text"),
        ({"messages": [{"content": "hello"}]}, "in messages: it needs role, a name, and content"),
        ({"conversations": [{"role": "user", "content": "hello"}]}, "in conversations: it needs from, a name, and"),
        ({"text": "x", "videos": 5}, "has videos=5: it must be a list of videos"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "b.jpg", "max_pixels": 784}]}]},
            "has an image or video with max_pixels=784, which is not followed",
        ),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "has chosen, whose tokens are not counted: say --tokens"),
        ({"text": "x", "tools": [{"name": "look"}]}, "has tools, whose tokens are not counted: say --tokens"),
    ],
)
def test_rows_that_cannot_be_used_are_named(read: Any, row: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read(row)


def test_text_without_a_tokenizer_is_not_guessed(read: Any) -> None:
    with pytest.raises(ValueError, match="needs a tokenizer to count it, and there is none beside 'qwen2.5-vl-7b'"):
        read({"text": "x", "image": "a.png"}, model="qwen2.5-vl-7b")


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    source = find_source(EMBEDDED)
    with pytest.raises(ValueError, match="is neither a folder of images nor a JSONL file"):
        read_dataset(tmp_path / "none", source, EMBEDDED, None)
    with pytest.raises(ValueError, match="holds no images"):
        read_dataset(tmp_path, source, EMBEDDED, None)


def _dataset(*lengths: tuple[int, int]) -> Dataset:
    return Dataset(
        "some", tuple(Row(str(i), Sample(((56, 56),), text), visual) for i, (visual, text) in enumerate(lengths))
    )


def test_the_worst_batch_has_the_longest_sample_and_the_most_visual_tokens() -> None:
    """Ninety-seven usual samples, one long text, two large images."""
    found = _dataset(*[(100, 50)] * 97, (10, 5000), (2000, 40), (1500, 40))
    assert (found.quantile(0.5, lambda row: row.tokens), found.quantile(0.95, lambda row: row.tokens)) == (150, 150)
    median, high, worst = found.batches(3)
    assert [row.name for row in worst.rows] == ["97", "98", "99"]
    assert worst.padded == 3 * 5010
    assert median.padded == 450
    assert median.padded <= high.padded <= worst.padded


def test_the_worst_batch_is_at_least_every_batch_that_can_be_drawn() -> None:
    found = _dataset(*((37 * i % 400, 31 * i % 300 + 4) for i in range(60)))
    *_, worst = found.batches(8)
    for start in range(50):
        rows = found.rows[start : start + 8]
        assert worst.padded >= 8 * max(row.tokens for row in rows)


def test_quantiles_are_values_of_rows_and_small_datasets_make_small_batches() -> None:
    found = _dataset((1, 9), (2, 9), (3, 9), (4, 9))
    assert [found.quantile(share, lambda row: row.visual) for share in (0, 0.25, 0.5, 0.95, 1)] == [1, 1, 2, 4, 4]
    assert [len(batch.rows) for batch in found.batches(8)] == [4, 4, 4]


@pytest.mark.slow
def test_the_command_forecasts_the_worst_batch_beside_the_usual_ones(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "forecast",
        "--model",
        EMBEDDED,
        "--dataset",
        str(folder),
        "--tokens",
        "30",
        "--batch",
        "2",
        "--lora-r",
        "8",
    ]
    assert main([*command, "--card", "t4"]) == 0
    text = capsys.readouterr().out
    assert f"dataset {folder}: 3 samples; longest: b.jpg" in text
    assert "tokens of a sample: median 62, 95 % 107, largest 107" in text
    assert "worst batch: 2 x 107 tokens, padding included: 0." in text
    assert "median batch: 2 x " in text
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    jsonschema.validate(data, SCHEMA)
    batches = {batch["which"]: batch for batch in data["dataset"]["batches"]}
    assert batches["worst"]["rows"] == ["b.jpg", "a.png"]
    assert batches["median"]["allocated"] <= batches["worst"]["allocated"] == data["peak"]["allocated"]
    assert batches["worst"]["fits"] is None


def test_image_sizes_beside_a_dataset_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", "--model", EMBEDDED, "--dataset", str(folder), "--images", "2"]) == 2
    assert "--image, --images and --video beside --dataset: its images and videos have" in capsys.readouterr().err
    assert main(["forecast", "--model", EMBEDDED, "--dataset", str(folder), "--video", "4x56x56"]) == 2
